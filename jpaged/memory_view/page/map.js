"use strict";
// The block map. A block is a tile of its slots; when blocks are many, a plain square; when very many, a pixel.

const TILE_FROM = 30; // CSS pixels of a cell from which on its slots are drawn
const SQUARE_FROM = 4; // and from which on it is a square of its own
const LABEL_FROM = 40;

class BlockMap {
  constructor(canvas, replay, colours) {
    this.canvas = canvas;
    this.replay = replay;
    this.colours = colours;
    this.mode = "owner";
    this.selected = null; // request number
    this.hovered = null; // block
  }

  layout(width, height) {
    const count = this.replay.numBlocks;
    let cell = Math.min(96, Math.floor(Math.sqrt((width * height) / count)) + 2);
    while (cell > 2 && Math.ceil(count / Math.floor(width / cell)) * cell > height) cell--;
    if (cell <= 2) cell = Math.sqrt((width * height) / count) * 0.985;
    this.cell = cell;
    this.columns = Math.max(1, Math.floor(width / cell));
    this.gap = cell >= TILE_FROM ? 5 : cell >= 10 ? 2 : cell >= SQUARE_FROM ? 1 : 0;
  }

  place(block) {
    return [(block % this.columns) * this.cell, Math.floor(block / this.columns) * this.cell];
  }

  blockAt(x, y) {
    const column = Math.floor(x / this.cell);
    const block = Math.floor(y / this.cell) * this.columns + column;
    return column < this.columns && block >= 0 && block < this.replay.numBlocks ? block : null;
  }

  draw() {
    const { context, width, height } = fit(this.canvas);
    this.layout(width, height);
    this.view = this.replay.blocks();
    this.mine = this.selected === null ? null : this.blocksOf(this.selected);
    if (this.cell < SQUARE_FROM) this.drawPixels(context);
    else for (let block = 0; block < this.replay.numBlocks; block++) this.drawBlock(context, block);
    if (this.hovered !== null) this.outline(context, this.hovered, theme().ink, 2);
  }

  blocksOf(number) {
    return new Set(this.replay.sequencesOf(number).flatMap((sequence) => sequence.blocks.filter(Boolean)));
  }

  stateOf(block) {
    if (block === 0) return "null";
    if (this.view.references[block]) return "used";
    return this.replay.state.cached.has(block) ? "cached" : "free";
  }

  coloursOf(block) {
    if (this.mode === "references") return [rampColour(this.view.references[block])];
    const owners = this.view.owners.get(block) || [this.view.owner[block]];
    return owners.slice(0, 4).map((number) => theme().owners[this.colours.get(number)]);
  }

  drawBlock(context, block) {
    const [x, y] = this.place(block);
    const state = this.stateOf(block);
    const size = this.cell - this.gap;
    context.globalAlpha = this.mine && !this.mine.has(block) ? 0.22 : 1;
    if (this.cell >= TILE_FROM) this.drawTile(context, block, state, x, y, size);
    else this.drawSquare(context, block, state, x, y, size);
    context.globalAlpha = 1;
  }

  drawSquare(context, block, state, x, y, size) {
    const { line, faint, muted, ink } = theme();
    if (state === "used") {
      const colours = this.coloursOf(block);
      colours.forEach((colour, i) => {
        context.fillStyle = colour;
        context.fillRect(x + (size * i) / colours.length, y, size / colours.length, size);
      });
      if (this.view.references[block] > 1 && size >= 6 && this.mode === "owner") {
        const dot = Math.max(2, Math.round(size / 3));
        context.fillStyle = ink;
        context.fillRect(x + (size - dot) / 2, y + (size - dot) / 2, dot, dot);
      }
    } else if (state === "cached") {
      if (size < 5) {
        context.fillStyle = line;
        context.fillRect(x, y, size, size);
      } else {
        context.strokeStyle = line;
        context.lineWidth = 1;
        context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
        context.beginPath();
        context.moveTo(x + 0.5, y + size - 0.5);
        context.lineTo(x + size - 0.5, y + 0.5);
        context.stroke();
      }
    } else {
      context.fillStyle = state === "null" && size < 8 ? ink : faint;
      context.fillRect(x, y, size, size);
      if (state === "null" && size >= 8) this.cross(context, x, y, size, muted);
    }
  }

  drawTile(context, block, state, x, y, size) {
    const { line, cached, muted, ink, faint } = theme();
    const head = this.cell >= LABEL_FROM ? Math.min(18, Math.round(size * 0.24)) : 0;
    const references = this.view.references[block];
    const shared = references > 1;
    context.beginPath();
    context.roundRect(x + 0.5, y + 0.5, size - 1, size - 1, 4);
    if (state === "used") {
      const colours = this.coloursOf(block);
      context.save();
      context.clip();
      const alpha = context.globalAlpha;
      context.globalAlpha = alpha * 0.16;
      colours.forEach((colour, i) => {
        context.fillStyle = colour;
        context.fillRect(x + (size * i) / colours.length, y, size / colours.length + 1, size);
      });
      context.restore();
      this.drawSlots(context, block, colours, x, y + head, size, size - head);
    }
    context.setLineDash(state === "free" ? [2, 3] : []);
    context.strokeStyle = state === "used" ? (shared ? ink : this.coloursOf(block)[0]) : state === "cached" ? cached : line;
    context.lineWidth = shared ? 2 : 1;
    context.beginPath();
    context.roundRect(x + 0.5, y + 0.5, size - 1, size - 1, 4);
    context.stroke();
    context.setLineDash([]);
    if (state === "cached") this.hatch(context, x, y, size, cached);
    if (state === "null") {
      context.fillStyle = faint;
      context.fill();
      this.cross(context, x, y, size, muted);
    }
    if (this.replay.fresh.has(block) && state === "used") this.corner(context, x, y, size, ink);
    if (head) this.label(context, block, state, references, x, y, size, head);
  }

