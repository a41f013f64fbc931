"use strict";
// The pool at any step of a recording.

const CHECKPOINT_EVERY = 64;

function running(differences) {
  let total = 0;
  return differences.map((difference) => (total += difference));
}

class Replay extends Pool {
  constructor(recording) {
    super(recording);
    this.frames = recording.frames;
    this.length = recording.frames.length;
    this.vocabulary = recording.vocabulary;
    this.hasTexts = Object.keys(recording.vocabulary).length > 0;
    this.milliseconds = running(recording.milliseconds);
    this.measures = {};
    for (const [name, column] of Object.entries(recording.measures)) this.measures[name] = running(column);
    this.checkpoints = [];
    this.at = -1;
    this.indexEvents();
    this.seek(0);
  }

  seek(step) {
    step = Math.max(0, Math.min(this.length - 1, step));
    const nearest = Math.min(Math.floor(step / CHECKPOINT_EVERY), this.checkpoints.length - 1);
    if (step < this.at || nearest * CHECKPOINT_EVERY > this.at) {
      this.state = copyState(this.checkpoints[nearest]);
      this.at = nearest * CHECKPOINT_EVERY;
      this.fresh = new Set();
      this.version++;
      if (step === this.at && step > 0) this.fresh = this.freshOf(step);
    }
    while (this.at < step) {
      this.apply(this.frames[++this.at]);
      if (this.at === this.checkpoints.length * CHECKPOINT_EVERY) this.checkpoints.push(copyState(this.state));
    }
  }

  // A checkpoint does not say what its own frame changed: the frame does.
  freshOf(step) {
    const fresh = new Set();
    const frame = this.frames[step];
    for (let i = 1; i < (frame.grown || []).length; i += 2) fresh.add(frame.grown[i]);
    for (const change of frame.blocks || []) for (const block of change.slice(2)) fresh.add(block);
    return fresh;
  }

  // What happened, read off the frames once: marks for the timeline and a line of text for each step.
  indexEvents() {
    this.events = new Map(); // step -> [[kind, text], ...]
    const requests = new Map();
    let counters = [0, 0, 0, 0, 0, 0, 0];
    this.frames.forEach((frame, step) => {
      const events = [];
      for (const [number, rawId, status, reason, , hits] of frame.requests || []) {
        const id = nameOf(rawId);
        const before = requests.get(number);
        requests.set(number, status);
        if (status === before) continue;
        if (status === "waiting") events.push(["arrive", `${id} arrives`]);
        if (status === "running" && before === "swapped") events.push(["swap", `${id} swapped in`]);
        else if (status === "running") events.push(["admit", `${id} admitted${hits ? `, ${hits} tokens from the cache` : ""}`]);
        if (status === "preempted") events.push(["preempt", `${id} preempted`]);
        if (status === "swapped") events.push(["swap", `${id} swapped out`]);
        if (status === "finished") events.push(["finish", `${id} finished${reason ? ` (${reason})` : ""}`]);
      }
      const now = frame.counters || counters;
      const more = now.map((value, i) => value - counters[i]);
      if (more[4] > 0) events.push(["copy", `${more[4]} block${more[4] > 1 ? "s" : ""} copied on write`]);
      counters = now;
      if (events.length) this.events.set(step, events);
    });
  }
}

function copyState(state) {
  const copies = new Map(); // content refers to sequences, and must refer to the copies
  const copy = (sequence) => {
    copies.set(sequence, { ...sequence, tokens: sequence.tokens.slice(), blocks: sequence.blocks.slice() });
    return copies.get(sequence);
  };
  const sequences = state.sequences.map(copy);
  return {
    requests: new Map(state.requests),
    present: new Set(state.present),
    sequences,
    past: new Map(state.past), // those that have left don't change
    cached: new Set(state.cached),
    content: state.content.map((entry) => entry && [copies.get(entry[0]) || entry[0], entry[1]]),
    counters: state.counters,
  };
}
