// One replication configuration: made once, then only its text changes, so that
// focus, selection and what is unfolded stay.

import { doing, request } from "./actions.js";
import { BYTE_SCALE, Chart, TIME_SCALE } from "./chart.js";
import { announce, draw, make, newId, setAttribute, setText, show, Table, Terms } from "./dom.js";
import * as facts from "./facts.js";
import { ago, between, bytes, iso, several, time, timeOfDay } from "./words.js";

// A shape beside the word and the colour, for those who see neither.
const SHAPES = {
  ENABLED: "M3 8.5l3.5 3.5L13 5",
  ENABLING: "M8 2.5v8M4.5 7.5L8 11l3.5-3.5M3 13.5h10",
  PAUSING: "M5.5 3.5v9M10.5 3.5v9",
  PAUSED: "M5.5 3.5v9M10.5 3.5v9",
  DELETING: "M3 5.5h8M8.5 2.5l3 3-3 3M3 12h10",
  HALTED: "M8 2.5L14 13H2zM8 6.5v3M8 11v.5",
  ERROR: "M4 4l8 8M12 4l-8 8",
};
const SAID_SECONDS = 15;
const IS_BAD = ["ERROR", "HALTED"];

/** A state as shape, colour and word. */
export class State {
  constructor() {
    this.path = draw("path", {});
    this.word = make("span");
    this.node = make("span", { class: "state" },
      draw("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, this.path), this.word);
  }

  show(word) {
    setAttribute(this.node, "data-state", word);
    setAttribute(this.path, "d", SHAPES[word] ?? SHAPES.ERROR);
    setText(this.word, word);
  }
}

/** A figure with its name above and what explains it below. */
class Figure {
  constructor(name) {
    this.value = make("dd", { class: "value" });
    this.sub = make("dd", { class: "sub" });
    this.node = make("div", { class: "figure" }, make("dt", {}, name), this.value, this.sub);
  }

  show(value, sub = "", flag = null) {
    setText(this.value, value);
    setText(this.sub, sub);
    setAttribute(this.node, "data-flag", flag);
  }
}

/** A bar with its name and text. */
class Bar {
  constructor() {
    const id = newId("bar");
    this.bar = make("progress", { "aria-labelledby": id, max: "1" });
    this.name = make("span", { class: "title", id });
    this.share = make("span", { class: "share" });
    this.text = make("p", { class: "summary" });
    this.node = make("div", { class: "bar" },
      make("p", { class: "head" }, this.name, this.share), this.bar, this.text);
    this.node.hidden = true;
  }

  show(name, share, right, text) {
    setText(this.name, name);
    // Without a value it says that something is done, not how much.
    setAttribute(this.bar, "value", share === null ? null : share.toFixed(3));
    const percent = share === null ? "" : `${Math.floor(share * 100)} %`;
    setText(this.share, [percent, right].filter(Boolean).join(" · "));
    setText(this.text, text);
    show(this.node, true);
  }
}

/** Texts under a heading, as long as there are any. */
class Notes {
  constructor(title, kind) {
    this.list = make("ul");
    this.node = make("div", { class: "notes", "data-kind": kind }, make("h3", {}, title), this.list);
    this.node.hidden = true;
    this.shown = "";
  }

  show(texts) {
    const key = JSON.stringify(texts);
    if (key === this.shown) return;
    this.shown = key;
    this.list.replaceChildren(...texts.map((text) => make("li", {}, text)));
    show(this.node, texts.length > 0);
  }
}

export class Card {
  /** `open` opens the dialogs: `{failover, accept}`. */
  constructor(id, side, open) {
    this.id = id;
    this.side = side;
    this.samples = [];
    this.state = new State();
    this.source = make("span", { class: "path" });
    this.replica = make("span", { class: "path" });
    this.message = make("p", { class: "message" });
    this.notice = make("p", { class: "notice" });
    const title = newId("replication");
    this.head = make("h2", { id: title, tabindex: "-1" },
      this.source, make("span", { class: "arrow", "aria-hidden": "true" }, "→"),
      make("span", { class: "unseen" }, " to "), this.replica);
    this.makeActions(open);
    this.makeFigures();
    this.makeTables();
    this.node = make("section", { class: "card", "aria-labelledby": title, id: `at-${id}` },
      make("div", { class: "head" }, this.state.node, this.head, this.actions),
      this.message, this.notice,
      make("dl", { class: "figures-row" }, ...Object.values(this.figures).map(({ node }) => node)),
      this.progress.node, this.troubles.node,
      this.blockers.node, this.errors.node,
      make("div", { class: "charts" }, this.lag.node, this.rate.node),
      this.pass.node, this.differences.node, this.doubts.node, this.rest);
  }

  makeActions(open) {
    const button = (text, kind, does) => {
      const node = make("button", { type: "button", ...(kind ? { class: kind } : {}) }, text);
      node.addEventListener("click", () => does(node));
      return node;
    };
    this.pauseButton = button("Pause", null, (node) => this.act(node, node.dataset.does, {}));
    this.acceptButton = button("Accept deletions…", "danger", () => open.accept(this.last));
    this.verifyButton = button("Verify", null, (node) => this.act(node, "verify", {}));
    this.failoverButton = button("Fail over…", "danger", () => open.failover(this.last));
    this.actions = make("div", { class: "actions", role: "group", "aria-label": "Actions" },
      this.acceptButton, this.pauseButton, this.verifyButton, this.failoverButton);
  }

  makeFigures() {
    this.figures = {
      watermark: new Figure("Lag"),
      backlog: new Figure("Backlog"),
      rate: new Figure("Throughput"),
      link: new Figure("Connection"),
      verified: new Figure("Verified"),
    };
    this.progress = new Bar();
    this.pass = new Bar();
    this.lag = new Chart("Lag", { of: (sample) => sample[1], words: time, ...TIME_SCALE });
    this.rate = new Chart("Throughput", {
      of: (sample) => sample[2], words: (rate) => `${bytes(rate)}/s`, ...BYTE_SCALE,
    });
  }

  makeTables() {
    this.troubles = new Notes("Errors", "bad");
    this.doubts = new Notes("Doubts", "doubt");
    this.blockers = new Table("What the watermark waits for", [
      { label: "What", kind: "word" }, { label: "File", kind: "path" }, { label: "Left", kind: "number" }, { label: "For", kind: "number" },
    ]);
    this.errors = new Table("Errors by file", [
      { label: "File", kind: "path" }, { label: "Where", kind: "word" }, { label: "Error" },
    ]);
    this.differences = new Table("Differences found by verification", [
      { label: "Kind", kind: "word" }, { label: "File", kind: "path" }, { label: "Source" }, { label: "Replica" },
      { label: "Outcome", kind: "word" }, { label: "Time (UTC)", kind: "word" },
    ]);
    this.details = new Terms({ class: "terms" });
    const summary = make("summary", {}, "Details", make("span", { class: "unseen" }, " of this replication"));
    this.rest = make("details", { class: "rest" }, summary, this.details.node);
  }

  /** Asks for something, and says what came of it. */
  async act(button, operation, more) {
    await doing(button, async () => {
      this.say("", "");
      try {
        const answer = await request(operation, { id: this.id, ...more });
        const said = {
          pause: "Paused. Changes are captured, and not shipped.",
          resume: "Resumed.",
          verify: `Verification pass ${answer.Pass} has begun.`,
        };
        this.say(said[operation] ?? "Done.", "good");
      } catch (error) {
        this.say(error.message, "error");
      }
    });
  }

  /** What went well goes by itself: the state says it from then on. */
  say(text, kind) {
    clearTimeout(this.saying);
    setText(this.notice, text);
    if (text !== "") announce(text);
    this.notice.dataset.kind = kind;
    if (kind === "good") this.saying = setTimeout(() => this.say("", ""), SAID_SECONDS * 1000);
  }

  /** One configuration of an event, at its `now`. */
  show(one, now) {
    this.last = one;
    const { Status } = one;
    this.state.show(Status.Status);
    setText(this.source, facts.sourcePath(one));
    setText(this.replica, facts.replicaPath(one));
    const texts = [Status.StatusMessage, ...facts.old(one, now)].filter(Boolean);
    setText(this.message, texts.join(" "));
    show(this.message, texts.length > 0);
    setAttribute(this.message, "data-kind", IS_BAD.includes(Status.Status) ? "bad" : "plain");
    this.showActions(Status);
    this.showFigures(one, now);
    this.showTables(one, now);
  }

  showActions({ Status }) {
    const paused = Status === "PAUSED" || Status === "PAUSING";
    // One button, so that the focus stays where it is.
    setText(this.pauseButton, paused ? "Resume" : "Pause");
    this.pauseButton.dataset.does = paused ? "resume" : "pause";
    const source = this.side !== "DESTINATION";
    show(this.acceptButton, Status === "HALTED" && source);
    show(this.verifyButton, source);
  }

  showFigures(one, now) {
    const { Status: { Source }, LastReplicated, Lag } = one;
    const { watermark, backlog, link, verified } = this.figures;
    if (LastReplicated === null) {
      watermark.show("–", "Nothing is promised before the initial sync is done", "doubt");
    } else {
      watermark.show(time(Lag), `Replicated up to ${timeOfDay(LastReplicated, now)}`, Lag > 60 ? "doubt" : null);
      setAttribute(watermark.sub, "data-watermark", iso(LastReplicated));
    }
    if (Source) {
      const oldest = Source.Lag.Applied;
      backlog.show(several(Source.BacklogRecords, "record", "records"),
        oldest > 0 ? `oldest waits for ${time(oldest)}` : "nothing waits");
    } else {
      backlog.show("unknown");
    }
    this.showLink(link, facts.link(one), now);
    const verification = facts.verification(one, now);
    verified.show(verification.head, verification.sub, verification.unrepaired ? "below" : null);
  }

  showLink(figure, link, now) {
    if (!link) return figure.show("unknown");
    if (link.Connected) {
      const trip = link.RoundTripMicros === null ? "" : `, round trip ${(link.RoundTripMicros / 1e3).toFixed(1)} ms`;
      return figure.show("connected", `with ${link.Peer} for ${time(between(link.Since, now))}${trip}`);
    }
    const next = link.NextAttempt === null ? "" :
      link.NextAttempt <= now ? "; trying now" : `; next attempt in ${time(between(now, link.NextAttempt))}`;
    return figure.show("not connected", `since ${ago(link.Since, now)}${next}${link.LastError ? `: ${link.LastError}` : ""}`, "bad");
  }

  showTables(one, now) {
    const progress = facts.progress(one);
    if (progress) {
      this.progress.show(progress.name, progress.share, progress.left, progress.text);
    } else {
      show(this.progress.node, false);
    }
    const { share, text } = facts.verification(one, now);
    if (share === null) {
      show(this.pass.node, false);
    } else {
      this.pass.show("Verification", share, "", text);
    }
    this.troubles.show(facts.troubles(one, now));
    this.doubts.show(facts.doubts(one));
    this.blockers.show(facts.blockers(one));
    this.errors.show(facts.fileErrors(one));
    this.differences.show(facts.differences(one));
    this.details.show(facts.details(one, now));
  }

  /** More samples, or all of them. */
  take(samples, period, most) {
    this.samples = [...this.samples, ...samples].slice(-most);
    this.lag.show(this.samples, period);
    this.rate.show(this.samples, period);
    const last = this.samples.at(-1);
    const [, , rate, records] = last ?? [];
    const known = rate !== null && rate !== undefined;
    this.figures.rate.show(known ? `${bytes(rate)}/s` : "–",
      known ? `${several(Math.round(records), "change", "changes")} a second` : "not known yet");
  }
}
