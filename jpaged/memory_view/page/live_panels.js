"use strict";
// What stands around the map of a server's pool.

const MOST_ROWS = 200;

function seconds(value) {
  if (value === null) return "–";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  return value < 6000 ? `${Math.floor(value / 60)} min` : `${Math.floor(value / 3600)} h`;
}

function rate(value) {
  return value >= 100 || value === 0 ? number(Math.round(value)) : value.toFixed(1);
}

function tilesOf({ rates, totals, ended, rejected, measures, counters, numBlocks }) {
  const [, , preemptions, lost, , out, back] = counters;
  const { stop, length, abort, error } = ended;
  const waiting = measures.waiting + measures.swapped;
  return [
    ["Generating", rate(rates.generated), "tokens/s", `Of the last 10 s. ${number(totals.generated)} tokens since the start`],
    ["Prompts", rate(rates.prompt), "tokens/s", `Of the last 10 s. ${number(totals.prompt)} tokens since the start`],
    ["First token", seconds(rates.ttft_p50), `p99 ${seconds(rates.ttft_p99)}`, "Time to first token: median and 99th percentile of the last minute"],
    ["Running", number(measures.running), `${number(waiting)} waiting`, "Requests"],
    ["Pool", percent(measures.used, numBlocks - 1), `${number(measures.used)} of ${number(numBlocks - 1)} blocks`, "Blocks that some block table points to"],
    ["Prefix hits", percent(totals.cached, totals.prompt), `${number(totals.cached)} tokens`, "Prompt tokens that were found in the prefix cache, since the start"],
    ["Preempted", number(preemptions), lost ? `${number(lost)} tokens lost` : `${number(out)} / ${number(back)} swapped`, `Groups that had to give their blocks back; ${number(out)} swapped out, ${number(back)} back in; ${number(lost)} computed tokens thrown away`],
    ["Done", number(stop + length), `${number(abort)} aborted, ${number(error + rejected)} failed`, `stop ${number(stop)}, length ${number(length)}, abort ${number(abort)}, error ${number(error)}, rejected ${number(rejected)}`],
  ];
}

function chartsOf(box, numBlocks) {
  const count = (value) => number(Math.round(value));
  return [
    new Chart(box, {
      title: "Tokens/s",
      series: [
        { name: "generated", colour: (t) => t.owners[2], value: (m) => m.rates.generated, text: rate },
        { name: "prompts", colour: (t) => t.owners[1], value: (m) => m.rates.prompt, text: rate },
      ],
    }),
    new Chart(box, {
      title: "First token",
      series: [
        { name: "p99", colour: (t) => t.owners[3], value: (m) => m.rates.ttft_p99, text: seconds },
        { name: "p50", colour: (t) => t.owners[0], value: (m) => m.rates.ttft_p50, text: seconds },
      ],
    }),
    new Chart(box, {
      title: "Requests",
      stacked: true,
      series: [
        { name: "running", colour: (t) => t.owners[2], value: (m) => m.measures.running, text: count },
        { name: "waiting", colour: (t) => t.owners[1], value: (m) => m.measures.waiting, text: count },
        { name: "swapped", rare: true, colour: (t) => t.alarm, value: (m) => m.measures.swapped, text: count },
      ],
    }),
    new Chart(box, {
      title: "Blocks",
      stacked: true,
      most: numBlocks - 1,
      series: [
        { name: "shared", colour: (t) => t.shared, value: (m) => m.measures.shared, text: count },
        { name: "own", colour: (t) => t.private, value: (m) => m.measures.used - m.measures.shared, text: count },
        { name: "cached", colour: (t) => t.cachedArea, value: (m) => m.measures.cached, text: count },
      ],
    }),
  ];
}

class RequestTable {
  constructor(parts, pool, colours, select) {
    Object.assign(this, parts, { pool, colours, select, rowOf: new Map() });
  }

  // now: milliseconds on the server's clock.
  draw(selected, measures, now) {
    const { pool } = this;
    const requests = [...pool.state.present].map((n) => pool.state.requests.get(n)).sort((a, b) => a.number - b.number);
    const words = [[measures.running, "running"], [measures.waiting, "waiting"], [measures.swapped, "swapped"]];
    this.counts.textContent = words.filter(([count, name]) => count || name !== "swapped").map(([count, name]) => `${number(count)} ${name}`).join(", ");
    this.rows.replaceChildren(...requests.slice(0, MOST_ROWS).map((request) => this.row(request, request.number === selected, now)));
    const more = requests.length - MOST_ROWS;
    this.note.textContent = more > 0 ? `and ${number(more)} more` : requests.length ? "" : "No requests.";
  }

  row(request, chosen, now) {
    const sequences = this.pool.sequencesOf(request.number);
    const blocks = new Set(sequences.flatMap((s) => s.blocks.filter(Boolean))).size;
    const generated = sequences.reduce((sum, s) => sum + s.tokens.length - request.prompt, 0);
    const parked = request.status === "parked";
    const age = Math.max(0, now - request.arrived);
    const waited = request.waited < 0 ? age : request.waited;
    const samples = sequences.length > 1 ? [element("small", { textContent: `×${sequences.length}` })] : [];
    const chip = element("i", { className: "chip", style: { background: theme().owners[this.colours.get(request.number)] } });
    const hits = request.hits ? `; ${number(request.hits)} tokens of its prompt were in the cache` : "";
    const preempted = request.preemptions ? `; preempted ${request.preemptions}×` : "";
    const cells = [
      element("td", { title: request.id }, chip, request.id, ...samples),
      element("td", {}, element("span", { className: `status ${request.status}`, textContent: request.status })),
      element("td", {}, ...(parked ? [] : [element("span", { className: "dim", textContent: `${number(request.prompt)} + ` }), number(generated)])),
      element("td", { textContent: number(request.host || blocks) }),
      element("td", { className: request.waited < 0 ? "" : "dim", textContent: parked ? "" : seconds(waited / 1000) }),
      element("td", { className: "dim", textContent: parked ? "" : seconds(age / 1000) }),
    ];
    const row = element("tr", { ariaSelected: String(chosen), title: `Show its blocks; again: all${hits}${preempted}` }, ...cells);
    row.addEventListener("click", () => this.select(chosen ? null : request.number));
    return row;
  }
}
