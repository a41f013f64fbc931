"use strict";
// Puts the parts together: the step, the selection, the controls.

const SPEEDS = [1, 2, 5, 10, 20, 50, 100, 300]; // steps a second
const $ = (id) => document.getElementById(id);

class Page {
  constructor(recording) {
    this.replay = new Replay(recording);
    const colours = (this.colours = assignColours(this.replay));
    this.selected = null;
    this.playing = false;
    this.pointedAt = null; // [block, x, y]
    this.map = new BlockMap($("map"), this.replay, colours);
    this.timeline = new Timeline($("timeline"), this.replay);
    this.counters = new Counters($("counters"), this.replay);
    const host = { box: $("host"), bar: $("host-bar"), text: $("host-text") };
    this.host = new HostBar(host, this.replay, colours);
    this.requests = new RequestList($("request-list"), $("request-counts"), this.replay, colours, (n) => this.select(n));
    const parts = { title: $("table-title"), samples: $("samples"), rows: $("table-rows"), note: $("table-note") };
    this.table = new BlockTable(parts, this.replay, colours, (block) => this.hover(block));
    this.tip = new Tip($("tip"), this.replay, colours);
    $("title").textContent = this.replay.title || "KV pool";
    document.title = `KV pool: ${this.replay.title || "replay"}`;
    $("shape").textContent = `KV pool of ${number(this.replay.numBlocks - 1)} blocks × ${this.replay.blockSize} tokens`;
    $("slider").max = this.replay.length - 1;
    $("speed").append(...SPEEDS.map((s) => element("option", { value: s, textContent: `${s} step${s > 1 ? "s" : ""}/s` })));
    this.speed = this.replay.length > 1000 ? 50 : this.replay.length > 200 ? 20 : 5;
    this.listen();
    this.setMode("owner");
  }

  listen() {
    $("first").onclick = () => this.seek(0);
    $("back").onclick = () => this.seek(this.replay.at - 1);
    $("forward").onclick = () => this.seek(this.replay.at + 1);
    $("last").onclick = () => this.seek(this.replay.length - 1);
    $("play").onclick = () => this.toggle();
    $("speed").onchange = (event) => (this.speed = Number(event.target.value));
    $("slider").oninput = (event) => this.seek(Number(event.target.value));
    for (const button of $("modes").children) button.onclick = () => this.setMode(button.dataset.mode);
    this.listenToPointer();
    addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe($("canvas-box"));
    darkQuery.addEventListener("change", () => this.setMode(this.map.mode));
  }

