"use strict";
// The state of the pool, changed by frames. delta.py says what is in a frame. Its children know where frames come from.

const NOBODY = -2; // -1 is the number of parked tables

class Pool {
  constructor({ title, numBlocks, blockSize, hostBlocks, layerGroups }) {
    Object.assign(this, { title, numBlocks, blockSize, hostBlocks, layerGroups });
    this.vocabulary = {};
    this.hasTexts = false;
    this.tellsTokens = true; // or only how many there are
    this.version = 0; // of the state: whoever changes it counts it up
    this.reset();
  }

  reset() {
    this.version++;
    this.fresh = new Set(); // blocks that entered a table in the last frame
    this.state = {
      requests: new Map(), // number -> {number, id, status, reason, prompt, hits, preemptions, ...}; past ones too
      present: new Set(), // numbers of the requests that are not forgotten
      sequences: [], // by (request, index)
      past: new Map(), // "request.index" -> sequence, of those that have left
      cached: new Set(),
      content: new Array(this.numBlocks).fill(null), // block -> [sequence, logical index] that it last belonged to
      counters: [0, 0, 0, 0, 0, 0, 0],
    };
  }

  apply(frame) {
    const state = this.state;
    this.version++;
    this.fresh = new Set();
    for (const number of frame.forgotten || []) state.present.delete(number);
    for (const [number, id, status, reason, prompt, hits, preemptions, host, arrived, waited] of frame.requests || []) {
      state.requests.set(number, { number, id: nameOf(id), status, reason, prompt, hits, preemptions, host, arrived, waited });
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
    for (const [place, length] of pairs(frame.lengths)) sequences[place].tokens = { length };
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
      this.state.content[block] = [sequence, this.logical(sequence.blocks.length)];
      this.fresh.add(block);
      sequence.blocks.push(block);
    }
  }

  // A table has an entry for each group of layers, side by side: which logical block an entry belongs to.
  logical(entry) {
    return Math.floor(entry / this.layerGroups);
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
    if (this.groupsOf !== this.version) {
      this.groups = Map.groupBy(this.state.sequences, (sequence) => sequence.request);
      this.groupsOf = this.version;
    }
    return this.groups;
  }

  // Of every block: references, written and placed slots, and the requests that own it.
  blocks() {
    if (this.view && this.viewOf === this.version) return this.view;
    [this.view, this.viewOf] = [this.countBlocks(), this.version];
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
      sequence.blocks.forEach((block, entry) => {
        if (!block) return; // the null block: a window has left what was there
        const start = this.logical(entry) * blockSize;
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
      sequence.blocks.forEach((one, entry) => one === block && found.push([sequence, this.logical(entry)]));
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
