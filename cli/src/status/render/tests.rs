use super::*;
use replicator_common::id::{BatchId, Seq};
use replicator_common::status::{
    Abilities, Counters, DesiredState, Enforcement, Positions, ReplicationStatus, Shortfalls,
    Skipped, StageLag, TimedError, WatcherKind, WatcherReport,
};

const SECOND: i64 = 1_000_000_000;
const NOW: Timestamp = Timestamp(1_795_248_930 * SECOND);

fn link() -> Link {
    Link {
        connected: true,
        since: NOW.offset(-60 * SECOND),
        peer: "127.0.0.1:4481".to_owned(),
        round_trip_micros: Some(420),
        clock_offset_nanos: Some(-1_500_000),
        last_error: None,
        next_attempt: None,
    }
}

fn source() -> SourceReport {
    SourceReport {
        time: NOW,
        desired: DesiredState::Enabled,
        status: ReplicationStatus::Enabled,
        message: None,
        path: "/data".to_owned(),
        watermark: NOW.offset(-SECOND / 4),
        watcher: WatcherReport {
            kind: WatcherKind::Inotify,
            reason: "no CAP_SYS_ADMIN".to_owned(),
            doubts: vec!["stores through mmap are seen at close".to_owned()],
            watches: Some(1200),
        },
        positions: Positions {
            captured: Seq(9),
            journaled: Seq(9),
            shipped: Seq(8),
            durable: Seq(7),
            applied: Seq(7),
        },
        lag: StageLag { shipped: 0.05, durable: 0.2, applied: 0.2, ..StageLag::default() },
        backlog_records: 2,
        store_bytes: 12 << 20,
        progress: None,
        blocked_by: Vec::new(),
        skipped: Skipped::default(),
        link: link(),
        counters: Counters { bytes_changed: 1000, bytes_shipped: 250, ..Counters::default() },
        last_error: None,
        verification: Default::default(),
    }
}

fn destination() -> DestinationReport {
    DestinationReport {
        time: NOW,
        path: "/replica".to_owned(),
        last_replicated: Some(NOW.offset(-SECOND / 4)),
        last_consistent: Some(NOW.offset(-SECOND / 4)),
        time_since_last_sync: Some(0.25),
        applied: BatchId(41),
        durable: BatchId(42),
        objects: 100_000,
        orphans: 0,
        enforcement: Enforcement {
            kind: EnforcementKind::Mount,
            reason: "even root gets EROFS".to_owned(),
        },
        abilities: Abilities {
            chown: true,
            xattrs: true,
            privileged_xattrs: true,
            devices: true,
            handles: true,
            links_max: None,
            name_max: None,
        },
        shortfalls: Shortfalls::default(),
        staged_bytes: 0,
        arriving: Vec::new(),
        stalled: None,
        link: link(),
        last_error: None,
    }
}

fn status() -> Status {
    Status {
        source_file_system_id: "fs-01234567".parse().unwrap(),
        destination_file_system_id: "fs-89abcdef".parse().unwrap(),
        source_file_system_region: "xx-local".to_owned(),
        destination_file_system_region: "xx-local".to_owned(),
        creation_time: Timestamp(0),
        status: ReplicationStatus::Enabled,
        status_message: None,
        source: Some(source()),
        destination: Some(destination()),
    }
}

#[test]
fn a_healthy_page() {
    assert_eq!(
        page(&[status()], NOW),
        "\
fs-01234567 → fs-89abcdef  ENABLED
  source          /data
  replica         /replica
  since           1970-01-01T00:00:00.000Z
  replicated      every change before 2026-11-21T08:15:29.750Z, 250 ms ago
  consistent      equal to the source as of 2026-11-21T08:15:29.750Z
  backlog         2 records, stores 12.0 MiB
  positions       captured  9
                  journaled 9, 0 s behind
                  shipped   8, 50 ms behind
                  durable   7, 200 ms behind
                  applied   7, 200 ms behind
  watcher         inotify (no CAP_SYS_ADMIN), 1,200 watches
  doubts          stores through mmap are seen at close
  traffic         1000 B changed, 250 B shipped (shipped ÷ changed: 0.250), 0 B on the wire
                  0 events, 0 records, 0 objects shipped
                  0 batches, 0 of them exact; 0 gaps, 0 rescans, 0 sessions
  read-only       by mount (even root gets EROFS)
  held            100,000 objects, 0 B staged, 0 being moved; batch 42 durable, 41 applied
  verified        never
  link            connected with 127.0.0.1:4481 for 1 min 0 s, round trip 0.4 ms, replica's clock -1.5 ms"
    );
}

