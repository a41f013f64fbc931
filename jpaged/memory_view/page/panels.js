"use strict";
// What stands beside the map. Every text is set as text, never as markup.

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { style, data, ...rest } = properties;
  for (const [name, value] of Object.entries(rest)) made[name] = value;
  for (const [name, value] of Object.entries(style || {})) made.style.setProperty(name, value);
  for (const [name, value] of Object.entries(data || {})) made.dataset[name] = value;
  made.append(...children);
  return made;
}

function number(value) {
  return value.toLocaleString("en");
}

function percent(part, whole) {
  if (!whole) return "–";
  const value = (100 * part) / whole;
  return `${value >= 10 || value === 0 ? Math.round(value) : value.toFixed(1)} %`;
}

// Spaces and line ends must be seen: they are tokens too.
function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

class Counters {
  constructor(list, replay) {
    this.list = list;
    this.replay = replay;
  }

  draw() {
    const { replay } = this;
    const m = Object.fromEntries(Object.entries(replay.measures).map(([name, column]) => [name, column[replay.at]]));
    const [queries, hits, preemptions, lost, copies, out, back] = replay.state.counters;
    const slots = m.used * replay.blockSize;
    const tiles = [
      ["Used", `${number(m.used)}`, `of ${number(replay.numBlocks - 1)}`, "Blocks that some block table points to"],
      ["Shared", number(m.shared), "blocks", "Blocks with more than one reference"],
      ["Saved", percent(m.entries - m.used, m.entries), "by sharing", "(table entries − used blocks) / table entries"],
      ["Waste", percent(m.empty, slots), "of used slots", `${number(m.empty)} slots of last blocks are empty; ${number(m.reserved)} more are reserved for prompt tokens`],
      ["Prefix hits", percent(hits, queries), `${number(hits)} tokens`, `${number(hits)} of ${number(queries)} tokens were found in the cache`],
      ["Copies", number(copies), "on write", "Blocks copied because somebody else reads them"],
      ["Swapped", `${number(out)} / ${number(back)}`, "groups out / in", "Groups whose blocks were moved to host memory, and back"],
      ["Preempted", number(preemptions), lost ? `${number(lost)} tokens lost` : "groups", "Groups that had to give their blocks back; computed tokens thrown away"],
    ];
    drawTiles(this.list, tiles);
  }
}

function drawTiles(list, tiles) {
  list.replaceChildren(
    ...tiles.map(([name, value, unit, title]) =>
      element("div", { title }, element("dt", { textContent: name }), element("dd", { textContent: value }), element("small", { textContent: unit })),
    ),
  );
}

function drawLegend(list, mode, fresh = "new in this step") {
  const swatch = (className, text, style = {}) => element("li", {}, element("i", { className: `swatch ${className}`, style }), text);
  const { owners, ramp } = theme();
  const states = [swatch("cached", "cached"), swatch("free", "free"), swatch("null", "null block"), swatch("fresh", fresh)];
  const own =
    mode === "owner"
      ? [swatch("own", "one owner", { background: owners[0] }), swatch("shared", "shared", { "--one": owners[0], "--two": owners[1] })]
      : ["1", "2", "3", "4", "5–8", "9+"].map((text, i) => swatch("own", text, { background: ramp[i] }));
  list.replaceChildren(...(mode === "owner" ? [] : [element("li", { textContent: "references:" })]), ...own, ...states);
}

// Blocks of swapped groups. Where in host memory they are means nothing: a bar says whose and how many.
class HostBar {
  constructor(parts, replay, colours) {
    Object.assign(this, parts, { replay, colours });
    this.setPeak(Math.max(0, ...replay.measures.host));
  }

  // The most that it has to show.
  setPeak(peak) {
    this.peak = peak;
    this.scale = this.replay.hostBlocks <= 4 * peak ? this.replay.hostBlocks : 2 * peak;
    this.box.hidden = peak === 0;
  }

  draw() {
    if (!this.peak) return;
    const { replay } = this;
    const host = replay.measures.host[replay.at];
    const swapped = [...replay.state.present].map((n) => replay.state.requests.get(n)).filter((request) => request.host);
    const parts = swapped.map((request) => {
      const background = theme().owners[this.colours.get(request.number)];
      const style = { "flex-grow": request.host, background, color: inkOn(background) };
      return element("i", { title: `${request.id}: ${number(request.host)} blocks`, textContent: request.id, style });
    });
    this.bar.replaceChildren(...parts, element("i", { className: "rest", style: { "flex-grow": this.scale - host } }));
    this.text.textContent = `${number(host)} of ${number(replay.hostBlocks)} blocks`;
  }
}

