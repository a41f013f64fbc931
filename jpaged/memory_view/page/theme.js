"use strict";
// Colours. Owners: the eight of Okabe and Ito, or nearly, which the common kinds of colour blindness tell apart;
// references: a ramp of lightness. Neither is ever the only sign: blocks have numbers, sharing a count, states a shape.

const THEMES = {
  light: {
    paper: "#ffffff", ink: "#15191e", muted: "#6a7380", line: "#d8dce2", faint: "#eceef1", cached: "#8d97a3",
    accent: "#0b5fa5", private: "#9fb4c9", shared: "#0b4f8a", cachedArea: "#d9dde3", alarm: "#c4480b",
    owners: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#50565f", "#ddcb12"],
    ramp: ["#cfdceb", "#92bfe0", "#4d97cf", "#1f6bb0", "#0d4380", "#041c40"],
  },
  dark: {
    paper: "#151a20", ink: "#e8ebef", muted: "#8f99a6", line: "#323a45", faint: "#20262e", cached: "#6b7684",
    accent: "#6cb8f2", private: "#4d6076", shared: "#6cb8f2", cachedArea: "#2b323b", alarm: "#ff8a4c",
    owners: ["#3d97dd", "#f2b134", "#22b98c", "#e096bf", "#8bd0f7", "#f3803a", "#c3c9d1", "#f4e65a"],
    ramp: ["#34485e", "#3d6c9c", "#4b94d0", "#7cbcee", "#b3dbfa", "#e9f5ff"],
  },
};
const darkQuery = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  return THEMES[darkQuery.matches ? "dark" : "light"];
}

// Each request has a colour from its first frame on: of the eight, the one that the fewest around it have.
class Colours {
  constructor() {
    this.chosen = new Map(); // number -> which of the eight; past ones too
    this.alive = new Set();
  }

  take(frame) {
    const count = THEMES.light.owners.length;
    for (const number of frame.forgotten || []) this.alive.delete(number);
    for (const [number] of frame.requests || []) {
      if (this.chosen.has(number)) continue;
      const uses = new Array(count).fill(0);
      for (const other of this.alive) uses[this.chosen.get(other)]++;
      const least = Math.min(...uses);
      let choice = (number + count) % count; // parked tables have number -1
      while (uses[choice] > least) choice = (choice + 1) % count;
      this.chosen.set(number, choice);
      this.alive.add(number);
    }
  }

  get(number) {
    return this.chosen.get(number);
  }
}

function assignColours(replay) {
  const colours = new Colours();
  for (const frame of replay.frames) colours.take(frame);
  return colours;
}

function rampColour(references) {
  const ramp = theme().ramp;
  const steps = [1, 2, 3, 4, 8, Infinity]; // 1, 2, 3, 4, 5-8, more
  return ramp[steps.findIndex((limit) => references <= limit)];
}

// A canvas in device pixels; returns its context and size in CSS pixels.
function fit(canvas) {
  const { width, height } = canvas.parentElement.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// Black or white, whichever is read more easily on a colour.
function inkOn(hex) {
  const [r, g, b] = rgb(hex).map((value) => (value / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#101418" : "#ffffff";
}

function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}
