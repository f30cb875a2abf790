// What a status says, in words: from plain data to plain data, no element here.
// The terms are those of `replicator status`.

import { ago, between, bytes, count, iso, moment, several, time } from "./words.js";

const OLD_SECONDS = 10;

export const sourcePath = ({ Status: { Source } }) => Source?.Path ?? "(source never heard of)";
export const replicaPath = ({ Status: { Destination } }) =>
  Destination?.Path ?? "(replica never heard of)";

/** The link that is down, or any: the other side's word is of when there was one. */
export function link({ Status: { Source, Destination } }) {
  const links = [Source?.Link, Destination?.Link].filter(Boolean);
  return links.find((one) => !one.Connected) ?? links[0] ?? null;
}

/** Of whom nothing was heard for a while, in words. */
export function old({ Status: { Source, Destination } }, now) {
  return [["source", Source], ["replica", Destination]]
    .filter(([, report]) => report && between(report.Time, now) > OLD_SECONDS)
    .map(([name, report]) =>
      `The ${name} was last heard of ${ago(report.Time, now)}; what stands here of it is as old.`);
}

/** Blocks, for a table. */
export function blockers({ Status: { Source } }) {
  return (Source?.BlockedBy ?? []).map((one) => [
    one.Reason,
    one.Path ?? "",
    one.BytesLeft === null ? "" : bytes(one.BytesLeft),
    time(between(one.Since, Source.Time)),
  ]);
}

/** `{share, text}` of an initial sync or a rescan; null when none runs. */
export function progress({ Status: { Status, Source } }) {
  const now = Source?.Progress;
  if (!now) return null;
  // Small files cost more than their bytes: each counts as 4 KiB.
  const weight = (objects, content) => content + 4096 * objects;
  const found = weight(now.ObjectsFound, now.BytesFound);
  const share = found > 0 ? Math.min(1, weight(now.ObjectsDone, now.BytesDone) / found) : 0;
  const far = now.WalkComplete ? "" : " found so far";
  const parts = [
    `${count(now.ObjectsDone)} of ${count(now.ObjectsFound)} files`,
    `${bytes(now.BytesDone)} of ${bytes(now.BytesFound)}${far}`,
    `${bytes(now.BytesPerSecond)}/s, ${count(now.ObjectsPerSecond)} files/s`,
  ];
  return {
    name: Status === "ENABLING" ? "Initial sync" : "Rescan",
    share: now.WalkComplete ? share : null,
    left: now.SecondsLeft === null ? "time left unknown" : `${time(now.SecondsLeft)} left`,
    text: parts.join(" · "),
  };
}

/** Errors by file, for a table: newest first. */
export function fileErrors({ Status: { Source, Destination } }) {
  const all = [
    ["source", Source?.Skipped.Unreadable],
    ["replica", Destination?.Shortfalls.Examples],
    ["verification", Source?.Verification.Errors],
  ];
  return all.flatMap(([side, errors]) =>
    [...(errors ?? [])].reverse().map(({ Path, Error }) => [Path || "(the root)", side, Error]));
}

/** What went wrong that is not of one file, and what is doubtful: texts. */
export function troubles({ Status: { Source, Destination } }, now) {
  const texts = [];
  for (const [side, report] of [["Source", Source], ["Replica", Destination]]) {
    if (report?.LastError) {
      const { Error, Time } = report.LastError;
      texts.push(`${side}, ${ago(Time, now)}: ${Error}`);
    }
  }
  if (Destination?.Stalled) texts.unshift(`The replica is stalled: ${Destination.Stalled}`);
  return texts;
}

export function doubts({ Status: { Source, Destination } }) {
  const texts = [...(Source?.Watcher.Doubts ?? [])];
  const enforcement = Destination?.Enforcement;
  if (enforcement && enforcement.Kind !== "mount") {
    const how = enforcement.Kind === "none" ? "not enforced" : "by permissions only";
    texts.push(`The replica is read-only ${how}: ${enforcement.Reason}`);
  }
  texts.push(...shortfalls(Destination));
  return texts;
}

function shortfalls(destination) {
  const lost = destination?.Shortfalls;
  if (!lost) return [];
  return [
    ["owner or group", lost.Ownership], ["mode", lost.Mode], ["xattrs", lost.Xattrs],
    ["device node", lost.Devices], ["times", lost.Times],
  ].filter(([, number]) => number > 0).map(([what, number]) =>
    `The replica does not hold the ${what} of ${several(number, "object", "objects")}.`);
}

