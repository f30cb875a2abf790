// A chart of one figure over the last hour: small, drawn by hand, with a text
// that says what it shows.

import { draw, make, setAttribute, setText, Table } from "./dom.js";
import { bytes, clock } from "./words.js";

const HEIGHT = 112;
const PAD = { left: 58, right: 8, top: 8, bottom: 20 };
// What is drawn at least and at most, minutes; and how many parts the axis has then,
// also where there is little room.
const WINDOWS = [5, 15, 30, 60];
const PARTS = { 5: [5, 1], 15: [3, 3], 30: [3, 2], 60: [4, 2] };
const NARROW = 360;
// Samples further apart than this many periods have a gap between them.
const GAP = 3;
// Rows of the table that says the same in figures.
const ROWS = 12;

export class Chart {
  /**
   * `of` gives a sample's value or null, `words` says one, `mark` says a round one
   * at the scale, whose top for the highest value `ceiling` gives.
   */
  constructor(title, { of, words, mark, ceiling }) {
    Object.assign(this, { title, of, words, mark, ceiling });
    this.samples = [];
    this.readout = make("span", { class: "readout" });
    this.span = make("span", { class: "span" });
    this.summary = make("p", { class: "summary" });
    this.svg = draw("svg", { role: "img", height: HEIGHT, class: "chart" });
    this.table = new Table(`${title}, in figures`, [
      { label: "From (UTC)" }, { label: "Median", kind: "number" }, { label: "Highest", kind: "number" },
    ]);
    this.node = make("figure", { class: "panel" },
      make("figcaption", {}, make("span", {}, make("span", { class: "title" }, title), this.span), this.readout),
      this.svg, this.summary,
      make("details", { class: "figures" },
        make("summary", {}, "In figures", make("span", { class: "unseen" }, `: ${title}`)), this.table.node));
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.render()).observe(this.svg);
  }

  /** Samples are `[milliseconds, …]`, oldest first; `period` in seconds. */
  show(samples, period) {
    this.samples = samples;
    this.period = period * 1000;
    this.render();
    const [span, told] = [this.spanned(), this.tell()];
    setText(this.span, span && ` over ${span}`);
    setText(this.summary, told);
    setAttribute(this.svg, "aria-label", `${this.title} over ${span || "no time yet"}: ${told}`);
    this.table.show(this.rows());
  }

  known() {
    return this.samples.filter((sample) => this.of(sample) !== null);
  }

  tell() {
    const known = this.known();
    if (known.length === 0) return "Nothing is known yet";
    const values = known.map(this.of);
    const top = known[values.indexOf(Math.max(...values))];
    const last = this.samples.at(-1);
    const now = this.of(last) === null ? "Now unknown" : `Now ${this.words(this.of(last))}`;
    return `${now}, median ${this.words(median(values))}, highest ${this.words(this.of(top))} at ${clock(top[0])} UTC`;
  }

  /** How far back it reaches. */
  spanned() {
    if (this.samples.length < 2) return "";
    const minutes = Math.round((this.samples.at(-1)[0] - this.samples[0][0]) / 60000);
    return minutes < 1 ? "the last minute" : `the last ${minutes} min`;
  }

  rows() {
    if (this.samples.length === 0) return [];
    const begin = this.samples[0][0];
    const step = Math.max(60000, Math.ceil((this.samples.at(-1)[0] - begin + 1) / ROWS / 60000) * 60000);
    const buckets = new Map();
    for (const sample of this.known()) {
      const at = Math.floor((sample[0] - begin) / step);
      if (!buckets.has(at)) buckets.set(at, []);
      buckets.get(at).push(this.of(sample));
    }
    return [...buckets].map(([at, values]) =>
      [clock(begin + at * step), this.words(median(values)), this.words(Math.max(...values))]);
  }

  /** Where things stand: a window of time, a scale, and the way from them to pixels. */
  layout() {
    const width = this.svg.clientWidth;
    if (width === 0) return null;
    const end = this.samples.at(-1)?.[0] ?? Date.now();
    const age = (end - (this.samples[0]?.[0] ?? end)) / 60000;
    const minutes = WINDOWS.find((window) => window >= age) ?? WINDOWS.at(-1);
    const begin = end - minutes * 60000;
    const highest = Math.max(0, ...this.known().map(this.of));
    const top = this.ceiling(highest);
    const inner = { width: width - PAD.left - PAD.right, height: HEIGHT - PAD.top - PAD.bottom };
    return {
      width, minutes, begin, end, top,
      x: (time) => PAD.left + ((time - begin) / (end - begin)) * inner.width,
      y: (value) => PAD.top + (1 - value / top) * inner.height,
    };
  }

  render() {
    const at = this.layout();
    if (!at) return;
    setAttribute(this.svg, "viewBox", `0 0 ${at.width} ${HEIGHT}`);
    this.cursor = draw("g", { class: "cursor", visibility: "hidden" },
      draw("line", { y1: PAD.top, y2: HEIGHT - PAD.bottom }), draw("circle", { r: 3 }));
    this.svg.replaceChildren(...this.grid(at), ...this.lines(at), this.cursor);
  }

  grid(at) {
    const nodes = [];
    for (const share of [0, 0.5, 1]) {
      const y = Math.round(at.y(share * at.top)) + 0.5;
      nodes.push(draw("line", { class: share === 0 ? "axis" : "grid", x1: PAD.left, x2: at.width - PAD.right, y1: y, y2: y }));
      const label = share === 0 ? "0" : this.mark(share * at.top);
      nodes.push(draw("text", { x: PAD.left - 6, y: y + 3.5, "text-anchor": "end" }, label));
    }
    const steps = PARTS[at.minutes][at.width < NARROW ? 1 : 0];
    for (let step = 0; step <= steps; step += 1) {
      const time = at.begin + ((at.end - at.begin) * step) / steps;
      const left = (at.minutes * (steps - step)) / steps;
      const label = left === 0 ? "now" : `−${left} min`;
      const anchor = step === 0 ? "start" : step === steps ? "end" : "middle";
      nodes.push(draw("text", { x: at.x(time), y: HEIGHT - 5, "text-anchor": anchor }, label));
    }
    return nodes;
  }

  /** Unbroken stretches, each with its area. */
  lines(at) {
    const stretches = [];
    let last = -Infinity;
    for (const sample of this.samples) {
      const value = this.of(sample);
      if (value === null || sample[0] < at.begin) continue;
      if (sample[0] - last > GAP * this.period) stretches.push([]);
      stretches.at(-1).push([at.x(sample[0]).toFixed(1), at.y(Math.min(value, at.top)).toFixed(1)]);
      last = sample[0];
    }
    const floor = at.y(0).toFixed(1);
    return stretches.flatMap((points) => {
      const line = `M${points.map((point) => point.join(",")).join("L")}`;
      const area = `${line}L${points.at(-1)[0]},${floor}L${points[0][0]},${floor}Z`;
      // A stretch of one sample is a dot: the line's cap.
      return [draw("path", { class: "area", d: area }),
        draw("path", { class: "line", d: points.length > 1 ? line : `${line}h0.1` })];
    });
  }

  /** Shows the value nearest to the pointer. */
  point(event) {
    const at = event && this.layout();
    const known = this.known();
    if (!at || known.length === 0) {
      setText(this.readout, "");
      this.cursor?.setAttribute("visibility", "hidden");
      return;
    }
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const distance = (sample) => Math.abs(at.x(sample[0]) - x);
    const nearest = known.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best));
    const [line, dot] = this.cursor.children;
    for (const [node, name] of [[line, "x1"], [line, "x2"], [dot, "cx"]]) {
      node.setAttribute(name, at.x(nearest[0]));
    }
    dot.setAttribute("cy", at.y(this.of(nearest)));
    this.cursor.setAttribute("visibility", "visible");
    setText(this.readout, `${clock(nearest[0])} UTC  ${this.words(this.of(nearest))}`);
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

// Tops of scales that have a round middle, seconds.
const TIMES = [1, 2, 4, 10, 20, 60, 120, 240, 600, 1200, 3600, 7200, 14400, 43200, 86400];

export const TIME_SCALE = {
  ceiling: (highest) => TIMES.find((top) => top >= highest) ?? Math.ceil(highest / 172800) * 172800,
  mark(seconds) {
    if (seconds < 60) return `${seconds} s`;
    if (seconds < 3600) return `${seconds / 60} min`;
    return seconds < 86400 ? `${seconds / 3600} h` : `${seconds / 86400} d`;
  },
};

/** Powers of two, of bytes a second. */
export const BYTE_SCALE = {
  ceiling: (highest) => 2 ** Math.max(11, Math.ceil(Math.log2(Math.max(1, highest)))),
  mark: (rate) => `${bytes(rate).replace(".0", "")}/s`,
};
