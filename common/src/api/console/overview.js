// All replications at a glance, where there are several: a row each, kept, so
// that a link in it keeps the focus.

import { State } from "./card.js";
import { byId, make, setText, show, Table } from "./dom.js";
import * as facts from "./facts.js";
import { count, time } from "./words.js";

const COLUMNS = [
  { label: "State", kind: "word" }, { label: "Source", kind: "path" }, { label: "Replica", kind: "path" },
  { label: "Lag", kind: "number" }, { label: "Backlog", kind: "number" },
];

export class Overview {
  constructor() {
    this.rows = new Map();
    this.key = "";
    this.table = new Table("All replications", COLUMNS);
    this.table.caption.className = "unseen";
    byId("overview").append(this.table.node);
  }

  show(all) {
    show(byId("overview"), all.length > 1);
    const ids = all.map((one) => one.Status.SourceFileSystemId);
    for (const one of all) this.row(one);
    const key = ids.join(" ");
    if (key === this.key) return;
    this.key = key;
    for (const id of this.rows.keys()) {
      if (!ids.includes(id)) this.rows.delete(id);
    }
    this.table.show(ids.map((id) => {
      const row = this.rows.get(id);
      return [row.state.node, row.link, row.replica, row.behind, row.backlog];
    }), key);
  }

  row(one) {
    const { Status, Lag } = one;
    const id = Status.SourceFileSystemId;
    if (!this.rows.has(id)) {
      const [replica, behind, backlog] = [make("span"), make("span"), make("span")];
      const link = make("a", { href: `#at-${id}` });
      this.rows.set(id, { state: new State(), link, replica, behind, backlog });
    }
    const row = this.rows.get(id);
    row.state.show(Status.Status);
    setText(row.link, facts.sourcePath(one));
    setText(row.replica, facts.replicaPath(one));
    setText(row.behind, Lag === null ? "–" : time(Lag));
    setText(row.backlog, Status.Source ? count(Status.Source.BacklogRecords) : "?");
  }
}
