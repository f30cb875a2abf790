// Elements, made and changed. Text is only ever text: nothing here takes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** An element with attributes and children; a string becomes text. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same of a drawing. */
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets text where it differs: what is selected or read aloud stays. */
export function setText(node, text) {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

/** Sets or takes away an attribute where it differs. */
export function setAttribute(node, name, value) {
  if (value === null) {
    node.removeAttribute(name);
  } else if (node.getAttribute(name) !== value) {
    node.setAttribute(name, value);
  }
}

export function show(node, shown) {
  if (node.hidden === shown) {
    node.hidden = !shown;
  }
}

export function byId(id) {
  return document.getElementById(id);
}

/** Lines that stay: what is said right after another must not take its place unheard. */
const LINES = 5;

/** Says something to those who hear the page, also when it was said before. */
export function announce(text) {
  const lines = byId("announcer");
  lines.append(make("p", {}, text));
  while (lines.childElementCount > LINES) lines.firstElementChild.remove();
}

// A number for ids within the page.
let made = 0;
export function newId(name) {
  made += 1;
  return `${name}-${made}`;
}

// On a narrow screen rows become blocks, which would take the meaning of a table
// away from screen readers: hence the roles.
function cell(column, value) {
  const wrapped = value instanceof Node || typeof value === "string" ? { value } : value;
  const attributes = { "role": "cell", "data-label": column.label };
  if (column.kind) attributes.class = column.kind;
  if (wrapped.flag) attributes["data-flag"] = wrapped.flag;
  return make("td", attributes, make("span", {}, wrapped.value));
}

/** A table that is there as long as it has rows. Columns: `{label, kind}`. */
export class Table {
  constructor(caption, columns) {
    this.columns = columns;
    this.shown = "";
    const heads = columns.map(({ label, kind }) =>
      make("th", { scope: "col", role: "columnheader", ...(kind ? { class: kind } : {}) }, label));
    this.body = make("tbody", { role: "rowgroup" });
    this.caption = make("caption", {}, caption);
    this.node = make("table", { role: "table" }, this.caption,
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), this.body);
    this.node.hidden = true;
  }

  /** Cells are text, `{value, flag}`, or nodes (then give a `key` of what they show). */
  show(rows, key = JSON.stringify(rows)) {
    if (key === this.shown) return;
    this.shown = key;
    this.body.replaceChildren(...rows.map((row) =>
      make("tr", { role: "row" }, ...row.map((value, at) => cell(this.columns[at], value)))));
    show(this.node, rows.length > 0);
  }
}

/** Pairs of a term and what is to be said of it: `[term, [text…]]`. */
export class Terms {
  constructor(attributes = {}, node = make("dl", attributes)) {
    this.node = node;
    this.shown = "";
  }

  show(pairs) {
    const key = JSON.stringify(pairs);
    if (key === this.shown) return;
    this.shown = key;
    this.node.replaceChildren(...pairs.map(([term, texts]) =>
      make("div", {}, make("dt", {}, term), ...texts.map((text) => make("dd", {}, text)))));
  }
}
