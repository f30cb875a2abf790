// The two dialogs: what cannot be taken back is asked for twice.

import { doing, request } from "./actions.js";
import { byId, make, setText, show, Terms } from "./dom.js";
import * as facts from "./facts.js";

const WORD = "failover";

/** What each choice of sides means, by the side that is asked. */
const MODES = {
  SOURCE: {
    all: "The replica becomes writable at the destination, and names what it lacks. Needs the connection.",
    local: "Only ends replication here, for when the destination is gone. A replica that lives stays read-only until it is failed over there.",
  },
  DESTINATION: {
    all: "The source takes part: it stops, and names what was not replicated. Needs the connection.",
    local: "For when the source is dead. What was not replicated stays unknown.",
  },
  BOTH: {
    all: "The source takes part: it stops, and names what was not replicated.",
    local: "The replica first, without asking the source: for when the source hangs.",
  },
};

/** Shows an error of a dialog, or none. */
function say(node, text) {
  setText(node, text);
  show(node, text !== "");
}

export class Failover {
  /** `done` takes the report and the configuration that was. */
  constructor(done) {
    this.done = done;
    this.dialog = byId("failover");
    this.word = byId("failover-word");
    this.button = byId("failover-do");
    this.error = byId("failover-error");
    this.loss = new Terms({}, byId("failover-loss"));
    this.word.addEventListener("input", () => this.check());
    byId("failover-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.act();
    });
  }

  open(one, side, now) {
    this.id = one.Status.SourceFileSystemId;
    setText(byId("failover-title"), `Fail over to ${facts.replicaPath(one)}`);
    setText(byId("failover-id"), this.id);
    setText(byId("mode-all-about"), MODES[side].all);
    setText(byId("mode-local-about"), MODES[side].local);
    const apart = side === "DESTINATION" && !facts.link(one)?.Connected;
    byId(apart ? "mode-local" : "mode-all").checked = true;
    this.word.value = "";
    say(this.error, "");
    this.show(one, now);
    this.check();
    this.dialog.showModal();
    this.word.focus();
  }

  /** What would be lost goes on while the dialog is open. */
  show(one, now) {
    this.one = one;
    this.loss.show(facts.loss(one, now));
  }

  /** The configuration went away meanwhile. */
  gone() {
    if (!this.busy) this.dialog.close();
  }

  check() {
    const word = this.word.value.trim();
    this.button.disabled = word !== WORD && word !== this.id;
  }

  async act() {
    if (this.button.disabled) return;
    await doing(this.button, async () => {
      say(this.error, "");
      this.busy = true;
      try {
        const mode = this.dialog.querySelector("input[name=mode]:checked").value;
        const report = await request("failover", { id: this.id, mode });
        this.dialog.close();
        this.done(report, this.one);
      } catch (error) {
        say(this.error, error.message);
      } finally {
        this.busy = false;
      }
    });
  }
}

export class Accept {
  constructor() {
    this.dialog = byId("accept");
    this.error = byId("accept-error");
    const button = byId("accept-do");
    byId("accept-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.querySelector("form").addEventListener("submit", async (event) => {
      event.preventDefault();
      await doing(button, async () => {
        try {
          await request("resume", { id: this.id, accept_deletions: true });
          this.dialog.close();
        } catch (error) {
          say(this.error, error.message);
        }
      });
    });
  }

  open(one) {
    this.id = one.Status.SourceFileSystemId;
    say(this.error, "");
    setText(byId("accept-message"), one.Status.StatusMessage ?? "");
    this.dialog.showModal();
    byId("accept-cancel").focus();
  }
}

/** A failover's report: it stays until it is put away. */
export function outcome(report) {
  const lines = facts.outcome(report).map((line) => make("li", {}, line));
  const title = make("h2", { tabindex: "-1" }, `Failed over: ${report.Path} is writable now`);
  const button = make("button", { type: "button" }, "Put away");
  const node = make("section", { class: "card outcome", "aria-label": "Report of the failover" },
    make("div", { class: "head" }, title, make("div", { class: "actions" }, button)), make("ul", {}, ...lines));
  button.addEventListener("click", () => {
    node.remove();
    byId("main").focus();
  });
  return { node, title };
}
