// Follows the daemon's events, and shows them.

import { Card } from "./card.js";
import { announce, byId, setAttribute, setText, show } from "./dom.js";
import { Accept, Failover, outcome } from "./failover.js";
import * as facts from "./facts.js";
import { Overview } from "./overview.js";
import { time } from "./words.js";

const EVENTS = "/replicator/v1/events";
// A status comes each second: after so many without one, it is not live.
const LATE_SECONDS = 4;
// After so many, the line is given up and a new one tried.
const DEAD_SECONDS = 20;
const RETRY_SECONDS = [1, 2, 5];
const SIDES = { SOURCE: "source", DESTINATION: "destination", BOTH: "source and destination" };

const cards = new Map();
let hello = null;
let now = 0;
let stream = null;
let heard = null;
let opened = 0;
let tries = 0;
let fresh = true;
let waiting = {};
let live = null;
let empty = false;

const seconds = () => performance.now() / 1000;

const accept = new Accept();
const failover = new Failover((report) => {
  const { node, title } = outcome(report);
  byId("outcomes").append(node);
  title.focus();
  announce(`Failed over: ${report.Path} is writable now`);
});
const open = {
  accept: (one) => accept.open(one),
  failover: (one) => failover.open(one, hello.Side, now),
};

const overview = new Overview();

/** The first of a line: history follows as a whole. */
export function takeHello(data) {
  if (hello && hello.Version !== data.Version) {
    // Another daemon than the one whose page this is.
    location.reload();
    return;
  }
  hello = data;
  fresh = true;
  setText(byId("where"), `${location.host} · ${SIDES[data.Side] ?? data.Side}`);
  setText(byId("version"), `replicator ${data.Version}`);
}

/** All samples after a hello, then the new ones. */
export function takeHistory(data) {
  if (fresh) waiting = {};
  for (const [id, samples] of Object.entries(data)) {
    const card = cards.get(id);
    if (!card) {
      // No status has named it yet.
      waiting[id] = [...(waiting[id] ?? []), ...samples];
      continue;
    }
    if (fresh) card.samples = [];
    card.take(samples, hello.SamplePeriod, hello.SamplesMax);
  }
  fresh = false;
}

export function takeStatus(data) {
  now = data.Time;
  heard = seconds();
  const all = data.Configurations;
  const known = new Set(all.map((one) => one.Status.SourceFileSystemId));
  for (const [id, card] of cards) {
    if (known.has(id)) continue;
    if (failover.id === id) failover.gone();
    card.node.remove();
    cards.delete(id);
  }
  for (const one of all) showOne(one);
  overview.show(all);
  empty = all.length === 0;
  setText(document.querySelector("title"), title(all));
  showConnection();
}

function showOne(one) {
  const id = one.Status.SourceFileSystemId;
  let card = cards.get(id);
  const before = card?.last?.Status.Status;
  if (!card) {
    card = new Card(id, hello.Side, open);
    cards.set(id, card);
    byId("cards").append(card.node);
    card.take(waiting[id] ?? [], hello.SamplePeriod, hello.SamplesMax);
    delete waiting[id];
  }
  card.show(one, now);
  if (failover.dialog.open && failover.id === id) failover.show(one, now);
  if (before && before !== one.Status.Status) {
    announce(`${facts.sourcePath(one)} to ${facts.replicaPath(one)}: ${one.Status.Status}`);
  }
}

/** The state in the tab's name: the worst first. */
function title(all) {
  const order = ["ERROR", "HALTED", "DELETING", "PAUSED", "PAUSING", "ENABLING", "ENABLED"];
  const words = all.map((one) => one.Status.Status);
  const worst = order.find((word) => words.includes(word));
  return worst ? `${worst} · replicator` : "replicator";
}

/** Says whether what is shown is of now. */
function showConnection() {
  const age = heard === null ? null : seconds() - heard;
  const isLive = age !== null && age < LATE_SECONDS && stream !== null;
  const line = byId("connection");
  setAttribute(line, "data-link", isLive ? "live" : heard === null ? "waiting" : "lost");
  const text = isLive ? "live" : heard === null ? "connecting" : "disconnected";
  setText(byId("connection-text"), text);
  const old = heard !== null && !isLive;
  // In the dialog, too: it lies over the page, and its figures decide.
  for (const id of ["stale", "failover-stale"]) {
    show(byId(id), old);
    if (old) setText(byId(id), `Disconnected from the daemon. What stands here is ${time(Math.max(1, Math.floor(age)))} old.`);
  }
  show(byId("empty"), isLive && empty);
  document.body.classList.toggle("is-stale", old);
  if (live !== null && live !== isLive) {
    announce(isLive ? "Connected to the daemon again" : "Disconnected from the daemon");
  }
  if (heard !== null) live = isLive;
}

function connect() {
  opened = seconds();
  stream = new EventSource(EVENTS);
  const on = (name, take) => stream.addEventListener(name, (event) => {
    tries = 0;
    take(JSON.parse(event.data));
  });
  on("hello", takeHello);
  on("history", takeHistory);
  on("status", takeStatus);
  stream.addEventListener("error", reconnect);
}

/** A browser gives up on a line that was refused; we do not. */
function reconnect() {
  if (stream === null) return;
  stream.close();
  stream = null;
  const wait = RETRY_SECONDS[Math.min(tries, RETRY_SECONDS.length - 1)];
  tries += 1;
  setTimeout(connect, wait * 1000);
  showConnection();
}

setInterval(() => {
  showConnection();
  if (stream !== null && seconds() - Math.max(heard ?? 0, opened) > DEAD_SECONDS) reconnect();
}, 500);
connect();
