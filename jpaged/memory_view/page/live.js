"use strict";
// Asks the server for what has changed, and shows it. Nothing else is asked for, and nothing is sent but a cursor.

const EVERY = 500; // milliseconds between an answer and the next question
const PATIENCE = 5; // seconds without an answer before that is shown
const SPAN = 180; // seconds of the charts
const KEPT = 4 * SPAN; // moments
const $ = (id) => document.getElementById(id);

class LivePool extends Pool {
  constructor(shape) {
    super(shape);
    this.tellsTokens = false;
    this.history = []; // moments: {time, rates, measures}
    this.colours = new Colours();
  }

  // The columns that the host bar reads, of which now is the last.
  get measures() {
    return { host: this.history.map((moment) => moment.measures.host) };
  }

  get at() {
    return this.history.length - 1;
  }

  take(answer) {
    if (answer.reset) {
      this.reset();
      this.colours = Object.assign(this.colours, new Colours());
    }
    const fresh = new Set();
    for (const frame of answer.frames) {
      this.apply(frame);
      this.colours.take(frame);
      for (const block of this.fresh) fresh.add(block);
    }
    this.fresh = answer.reset ? new Set() : fresh;
    this.history.push({ time: answer.now / 1000, rates: answer.rates, measures: answer.measures });
    if (this.history.length > KEPT) this.history.shift();
    this.forget();
  }

  // A page may be left open for weeks: of past requests, only those stay whose cached blocks can be pointed at.
  forget() {
    const { state } = this;
    state.past.clear();
    if (state.requests.size < 2 * state.present.size + 1000) return;
    const named = new Set(state.content.map((entry) => entry && entry[0].request));
    for (const number of state.requests.keys()) {
      if (state.present.has(number) || named.has(number)) continue;
      state.requests.delete(number);
      this.colours.chosen.delete(number);
    }
  }
}

class Live {
  constructor() {
    this.cursor = "";
    this.pool = null;
    this.selected = null;
    this.paused = false;
    this.pointedAt = null;
    this.answered = performance.now();
    $("pause").onclick = () => this.pause();
    for (const button of $("modes").children) button.onclick = () => this.setMode(button.dataset.mode);
    addEventListener("keydown", (event) => this.key(event));
    this.pause(false);
    setInterval(() => this.tell(), 1000);
    this.poll();
  }

  async poll() {
    try {
      if (!this.paused && !document.hidden) await this.ask();
    } catch (error) {
      this.problem = String(error.message || error);
    }
    this.tell();
    setTimeout(() => this.poll(), EVERY);
  }

  async ask() {
    const state = new URL(location.href.replace(/[?#].*$/, "").replace(/\/$/, "") + "/state");
    state.searchParams.set("cursor", this.cursor);
    const response = await fetch(state, { cache: "no-store" });
    if (!response.ok) throw new Error((await response.json()).error.message);
    this.take(await response.json());
  }

  take(answer) {
    this.answered = performance.now();
    this.problem = null;
    this.cursor = answer.cursor;
    this.answer = answer;
    if (!this.pool || this.pool.numBlocks !== answer.pool.num_blocks) this.begin(answer);
    this.pool.take(answer);
    if (!this.pool.state.present.has(this.selected)) this.select(null);
    this.draw();
  }

  begin(answer) {
    const { num_blocks: numBlocks, block_size: blockSize, host_blocks: hostBlocks, layer_groups: layerGroups } = answer.pool;
    const pool = (this.pool = new LivePool({ title: answer.title, numBlocks, blockSize, hostBlocks, layerGroups }));
    this.map = new BlockMap($("map"), pool, pool.colours);
    this.host = new HostBar({ box: $("host"), bar: $("host-bar"), text: $("host-text") }, pool, pool.colours);
    this.tip = new Tip($("tip"), pool, pool.colours);
    const parts = { counts: $("request-counts"), rows: $("request-rows"), note: $("request-note") };
    this.requests = new RequestTable(parts, pool, pool.colours, (number) => this.choose(number));
    $("charts").replaceChildren();
    this.charts = chartsOf($("charts"), numBlocks);
    $("title").textContent = answer.title;
    document.title = `jpaged: ${answer.title}`;
    $("shape").textContent = `KV pool of ${number(numBlocks - 1)} blocks × ${blockSize} tokens, ${number(answer.rows)} sequences at once`;
    this.listen();
    this.setMode("owner");
  }

  listen() {
    const canvas = $("map");
    const blockAt = (event) => {
      const box = canvas.getBoundingClientRect();
      return this.map.blockAt(event.clientX - box.left, event.clientY - box.top);
    };
    canvas.onmousemove = (event) => {
      const block = blockAt(event);
      this.map.hovered = block;
      this.pointedAt = block === null ? null : [block, event.clientX, event.clientY];
      this.drawMap();
    };
    canvas.onmouseleave = () => {
      this.map.hovered = this.pointedAt = null;
      this.drawMap();
    };
    canvas.onclick = (event) => {
      const block = blockAt(event);
      const owners = block === null ? [] : this.pool.holders(block).map(([sequence]) => sequence.request);
      this.choose(owners.filter((n) => n > (this.selected ?? -Infinity))[0] ?? null);
    };
    new ResizeObserver(() => this.draw()).observe($("canvas-box"));
    darkQuery.addEventListener("change", () => this.setMode(this.map.mode));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.map) return;
    const actions = {
      " ": () => this.pause(),
      c: () => this.setMode(this.map.mode === "owner" ? "references" : "owner"),
      Escape: () => this.choose(null),
    };
    if (!actions[event.key] || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    actions[event.key]();
  }

  pause(on = !this.paused) {
    this.paused = on;
    $("pause").textContent = on ? "▶ Go on" : "❚❚ Pause";
    this.tell();
  }

  choose(number) {
    this.select(number);
    this.draw();
  }

  select(number) {
    this.selected = this.map.selected = number;
  }

  setMode(mode) {
    this.map.mode = mode;
    for (const button of $("modes").children) button.ariaChecked = String(button.dataset.mode === mode);
    drawLegend($("legend"), mode, "new");
    this.draw();
  }

  draw() {
    const { pool, answer } = this;
    if (!pool.history.length) return;
    this.drawMap();
    this.host.setPeak(Math.max(...pool.measures.host));
    this.host.draw();
    drawTiles($("counters"), tilesOf({ ...answer, counters: pool.state.counters, numBlocks: pool.numBlocks }));
    this.requests.draw(this.selected, answer.measures, answer.now);
    for (const chart of this.charts) chart.draw(pool.history, SPAN);
  }

  drawMap() {
    this.map.draw();
    if (this.pointedAt) this.tip.show(...this.pointedAt);
    else this.tip.hide();
  }

  tell() {
    const silent = (performance.now() - this.answered) / 1000;
    const [lamp, text] = this.paused
      ? ["", "paused"]
      : this.problem
        ? ["gone", this.problem]
        : silent > PATIENCE
          ? ["gone", `no answer for ${Math.round(silent)} s`]
          : this.answer
            ? ["live", `up ${seconds(this.answer.uptime)}`]
            : ["", "connecting"];
    $("lamp").className = lamp;
    $("state").textContent = text;
  }
}

const page = new Live();