class RequestList {
  constructor(list, counts, replay, colours, select) {
    Object.assign(this, { list, counts, replay, colours, select });
  }

  draw(selected) {
    const { replay } = this;
    const requests = [...replay.state.present].map((n) => replay.state.requests.get(n)).sort((a, b) => a.number - b.number);
    const { running, waiting, swapped } = replay.measures;
    const counts = [[running, "running"], [waiting, "waiting"], [swapped, "swapped"]].filter(([column, name]) => name !== "swapped" || column[replay.at]);
    this.counts.textContent = counts.map(([column, name]) => `${number(column[replay.at])} ${name}`).join(", ");
    this.list.replaceChildren(...requests.slice(0, 200).map((request) => this.row(request, request.number === selected)));
    if (requests.length > 200) this.list.append(element("li", { className: "more", textContent: `and ${number(requests.length - 200)} more` }));
  }

  row(request, chosen) {
    const { replay } = this;
    const sequences = replay.sequencesOf(request.number);
    const blocks = new Set(sequences.flatMap((s) => s.blocks.filter(Boolean))).size;
    const first = sequences[0];
    const tail = first ? replay.join(first.tokens.slice(Math.max(request.prompt, first.tokens.length - 24))) : "";
    const samples = sequences.length > 1 ? ` ×${sequences.length}` : "";
    const status = request.status === "finished" && request.reason ? request.reason : request.status;
    const button = element(
      "button",
      { type: "button", title: "Show its blocks; again: all", ariaPressed: String(chosen), data: { request: request.number } },
      element("i", { className: "chip", style: { background: theme().owners[this.colours.get(request.number)] } }),
      element("b", { textContent: request.id + samples }),
      element("span", { className: `status ${request.status}`, textContent: status }),
      element("span", { className: "size", textContent: first ? `${number(Math.max(...sequences.map((s) => s.tokens.length)))} tok · ${number(blocks)} blk` : "" }),
      element("q", { textContent: tail.replace(/\s+/g, " ").trim().slice(-70) }),
    );
    button.addEventListener("click", () => this.select(chosen ? null : request.number));
    return element("li", {}, button);
  }
}

const NO_BLOCKS = {
  waiting: "It waits, and holds no blocks.",
  preempted: "It was preempted: its blocks are given back, and its tokens will be computed again.",
  swapped: "Its blocks are in host memory.",
  running: "It follows another sequence of its request, and will share that one's blocks.",
  finished: "It has finished; its blocks are released.",
};

const MOST_TABS = 16;

class BlockTable {
  constructor(parts, replay, colours, hover) {
    Object.assign(this, parts, { replay, colours, hover, sample: null, request: null, kept: new Map() });
  }

  // The chosen request's, or that of the oldest one that runs.
  draw(selected) {
    const { replay } = this;
    const holder = replay.state.sequences.find((s) => s.blocks.length);
    const request = selected ?? (holder ? holder.request : null);
    if (request !== this.request) this.sample = null;
    this.request = request;
    const sequences = request === null ? [] : replay.sequencesOf(request);
    const sequence = sequences.find((s) => s.index === this.sample) || sequences.find((s) => s.blocks.length) || sequences[0];
    const about = request === null ? null : replay.state.requests.get(request);
    this.title.textContent = about ? `Block table of ${about.id}` : "Block table";
    this.samples.replaceChildren(...(sequences.length > 1 ? sequences.slice(0, MOST_TABS).map((s, i) => this.tab(s, i, s === sequence, selected)) : []));
    if (!sequence || !sequence.blocks.length) {
      this.rows.replaceChildren();
      this.note.textContent = about ? NO_BLOCKS[about.status] : "Nobody holds blocks.";
      return;
    }
    this.note.textContent = "";
    const colour = theme().owners[this.colours.get(request)];
    const { references } = replay.blocks();
    sequence.blocks.forEach((block, entry) => {
      const row = this.row(sequence, block, entry, references[block], colour);
      const there = this.rows.children[entry];
      if (!there) this.rows.append(row);
      else if (there !== row) there.replaceWith(row);
    });
    while (this.rows.children.length > sequence.blocks.length) this.rows.lastChild.remove();
  }

  // A long table changes in its last rows only: the others are kept from step to step.
  row(sequence, block, entry, references, colour) {
    const { blockSize } = this.replay;
    const logical = this.replay.logical(entry);
    const start = logical * blockSize;
    const tokens = sequence.tokens.slice(start, start + blockSize);
    const [written, placed] = [sequence.written, sequence.placed].map((n) => Math.max(0, Math.min(blockSize, n - start)));
    const looks = [block, references, colour, written, placed, ...tokens].join();
    const kept = this.kept.get(entry);
    if (kept && kept.looks === looks) return kept.row;
    const row = this.makeRow(block, logical, references, colour, this.makeSlots(start, tokens, written, placed));
    this.kept.set(entry, { looks, row });
    return row;
  }

