"use strict";
// A strip of the last minutes: lines, or areas that stand on each other. The right edge is now.

class Chart {
  // series: [{ name, colour: (theme) => text, value: (moment) => number or null, text: (value) => text, rare }, ...];
  // a rare one is named while it is there.
  constructor(box, { title, series, stacked = false, most = 0 }) {
    Object.assign(this, { title, series, stacked, most });
    this.canvas = element("canvas");
    this.names = element("span");
    box.append(element("div", { className: "chart" }, element("h3", { textContent: title }, this.names), element("div", {}, this.canvas)));
  }

  // history: moments with a `time` in seconds, the latest last; span: seconds that the strip shows.
  draw(history, span) {
    const colours = theme();
    const { context, width, height } = fit(this.canvas);
    const columns = this.series.map(({ value }) => history.map((moment) => value(moment)));
    this.drawNames(columns, colours);
    if (this.stacked) stack(columns);
    const peak = Math.max(this.most, ...columns.flat(), 1e-9) * (this.most ? 1 : 1.08);
    const now = history.length ? history[history.length - 1].time : 0;
    const x = (i) => width - ((now - history[i].time) / span) * width;
    const y = (value) => height - 1 - (value / peak) * (height - 3);
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    context.strokeRect(0.5, 0.5, width - 1, height - 1);
    context.save();
    context.beginPath();
    context.rect(1, 1, width - 2, height - 2);
    context.clip();
    // Of areas, the topmost goes first: those below it are drawn over it.
    const order = this.stacked ? columns.map((_, i) => columns.length - 1 - i) : columns.map((_, i) => i);
    for (const which of order) this.drawSeries(context, columns[which], this.series[which].colour(colours), x, y, height);
    context.restore();
    context.fillStyle = colours.muted;
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "top";
    context.textAlign = "left";
    if (columns.flat().some((value) => value > 0)) context.fillText(this.series[0].text(peak), 5, 4);
  }

  drawSeries(context, column, colour, x, y, height) {
    context.beginPath();
    let open = false;
    let first = 0;
    let last = 0;
    column.forEach((value, i) => {
      if (value === null) return;
      last = x(i);
      if (open) context.lineTo(last, y(value));
      else context.moveTo((first = last), y(value));
      open = true;
    });
    if (!open) return;
    if (this.stacked) {
      context.lineTo(last, height);
      context.lineTo(first, height);
      context.fillStyle = colour;
      context.fill();
    } else {
      context.strokeStyle = colour;
      context.lineWidth = 1.75;
      context.lineJoin = "round";
      context.stroke();
    }
  }

  drawNames(columns, colours) {
    this.names.replaceChildren(
      ...this.series.map(({ name, colour, text, rare }, i) => {
        const value = columns[i].length ? columns[i][columns[i].length - 1] : null;
        if (rare && !value) return "";
        const shown = value === null ? "–" : text(value);
        return element("span", {}, element("i", { style: { background: colour(colours) } }), name, element("b", { textContent: shown }));
      }),
    );
  }
}

// Each column becomes the sum of itself and those before it.
function stack(columns) {
  for (let i = 1; i < columns.length; i++) columns[i] = columns[i].map((value, at) => value + columns[i - 1][at]);
}