  drawSlots(context, block, colours, x, y, width, height) {
    const count = this.replay.blockSize;
    const columns = slotColumns(count);
    const [stepX, stepY] = [(width - 7) / columns, (height - 5) / Math.ceil(count / columns)];
    const gap = Math.min(stepX, stepY) > 5 ? 2 : 1;
    const [w, h] = [Math.max(1, stepX - gap), Math.max(1, stepY - gap)];
    const { written, placed } = this.view;
    for (let slot = 0; slot < count; slot++) {
      const column = slot % columns;
      const left = x + 3.5 + gap / 2 + column * stepX;
      const top = y + 2 + gap / 2 + Math.floor(slot / columns) * stepY;
      const colour = colours[Math.floor((column * colours.length) / columns)];
      if (slot < written[block]) {
        context.fillStyle = colour;
        context.fillRect(left, top, w, h);
      } else if (slot < placed[block]) {
        context.strokeStyle = colour;
        context.lineWidth = 1;
        context.strokeRect(left + 0.5, top + 0.5, w - 1, h - 1);
      }
    }
  }

  label(context, block, state, references, x, y, size, head) {
    const { ink, muted } = theme();
    const font = Math.min(13, head - 2);
    context.textBaseline = "middle";
    context.font = `${font}px ui-monospace, monospace`;
    context.textAlign = "left";
    context.fillStyle = state === "used" ? ink : muted;
    context.fillText(state === "null" ? "0" : String(block), x + 4, y + head / 2 + 2);
    if (references > 1) {
      context.font = `700 ${font}px ui-monospace, monospace`;
      context.textAlign = "right";
      context.fillText(`×${references}`, x + size - 4, y + head / 2 + 2);
    }
  }

  hatch(context, x, y, size, colour) {
    context.save();
    context.beginPath();
    context.roundRect(x + 1, y + 1, size - 2, size - 2, 4);
    context.clip();
    context.strokeStyle = colour;
    context.lineWidth = 1;
    context.globalAlpha *= 0.45;
    context.beginPath();
    for (let offset = 4; offset < 2 * size; offset += 7) {
      context.moveTo(x + offset, y);
      context.lineTo(x + offset - size, y + size);
    }
    context.stroke();
    context.restore();
  }

  cross(context, x, y, size, colour) {
    const inset = size * 0.34;
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(x + inset, y + inset);
    context.lineTo(x + size - inset, y + size - inset);
    context.moveTo(x + size - inset, y + inset);
    context.lineTo(x + inset, y + size - inset);
    context.stroke();
  }

  // New in its table in this step.
  corner(context, x, y, size, colour) {
    context.fillStyle = colour;
    context.beginPath();
    context.moveTo(x + size - 1, y + size - 9);
    context.lineTo(x + size - 1, y + size - 1);
    context.lineTo(x + size - 9, y + size - 1);
    context.fill();
  }

  outline(context, block, colour, width) {
    const [x, y] = this.place(block);
    const size = Math.max(5, this.cell - this.gap);
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x - 1, y - 1, size + 2, size + 2);
  }

  // One pixel a block, scaled: quick for any number of blocks.
  drawPixels(context) {
    const { numBlocks } = this.replay;
    const rows = Math.ceil(numBlocks / this.columns);
    const image = new ImageData(this.columns, rows);
    const pixels = new Uint32Array(image.data.buffer);
    const { ink, line, faint } = theme();
    pixels.fill(pixel(faint, 1), 0, numBlocks);
    for (const block of this.replay.state.cached) pixels[block] = pixel(line, 1);
    const colours = new Map(); // by owner, or by references
    for (let block = 1; block < numBlocks; block++) {
      if (!this.view.references[block]) continue;
      const key = this.mode === "owner" ? this.view.owner[block] : this.view.references[block];
      if (!colours.has(key)) {
        const [colour] = this.coloursOf(block);
        colours.set(key, [pixel(colour, 1), pixel(colour, 0.25)]);
      }
      pixels[block] = colours.get(key)[this.mine && !this.mine.has(block) ? 1 : 0];
    }
    if (this.mine && this.mode === "owner") {
      const own = pixel(theme().owners[this.colours.get(this.selected)], 1);
      for (const block of this.mine) pixels[block] = own; // a shared block's first owner may be another one
    }
    pixels[0] = pixel(ink, 1);
    const small = new OffscreenCanvas(this.columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, this.columns * this.cell, rows * this.cell);
  }
}

// A colour as canvases keep it in memory, mixed with the paper.
function pixel(colour, part) {
  const [from, back] = [rgb(colour), rgb(theme().paper)];
  const [r, g, b] = from.map((value, i) => Math.round(part * value + (1 - part) * back[i]));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

// Columns of a block's slots: the smallest divisor that is no less than the root, so that no row is ragged.
function slotColumns(count) {
  for (let columns = Math.ceil(Math.sqrt(count)); columns <= 8; columns++) if (count % columns === 0) return columns;
  return Math.min(count, Math.max(4, Math.ceil(Math.sqrt(count))));
}