  tab(sequence, place, chosen, selected) {
    const name = this.replay.nameOfSample(sequence, place);
    const button = element("button", { type: "button", textContent: name, ariaPressed: String(chosen), title: `Sequence ${name}` });
    button.addEventListener("click", () => {
      this.sample = sequence.index;
      this.draw(selected);
    });
    return button;
  }

  makeSlots(start, tokens, written, placed) {
    return Array.from({ length: this.replay.blockSize }, (_, slot) => {
      const state = slot < written ? "written" : slot < placed ? "reserved" : "empty";
      const known = slot < tokens.length;
      const text = known ? visible(this.replay.text(tokens[slot])) : state === "written" ? "…" : "";
      const title = known ? `token ${tokens[slot]}, position ${start + slot}, ${state}` : state === "written" ? "being computed" : "empty";
      return element("span", { className: `slot ${state}`, textContent: text || "\u00a0", title });
    });
  }

  makeRow(block, logical, references, colour, slots) {
    const physical = element("b", { textContent: String(block), style: { "border-color": colour } });
    const row = element(
      "tr",
      {},
      element("th", { textContent: String(logical) }),
      element("td", { className: "physical" }, physical, element("small", { textContent: references > 1 ? `×${references}` : "" })),
      element("td", { className: "slots", style: { "--colour": colour } }, element("div", {}, ...slots)),
    );
    row.addEventListener("mouseenter", () => this.hover(block));
    row.addEventListener("mouseleave", () => this.hover(null));
    return row;
  }
}

class Tip {
  constructor(box, replay, colours) {
    Object.assign(this, { box, replay, colours });
  }

  hide() {
    this.box.hidden = true;
  }

  show(block, x, y) {
    this.box.replaceChildren(...this.lines(block));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    this.box.style.left = `${Math.max(8, Math.min(x + 16, innerWidth - width - 8))}px`;
    this.box.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  }

  lines(block) {
    const { replay } = this;
    if (block === 0) return [element("h3", { textContent: "Block 0: the null block" }), element("p", { textContent: "Padding is written there. Nobody owns it." })];
    const holders = replay.holders(block);
    const state = holders.length ? (holders.length > 1 ? `${holders.length} references` : "1 reference") : replay.state.cached.has(block) ? "cached, no reference" : "free";
    const lines = [element("h3", { textContent: `Block ${block}` }, element("small", { textContent: state }))];
    for (const [sequence, logical] of holders.slice(0, 8)) lines.push(this.owner(sequence, `logical block ${logical}`));
    if (holders.length > 8) lines.push(element("p", { textContent: `and ${holders.length - 8} more` }));
    const content = replay.state.content[block];
    if (!holders.length && replay.state.cached.has(block) && content) lines.push(this.owner(content[0], `was logical block ${content[1]}`));
    const knowing = holders.find(([sequence]) => sequence.tokens.length); // of a parked table, no tokens are known
    const [sequence, logical] = knowing || holders[0] || (replay.state.cached.has(block) && content) || [];
    if (sequence) lines.push(this.texts(sequence, logical, !holders.length));
    return lines;
  }

  owner(sequence, where) {
    const request = this.replay.state.requests.get(sequence.request);
    const family = this.replay.sequencesOf(sequence.request);
    const place = family.indexOf(sequence);
    const sample = family.length > 1 && place >= 0 ? ` [${this.replay.nameOfSample(sequence, place)}]` : "";
    return element(
      "p",
      {},
      element("i", { className: "chip", style: { background: theme().owners[this.colours.get(sequence.request)] } }),
      `${request.id}${sample} · ${where}`,
    );
  }

  texts(sequence, logical, past) {
    const { blockSize } = this.replay;
    const start = logical * blockSize;
    const filled = past ? blockSize : Math.max(0, Math.min(blockSize, sequence.written - start));
    const slots = element("small", { textContent: `${filled} of ${blockSize} slots written` });
    if (!this.replay.tellsTokens) return element("div", { className: "texts" }, slots);
    const tokens = sequence.tokens.slice(start, start + blockSize);
    const spans = tokens.map((token) => element("span", { textContent: visible(this.replay.text(token)) }));
    return element("div", { className: "texts" }, element("div", {}, ...spans), slots);
  }
}
