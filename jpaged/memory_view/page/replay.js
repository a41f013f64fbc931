"use strict";
// The state of the pool at any step, rebuilt from the frames. delta.py says what is in a frame.

const CHECKPOINT_EVERY = 64;
const NOBODY = -2; // -1 is the number of parked tables

function running(differences) {
  let total = 0;
  return differences.map((difference) => (total += difference));
}

class Replay {
  constructor(recording) {
    this.title = recording.title;
    this.numBlocks = recording.numBlocks;
    this.blockSize = recording.blockSize;
    this.hostBlocks = recording.hostBlocks;
    this.frames = recording.frames;
    this.length = recording.frames.length;
    this.vocabulary = recording.vocabulary;
    this.hasTexts = Object.keys(recording.vocabulary).length > 0;
    this.milliseconds = running(recording.milliseconds);
    this.measures = {};
    for (const [name, column] of Object.entries(recording.measures)) this.measures[name] = running(column);
    this.checkpoints = [];
    this.state = {
      requests: new Map(), // number -> {number, id, status, reason, prompt, hits, preemptions}; past ones too
      present: new Set(), // numbers of the requests that are not forgotten
      sequences: [], // by (request, index)
      past: new Map(), // "request.index" -> sequence, of those that have left
      cached: new Set(),
      content: new Array(this.numBlocks).fill(null), // block -> [sequence, logical index] that it last belonged to
      counters: [0, 0, 0, 0, 0, 0, 0],
    };
    this.at = -1;
    this.fresh = new Set(); // blocks that entered a table in this step
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
      if (step === this.at && step > 0) this.fresh = this.freshOf(step);
    }
    while (this.at < step) {
      this.fresh = new Set();
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

  apply(frame) {
    const state = this.state;
    for (const number of frame.forgotten || []) state.present.delete(number);
    for (const [number, id, status, reason, prompt, hits, preemptions, host] of frame.requests || []) {
      state.requests.set(number, { number, id: nameOf(id), status, reason, prompt, hits, preemptions, host });
      state.present.add(number);
    }
    this.applyMembers(frame);
    this.applyTables(frame);
    for (const block of frame.cached || []) {
      if (!state.cached.delete(block)) state.cached.add(block);
    }
    if (frame.counters) state.counters = frame.counters;
  }

  applyMembers(frame) {
    const state = this.state;
    const left = new Set(frame.left || []);
    if (left.size) {
      for (const place of left) state.past.set(keyOf(state.sequences[place]), state.sequences[place]);
      state.sequences = state.sequences.filter((_, place) => !left.has(place));
    }
    const joined = frame.joined || [];
    for (let i = 0; i < joined.length; i += 2) {
      const sequence = { request: joined[i], index: joined[i + 1], tokens: [], blocks: [], written: 0, placed: 0 };
      state.past.delete(keyOf(sequence));
      state.sequences.push(sequence);
    }
    if (joined.length) state.sequences.sort((a, b) => a.request - b.request || a.index - b.index);
  }

  applyTables(frame) {
    const sequences = this.state.sequences;
    const before = sequences.map((s) => [s.tokens.length, s.blocks.length]);
    const next = frame.next || [];
    let holder = 0;
    sequences.forEach((sequence) => {
      if (!sequence.blocks.length || holder >= next.length) return;
      const token = next[holder++];
      if (token >= 0) sequence.tokens.push(token);
    });
    for (const [place, kept, ...rest] of frame.tokens || []) {
      sequences[place].tokens = sequences[place].tokens.slice(0, kept).concat(rest);
    }
    const grown = frame.grown || [];
    for (let i = 0; i < grown.length; i += 2) this.extend(sequences[grown[i]], [grown[i + 1]]);
    for (const [place, kept, ...rest] of frame.blocks || []) {
      sequences[place].blocks.length = kept;
      this.extend(sequences[place], rest);
    }
    const written = pairs(frame.written);
    const placed = pairs(frame.placed);
    sequences.forEach((sequence, place) => {
      const [tokens, blocks] = before[place];
      if (!sequence.blocks.length) sequence.written = sequence.placed = 0;
      else {
        sequence.written += sequence.tokens.length - tokens;
        if (written.has(place)) sequence.written = written.get(place);
        sequence.placed = blocks ? Math.max(sequence.written, sequence.placed) : sequence.tokens.length;
      }
      if (written.has(place)) sequence.written = written.get(place);
      if (placed.has(place)) sequence.placed = placed.get(place);
    });
  }

  extend(sequence, blocks) {
    for (const block of blocks) {
      this.state.content[block] = [sequence, sequence.blocks.length];
      this.fresh.add(block);
      sequence.blocks.push(block);
    }
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

  text(token) {
    const text = this.vocabulary[token];
    return text === undefined ? String(token) : text;
  }

  join(tokens) {
    return tokens.map((token) => this.text(token)).join(this.hasTexts ? "" : " ");
  }

  sequencesOf(number) {
    return this.byRequest().get(number) || [];
  }

  // Parked tables, which have no request, have no samples either: their indices are no more than keys.
  nameOfSample(sequence, place) {
    return String(sequence.request < 0 ? place : sequence.index);
  }

  byRequest() {
    if (this.groupsOf !== this.at) {
      this.groups = Map.groupBy(this.state.sequences, (sequence) => sequence.request);
      this.groupsOf = this.at;
    }
    return this.groups;
  }

  // Of every block: references, written and placed slots, and the requests that own it.
  blocks() {
    if (this.view && this.viewOf === this.at) return this.view;
    [this.view, this.viewOf] = [this.countBlocks(), this.at];
    return this.view;
  }

  countBlocks() {
    const { numBlocks, blockSize } = this;
    const view = {
      references: new Uint16Array(numBlocks),
      written: new Uint16Array(numBlocks),
      placed: new Uint16Array(numBlocks),
      owner: new Int32Array(numBlocks).fill(NOBODY),
      owners: new Map(), // only where there are several requests
    };
    for (const sequence of this.state.sequences) {
      sequence.blocks.forEach((block, logical) => {
        const start = logical * blockSize;
        view.references[block]++;
        view.written[block] = Math.max(view.written[block], Math.min(blockSize, sequence.written - start));
        view.placed[block] = Math.max(view.placed[block], Math.min(blockSize, sequence.placed - start));
        const owner = view.owner[block];
        if (owner === NOBODY) view.owner[block] = sequence.request;
        else if (owner !== sequence.request) {
          const owners = view.owners.get(block) || [owner];
          if (!owners.includes(sequence.request)) view.owners.set(block, [...owners, sequence.request]);
        }
      });
    }
    return view;
  }

  holders(block) {
    const found = [];
    for (const sequence of this.state.sequences) {
      sequence.blocks.forEach((one, logical) => one === block && found.push([sequence, logical]));
    }
    return found;
  }
}

// A bare number says little as a name.
function nameOf(id) {
  return /^\d+$/.test(id) ? `request ${id}` : id;
}

function keyOf(sequence) {
  return `${sequence.request}.${sequence.index}`;
}

function pairs(flat = []) {
  const map = new Map();
  for (let i = 0; i < flat.length; i += 2) map.set(flat[i], flat[i + 1]);
  return map;
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