  listenToPointer() {
    const canvas = $("map");
    const blockAt = (event) => {
      const box = canvas.getBoundingClientRect();
      return this.map.blockAt(event.clientX - box.left, event.clientY - box.top);
    };
    canvas.onmousemove = (event) => {
      const block = blockAt(event);
      this.hover(block);
      this.pointedAt = block === null ? null : [block, event.clientX, event.clientY];
      this.drawTip();
    };
    canvas.onmouseleave = () => {
      this.hover(null);
      this.pointedAt = null;
      this.drawTip();
    };
    canvas.onclick = (event) => {
      const block = blockAt(event);
      const owners = block === null ? [] : this.replay.holders(block).map(([sequence]) => sequence.request);
      // Clicked again, a shared block shows its next owner; after the last one, nobody.
      this.select(owners.length ? (owners.filter((n) => n > (this.selected ?? -Infinity))[0] ?? null) : null);
    };
    const strip = $("slider");
    const drag = (event) => this.seek(this.timeline.stepAt(event.clientX - strip.getBoundingClientRect().left));
    strip.onpointerdown = (event) => {
      event.preventDefault(); // the thumb of the input would not meet the playhead
      strip.focus();
      strip.setPointerCapture(event.pointerId);
      drag(event);
    };
    strip.onpointermove = (event) => event.buttons & 1 && drag(event);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const far = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowLeft: () => this.seek(this.replay.at - far),
      ArrowRight: () => this.seek(this.replay.at + far),
      PageUp: () => this.seek(this.replay.at - 50),
      PageDown: () => this.seek(this.replay.at + 50),
      Home: () => this.seek(0),
      End: () => this.seek(this.replay.length - 1),
      " ": () => this.toggle(),
      Escape: () => this.select(null),
      c: () => this.setMode(this.map.mode === "owner" ? "references" : "owner"),
      "+": () => this.faster(1),
      "=": () => this.faster(1),
      "-": () => this.faster(-1),
    };
    const action = actions[event.key];
    if (!action || (event.key === " " && event.target.tagName === "BUTTON" && event.target.id !== "play")) return;
    event.preventDefault();
    action();
  }

  get speed() {
    return this.stepsPerSecond;
  }

  set speed(value) {
    this.stepsPerSecond = value;
    $("speed").value = value;
  }

  faster(by) {
    const place = SPEEDS.indexOf(this.speed) + by;
    if (SPEEDS[place]) this.speed = SPEEDS[place];
  }

  toggle(on = !this.playing) {
    this.playing = on;
    $("play").textContent = on ? "❚❚" : "▶";
    $("play").ariaLabel = on ? "Pause" : "Play";
    if (!on) return;
    if (this.replay.at === this.replay.length - 1) this.show(0);
    let [last, owed] = [performance.now(), 0];
    const tick = (now) => {
      if (!this.playing) return;
      owed += ((now - last) * this.speed) / 1000;
      last = now;
      if (owed >= 1) {
        this.show(this.replay.at + Math.floor(owed));
        owed %= 1;
      }
      if (this.replay.at === this.replay.length - 1) this.toggle(false);
      else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  // By hand: whoever moves the playhead wants it to stay there.
  seek(step) {
    if (this.playing) this.toggle(false);
    this.show(step);
  }

  show(step) {
    this.replay.seek(step);
    this.draw();
  }

  select(number) {
    this.selected = this.map.selected = number;
    this.draw();
  }

  drawTip() {
    if (this.pointedAt) this.tip.show(...this.pointedAt);
    else this.tip.hide();
  }

  hover(block) {
    if (block === this.map.hovered) return;
    this.map.hovered = block;
    this.map.draw();
  }

  setMode(mode) {
    this.map.mode = mode;
    for (const button of $("modes").children) button.ariaChecked = String(button.dataset.mode === mode);
    drawLegend($("legend"), mode);
    drawAreas($("areas"), this.replay);
    this.draw();
  }

  draw() {
    const { replay } = this;
    this.map.draw();
    this.timeline.draw();
    this.counters.draw();
    this.host.draw();
    this.drawTip();
    this.requests.draw(this.selected);
    this.table.draw(this.selected);
    $("slider").value = replay.at;
    $("slider").ariaValueText = `step ${replay.at} of ${replay.length - 1}`;
    $("position").textContent = `step ${number(replay.at)} / ${number(replay.length - 1)}  ·  ${(replay.milliseconds[replay.at] / 1000).toFixed(2)} s`;
    const events = (replay.events.get(replay.at) || []).map(([kind, text]) => element("span", { className: kind, textContent: text }));
    $("events").replaceChildren(...events);
  }
}

function drawAreas(list, replay) {
  const { private: own, shared, cachedArea, line } = theme();
  const areas = [["shared", shared], ["one owner", own], ["cached", cachedArea], ["free", "transparent"]];
  const happened = new Set([...replay.events.values()].flat().map(([kind]) => kind));
  const marks = [["copy", "copy on write"], ["swap", "swap"], ["preempt", "preemption"]].filter(([kind]) => happened.has(kind));
  list.replaceChildren(
    ...areas.map(([text, colour]) => {
      const style = { background: colour, "border-color": colour === "transparent" ? line : colour };
      return element("li", {}, element("i", { style }), text);
    }),
    ...marks.map(([kind, text]) => element("li", {}, element("b", { textContent: MARKS[kind], style: { color: markColours()[kind] } }), text)),
  );
}

const page = new Page(JSON.parse($("recording").textContent));
page.toggle(false);
