//! Source and destination in one process, whose wall clock is the test's.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use replicator_common::control::{
    Control, ControlError, CreateRequest, DeletionMode, Patience, WatcherChoice,
};
use replicator_common::id::FileSystemId;
use replicator_common::status::{DesiredState, SourceReport};
use replicator_common::time::Timestamp;
use replicator_dst::service::{DestinationOptions, DestinationService};
use replicator_src::clock::Wall;
use replicator_src::service::{SourceOptions, SourceService};

const HOUR: i64 = 3600 * 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(60);

/// A wall clock and by how much it is wrong.
#[derive(Clone, Default)]
struct Hands(Arc<AtomicI64>);

impl Hands {
    fn turn(&self, nanos: i64) {
        self.0.fetch_add(nanos, Ordering::SeqCst);
    }

    fn now(&self) -> Timestamp {
        Timestamp::now().offset(self.0.load(Ordering::SeqCst))
    }
}

fn open_source(base: &Path, hands: &Hands) -> Arc<SourceService> {
    let hands = hands.clone();
    let wall = Wall::new(move || hands.now());
    let options = SourceOptions { wall, ..SourceOptions::new(base.join("source-state")) };
    SourceService::open(options).unwrap()
}

fn report(source: &SourceService) -> SourceReport {
    source.list().remove(0).source.unwrap()
}

/// Waits until `holds` says so of the source's report.
fn until(source: &SourceService, what: &str, holds: impl Fn(&SourceReport) -> bool) {
    let begin = Instant::now();
    while !holds(&report(source)) {
        assert!(begin.elapsed() < PATIENCE, "{what}: {:?}", report(source));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// While shipping is paused, nothing that is done now can be waited for.
fn assert_waits_for_what_is_done_now(source: &SourceService, id: &FileSystemId, base: &Path) {
    source.set_desired(id, DesiredState::Paused).unwrap();
    fs::write(base.join("source/late"), "late").unwrap();
    let waited = source.wait(id, Patience::of(Duration::from_millis(700)));
    assert!(matches!(waited, Err(ControlError::TimedOut(_))), "{waited:?}");
    assert!(!base.join("replica/late").exists());
    source.set_desired(id, DesiredState::Enabled).unwrap();
    source.wait(id, Patience::of(PATIENCE)).unwrap();
    assert_eq!(fs::read(base.join("replica/late")).unwrap(), b"late");
    fs::remove_file(base.join("source/late")).unwrap();
    source.wait(id, Patience::of(PATIENCE)).unwrap();
    assert!(!base.join("replica/late").exists());
}

#[test]
fn trap_17_waiting_goes_by_order_and_not_by_the_wall_clock() {
    let base = tempfile::tempdir().unwrap();
    let base = base.path().canonicalize().unwrap();
    fs::create_dir(base.join("source")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let options = DestinationOptions {
        state_dir: base.join("destination-state"),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        advertise: None,
        region: "xx-local".to_owned(),
        hook: None,
        registry: None,
    };
    let destination = {
        let _context = runtime.enter();
        DestinationService::open(options).unwrap()
    };
    let hands = Hands::default();
    let source = open_source(&base, &hands);
    let token = destination.token(&base.join("replica"), PATIENCE, false).unwrap();
    let request = CreateRequest {
        source: base.join("source"),
        token: token.to_string(),
        devices: false,
        watcher: WatcherChoice::Inotify,
    };
    let id = source.create(&request).unwrap().source_file_system_id;
    source.wait(&id, Patience::of(PATIENCE)).unwrap();

    hands.turn(-HOUR);
    assert_waits_for_what_is_done_now(&source, &id, &base);
    let claim = report(&source).watermark;
    assert!(claim > hands.now(), "the claim stays: {claim}");
    until(&source, "it says why", |report| {
        report.message.as_ref().is_some_and(|text| text.contains("clock was set back"))
    });

    // A source that starts before the time at which it ended.
    source.shutdown();
    drop(source);
    hands.turn(-HOUR);
    let source = open_source(&base, &hands);
    assert_waits_for_what_is_done_now(&source, &id, &base);
    let again = report(&source).watermark;
    assert_eq!(again, claim, "the claim stays over a restart");

    // The clock passes the claim: it moves on, and tells the truth again.
    hands.turn(2 * HOUR + HOUR / 60);
    until(&source, "the claim moves on", |report| report.watermark > claim);
    source.wait(&id, Patience::of(PATIENCE)).unwrap();
    assert!(report(&source).watermark <= hands.now(), "a claim about the future");

    source.shutdown();
    drop(source);
    // Else the read-only mount stays after the test.
    destination.delete(&id, DeletionMode::LocalConfigurationOnly).unwrap();
    runtime.block_on(destination.shutdown());
}