/** Verification: `{head, sub, share, text}`, share and text while a pass runs. */
export function verification({ Status: { Source } }, now) {
  const known = Source?.Verification;
  if (!known) return { head: "unknown", sub: "", share: null, text: "" };
  const last = known.LastVerifiedTimestamp;
  const found = known.Missing + known.Extra + known.Content + known.Attributes;
  const parts = [];
  if (known.Pass > 0) {
    parts.push(`pass ${known.Pass}: ${several(found, "difference", "differences")}`);
    if (found > 0) parts.push(`${count(known.Repaired)} repaired`);
    if (known.Changing > 0) parts.push(`${count(known.Changing)} changing`);
    if (known.ReadErrors > 0) parts.push(`${count(known.ReadErrors)} unreadable`);
  }
  if (known.NextPass !== null && !known.Running) {
    parts.push(`next in ${time(between(now, known.NextPass))}`);
  }
  return {
    head: last === null ? "never" : ago(last, now),
    sub: parts.join(", "),
    found,
    unrepaired: found > known.Repaired,
    ...running(known),
  };
}

function running(known) {
  if (!known.Running) return { share: null, text: "" };
  const share = Math.min(1, known.Objects / Math.max(1, known.ObjectsExpected));
  const waits = known.Waiting === null ? "" : ` · waits: ${known.Waiting}`;
  const objects = several(known.ObjectsExpected, "object", "objects");
  return {
    share,
    text: `${count(known.Objects)} of ${objects} · ${bytes(known.Bytes)} compared${waits}`,
  };
}

/** Differences, for a table: newest first. */
export function differences({ Status: { Source } }) {
  return [...(Source?.Verification.Differences ?? [])].reverse().map((one) => [
    one.Kind,
    one.Path || "(the root)",
    one.Source,
    one.Replica,
    one.Repaired ? "repaired" : { value: "NOT REPAIRED", flag: "bad" },
    moment(one.Time).slice(0, 19),
  ]);
}

/** Everything else, as pairs of a term and texts. */
export function details({ Status }, now) {
  const { Source, Destination } = Status;
  return [
    ["File systems", [
      `${Status.SourceFileSystemId} in ${Status.SourceFileSystemRegion}`,
      `${Status.DestinationFileSystemId} in ${Status.DestinationFileSystemRegion}`,
    ]],
    ["Since", [moment(Status.CreationTime)]],
    ["Consistent", Destination?.LastConsistent ?
      [`the replica was equal to the source as of ${iso(Destination.LastConsistent)}`] : []],
    ["Connection", connection(link({ Status }), now)],
    ...ofSource(Source),
    ...ofReplica(Destination),
  ].filter(([, texts]) => texts.length > 0);
}

function connection(link, now) {
  if (!link) return [];
  const parts = [`${link.Connected ? "connected" : "NOT CONNECTED"} with ${link.Peer} for ${time(between(link.Since, now))}`];
  if (link.RoundTripMicros !== null) parts.push(`round trip ${(link.RoundTripMicros / 1e3).toFixed(1)} ms`);
  if (link.ClockOffsetNanos !== null) parts.push(`replica’s clock ${(link.ClockOffsetNanos / 1e6).toFixed(1)} ms ahead`);
  if (!link.Connected && link.LastError) parts.push(link.LastError);
  return [parts.join(", ")];
}

