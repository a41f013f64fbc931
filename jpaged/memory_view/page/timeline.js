"use strict";
// The strip under the map: blocks by state over all steps, marks for what happened, and the playhead.

const MARKS = { preempt: "▼", swap: "◆", copy: "●" };

function markColours() {
  const { alarm, accent, muted } = theme();
  return { preempt: alarm, swap: accent, copy: muted };
}

class Timeline {
  constructor(canvas, replay) {
    this.canvas = canvas;
    this.replay = replay;
    const { used, cached } = replay.measures;
    const peak = used.reduce((most, count, step) => Math.max(most, count + cached[step]), 1);
    const all = replay.numBlocks - 1;
    this.total = peak > all / 2 ? all : peak; // a pool that stays nearly empty is drawn to the scale of its use
  }

  // Steps that fall on one pixel are drawn as the fullest of them.
  draw() {
    const { context, width, height } = fit(this.canvas);
    const { replay } = this;
    const total = this.total;
    const top = 14; // room for the marks
    const { private: own, shared, cachedArea, ink, line, muted } = theme();
    const { measures } = replay;
    const columns = Math.min(Math.ceil(width), replay.length);
    const area = (height - top - 1) / total;
    for (let column = 0; column < columns; column++) {
      const first = Math.floor((column * replay.length) / columns);
      const end = Math.max(first + 1, Math.floor(((column + 1) * replay.length) / columns));
      let step = first;
      for (let i = first; i < end; i++) if (measures.used[i] > measures.used[step]) step = i;
      const left = Math.round((column * width) / columns);
      const right = Math.round(((column + 1) * width) / columns);
      let base = height - 1;
      for (const [count, colour] of [
        [measures.shared[step], shared],
        [measures.used[step] - measures.shared[step], own],
        [measures.cached[step], cachedArea],
      ]) {
        context.fillStyle = colour;
        context.fillRect(left, base - count * area, right - left, count * area);
        base -= count * area;
      }
    }
    context.strokeStyle = line;
    context.lineWidth = 1;
    context.strokeRect(0.5, top + 0.5, width - 1, height - top - 1);
    this.drawMarks(context, width);
    context.fillStyle = muted;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "top";
    context.fillText(`${number(total)} blocks`, 6, top + 5);
    const x = this.x(replay.at, width);
    context.strokeStyle = context.fillStyle = ink;
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(x, top - 4);
    context.lineTo(x, height);
    context.stroke();
    context.beginPath();
    context.arc(x, top - 4, 4, 0, 7);
    context.fill();
  }

  drawMarks(context, width) {
    const colours = markColours();
    context.font = "8px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const taken = {};
    for (const [step, events] of this.replay.events) {
      for (const [kind] of events) {
        const x = this.x(step, width);
        if (!MARKS[kind] || x - (taken[kind] ?? -9) < 5) continue;
        taken[kind] = x;
        context.fillStyle = colours[kind];
        context.fillText(MARKS[kind], x, 6);
      }
    }
  }

  // Where the thumb of a range input over the strip has its middle is not our business: main.js maps the pointer itself.
  x(step, width) {
    return ((step + 0.5) * width) / this.replay.length;
  }

  stepAt(x) {
    const { width } = this.canvas.getBoundingClientRect();
    return Math.max(0, Math.min(this.replay.length - 1, Math.floor((x / width) * this.replay.length)));
  }
}