#[test]
fn an_initial_sync_says_what_it_waits_for() {
    let mut status = status();
    status.status = ReplicationStatus::Enabling;
    if let (Some(source), Some(destination)) = (&mut status.source, &mut status.destination) {
        destination.last_replicated = None;
        source.watermark = Timestamp::NEVER;
        source.blocked_by = vec![Blocker {
            reason: "large file".to_owned(),
            path: Some("a/big".to_owned()),
            bytes_left: Some(3 << 30),
            since: NOW.offset(-90 * SECOND),
        }];
        source.progress = Some(Progress {
            walk_complete: false,
            objects_found: 1000,
            bytes_found: 4 << 30,
            objects_done: 12,
            bytes_done: 1 << 30,
            bytes_per_second: 256.0 * 1024.0 * 1024.0,
            objects_per_second: 3.4,
            seconds_left: Some(12.0),
        });
    }
    let text = page(&[status], NOW);
    for line in [
        "fs-01234567 → fs-89abcdef  ENABLING",
        "  replicated      nothing is promised before the initial sync is done",
        "  blocked by      large file a/big, 3.0 GiB left, for 1 min 30 s",
        "  progress        12 of 1,000 files, 1.0 GiB of 4.0 GiB found so far, 256.0 MiB/s, 3 files/s, 12 s left",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn doubt_and_damage_are_visible() {
    let mut status = status();
    status.status = ReplicationStatus::Error;
    status.status_message = Some("the replica's disk is full".to_owned());
    if let (Some(source), Some(destination)) = (&mut status.source, &mut status.destination) {
        source.time = NOW.offset(-3600 * SECOND);
        source.link.connected = false;
        source.link.last_error = Some("no answer".to_owned());
        source.link.next_attempt = Some(NOW.offset(3 * SECOND));
        source.skipped.fifos = 2;
        source.skipped.unreadable = (0..7)
            .map(|n| PathError { path: format!("f{n}"), error: "EACCES".to_owned() })
            .collect();
        destination.enforcement.kind = EnforcementKind::None;
        destination.abilities.chown = false;
        destination.shortfalls.ownership = 5;
        destination.stalled = Some("no space left".to_owned());
        destination.last_error =
            Some(TimedError { time: NOW.offset(-SECOND), error: "ENOSPC".to_owned() });
    }
    let text = page(&[status], NOW);
    for line in [
        "fs-01234567 → fs-89abcdef  ERROR: the replica's disk is full",
        "  source          /data (last heard of 1 h 0 min ago; what stands here of it is as old)",
        "  skipped         2 FIFOs",
        "  not readable    f6: EACCES",
        "                  … and 2 more, see --json",
        "  read-only       NOT ENFORCED (even root gets EROFS)",
        "  STALLED         no space left",
        "  cannot hold     owners",
        "  NOT HELD        owner or group of 5 objects",
        "  link            NOT CONNECTED with 127.0.0.1:4481 for 1 min 0 s, round trip 0.4 ms, replica's clock -1.5 ms: no answer; next attempt in 3.0 s",
        "  replica error   ENOSPC (1.0 s ago)",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn one_side_alone_renders() {
    let mut status = status();
    status.source = None;
    let text = page(&[status.clone()], NOW);
    assert!(text.contains("  source          never heard of\n"), "{text}");
    assert!(text.contains("2026-11-21T08:15:29.750Z, 250 ms ago"), "{text}");
    status.destination = None;
    assert!(page(&[status], NOW).contains("replica         never heard of"));
    assert_eq!(page(&[], NOW), "no replication configuration here");
}

/// What a side last heard of the other says "connected", whatever came since.
#[test]
fn a_connection_that_is_away_is_away_on_both_sides() {
    let mut status = status();
    if let (Some(source), Some(destination)) = (&mut status.source, &mut status.destination) {
        source.time = NOW.offset(-3600 * SECOND);
        destination.time_since_last_sync = Some(3600.5);
        destination.link.connected = false;
        destination.link.last_error = Some("timed out".to_owned());
    }
    let text = page(&[status.clone()], NOW);
    assert!(text.contains("NOT CONNECTED") && text.ends_with(": timed out"), "{text}");
    assert!(text.contains("Z, 1 h 0 min ago"), "the age is of now: {text}");
    if let (Some(source), Some(destination)) = (&mut status.source, &mut status.destination) {
        source.link.connected = false;
        source.link.next_attempt = Some(NOW.offset(-1));
        destination.link.connected = true;
    }
    assert!(page(&[status], NOW).ends_with("; trying now"));
}