function ofSource(source) {
  if (!source) return [];
  const { Positions: at, Lag: lag, Counters: all, Watcher: watcher, Skipped: skipped } = source;
  const stages = [["journaled", at.Journaled, lag.Journaled], ["shipped", at.Shipped, lag.Shipped],
    ["durable", at.Durable, lag.Durable], ["applied", at.Applied, lag.Applied]];
  const watches = watcher.Watches === null ? "" : `, ${several(watcher.Watches, "watch", "watches")}`;
  const ratio = all.BytesChanged === 0 ? "" :
    ` (shipped ÷ changed: ${(all.BytesShipped / all.BytesChanged).toFixed(3)})`;
  const kinds = [[skipped.Sockets, "socket", "sockets"], [skipped.Fifos, "FIFO", "FIFOs"],
    [skipped.Devices, "device node", "device nodes"]];
  return [
    ["Positions", [`captured ${count(at.Captured)}`, ...stages.map(([name, seq, behind]) =>
      `${name} ${count(seq)}, ${time(behind)} behind`)]],
    ["Watcher", [`${watcher.Kind} (${watcher.Reason})${watches}`]],
    ["Traffic", [
      `${bytes(all.BytesChanged)} changed, ${bytes(all.BytesShipped)} shipped${ratio}, ${bytes(all.BytesWired)} on the wire`,
      `${several(all.Events, "event", "events")}, ${several(all.Records, "record", "records")}, ${several(all.ObjectsShipped, "object", "objects")} shipped`,
      `${several(all.Batches, "batch", "batches")}, ${count(all.ExactBatches)} of them exact; ${several(all.Gaps, "gap", "gaps")}, ${several(all.Rescans, "rescan", "rescans")}, ${several(all.Sessions, "session", "sessions")}`,
    ]],
    ["Skipped", [
      ...kinds.filter(([number]) => number > 0).map((kind) => several(...kind)),
      ...skipped.NestedMounts.map((path) => `${path}: another file system, not entered`),
    ]],
    ["Stores", [bytes(source.StoreBytes)]],
  ];
}

function ofReplica(replica) {
  if (!replica) return [];
  const able = replica.Abilities;
  const lacking = [["owners", able.Chown], ["xattrs", able.Xattrs],
    ["privileged xattrs", able.PrivilegedXattrs], ["device nodes", able.Devices],
    ["file handles", able.Handles]].filter(([, has]) => !has).map(([name]) => name);
  return [
    ["Read-only", [`${replica.Enforcement.Kind} (${replica.Enforcement.Reason})`]],
    ["Held", [`${several(replica.Objects, "object", "objects")}, ${bytes(replica.StagedBytes)} staged, ${count(replica.Orphans)} being moved; batch ${count(replica.Durable)} durable, ${count(replica.Applied)} applied`]],
    ["Cannot hold", lacking.length > 0 ? [lacking.join(", ")] : []],
  ];
}

/** What a failover at this moment would lose: pairs of a term and texts. */
export function loss(one, now) {
  const { Status: { Source }, LastReplicated, Lag } = one;
  const connected = link(one)?.Connected ?? false;
  const pairs = [["Watermark", [LastReplicated === null ?
    "The initial sync was never done: the replica is INCOMPLETE." :
    `Changes since ${moment(LastReplicated)}, ${time(Lag)} ago, may be missing.`]]];
  const fresh = Source && between(Source.Time, now) <= OLD_SECONDS;
  const records = Source ? several(Source.BacklogRecords, "record", "records") : "";
  if (!Source) {
    pairs.push(["Not replicated", ["Unknown: the source has never been heard of."]]);
  } else if (fresh) {
    pairs.push(["Not replicated", [`${records} in the source’s journal`]]);
  } else {
    pairs.push(["Not replicated", [`Unknown: the source was last heard of ${ago(Source.Time, now)}; ${records} waited then.`]]);
  }
  const waiting = blockers(one).map(([reason, path, left]) =>
    [reason, path, left && `${left} left`].filter(Boolean).join(", "));
  if (waiting.length > 0) pairs.push(["Under way", waiting]);
  if (!connected) pairs.push(["Connection", ["The two sides are not connected."]]);
  return pairs;
}

/** A failover's report, line by line. */
export function outcome(report) {
  const lines = [report.LastReplicated === null ?
    "The initial sync was never done: the replica is INCOMPLETE." :
    `Replicated: every change before ${moment(report.LastReplicated)}` +
      (report.TimeSinceLastSync === null ? "." : `, ${time(report.TimeSinceLastSync)} before failover.`)];
  const records = report.NotReplicatedRecords;
  if (records === null) {
    lines.push("Not replicated: unknown, since the source did not take part.");
  } else {
    lines.push(`Not replicated: ${records === 0 ? "nothing" : several(records, "change", "changes")}.`);
  }
  lines.push(...report.NotReplicatedPaths.slice(0, 20));
  if (report.PutBack > 0) {
    lines.push(`Put back, since its move had not arrived: ${several(report.PutBack, "object", "objects")}.`);
  }
  lines.push(report.LostAndFound === null ? "Nothing had to be set aside." :
    `Set aside in ${report.LostAndFound}: ${several(report.SetAside, "item", "items")}.`);
  lines.push(...report.Warnings.map((warning) => `WARNING: ${warning}`));
  return lines;
}
