//! A control without machinery, whose replications show all that the console can
//! show at once: what real ones hardly ever do together.

use std::sync::{Arc, Mutex};

use replicator_common::api::{Api, ApiOptions};
use replicator_common::control::{
    Control, ControlError, CreateRequest, DeletionMode, Patience, Side,
};
use replicator_common::id::FileSystemId;
use replicator_common::registry::Registry;
use replicator_common::status::{DesiredState, FailoverReport, Status};
use replicator_common::time::Timestamp;
use serde_json::{Value, json};

use crate::mounts::Scratch;

/// A name that would be an element, if a page took it for markup.
pub const HOSTILE: &str = "<img src=x onerror=\"document.title='owned'\">";

const SECOND: i64 = 1_000_000_000;

/// See the module.
#[derive(Debug, Default)]
pub struct Showcase {
    /// What was asked for.
    pub asked: Mutex<Vec<String>>,
    /// Which side's daemon it plays; both when `None`.
    pub side: Option<Side>,
}

impl Showcase {
    /// An API of it. Its registry is empty, and nothing is ever entered there.
    pub fn api(self: &Arc<Self>) -> Api {
        let state = Scratch::new("showcase");
        let registry = Registry::open(state.path()).unwrap();
        Api::new(self.clone(), Arc::new(registry), ApiOptions::default())
    }

    fn note<T>(&self, what: String) -> Result<T, ControlError> {
        self.asked.lock().unwrap().push(what);
        Err(ControlError::Conflict("this is a showcase".to_owned()))
    }
}

impl Control for Showcase {
    fn side(&self) -> Side {
        self.side.unwrap_or(Side::Both)
    }

    fn create(&self, _: &CreateRequest) -> Result<Status, ControlError> {
        self.note("create".to_owned())
    }

    fn list(&self) -> Vec<Status> {
        all(Timestamp::now().0)
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        self.note(format!("delete {source} {mode:?}"))
    }

    fn wait(&self, source: &FileSystemId, _: Patience<'_>) -> Result<Timestamp, ControlError> {
        self.note(format!("wait {source}"))
    }

    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError> {
        self.note(format!("{desired:?} {source}"))
    }

    fn accept_deletions(&self, source: &FileSystemId) -> Result<Status, ControlError> {
        self.note(format!("accept {source}"))
    }
}

fn all(now: i64) -> Vec<Status> {
    let values = [healthy(now), syncing(now), halted(now), cut_off(now)];
    values.into_iter().map(|value| serde_json::from_value(value).unwrap()).collect()
}

/// A replication in which nothing is to be said; the watermark is `behind` seconds
/// old.
fn base(number: u64, now: i64, behind: f64, paths: [&str; 2]) -> Value {
    let watermark = now - (behind * 1e9) as i64;
    let link = json!({
        "Connected": true, "Since": now - 90_000 * SECOND, "Peer": "10.20.0.7:4481",
        "RoundTripMicros": 84_300, "ClockOffsetNanos": 1_800_000, "LastError": null,
        "NextAttempt": null,
    });
    let verification = json!({
        "LastVerifiedTimestamp": now - 7_400 * SECOND, "Pass": 12, "Ended": now - 7_000 * SECOND,
        "NextPass": now + 79_000 * SECOND, "Objects": 1_204_233, "ObjectsExpected": 1_204_233,
    });
    json!({
        "SourceFileSystemId": format!("fs-{:017x}", 0x0a1b_2c3d_4e5f_0000_u64 + number),
        "DestinationFileSystemId": format!("fs-{:017x}", 0x0f9e_8d7c_6b5a_0000_u64 + number),
        "SourceFileSystemRegion": "xx-local", "DestinationFileSystemRegion": "xx-far-2",
        "CreationTime": now - 400_000 * SECOND + number as i64, "Status": "ENABLED",
        "StatusMessage": null,
        "Source": {
            "Time": now, "Desired": "ENABLED", "Status": "ENABLED", "Message": null,
            "Path": paths[0], "Watermark": watermark,
            "Watcher": {
                "Kind": "fanotify", "Reason": "a mark on the whole file system",
                "Doubts": [], "Watches": null,
            },
            "Positions": {
                "Captured": 88_412_901, "Journaled": 88_412_901, "Shipped": 88_412_880,
                "Durable": 88_412_790, "Applied": 88_412_790,
            },
            "Lag": { "Journaled": 0.0, "Shipped": 0.012, "Durable": behind, "Applied": behind },
            "BacklogRecords": 111, "StoreBytes": 48_300_000, "Progress": null, "BlockedBy": [],
            "Skipped": { "Sockets": 3 }, "Link": link,
            "Counters": {
                "Events": 91_002_113, "Records": 88_412_901, "Batches": 411_020,
                "ExactBatches": 409_871, "ObjectsShipped": 5_120_400,
                "BytesChanged": 912_000_000_000_u64, "BytesShipped": 402_000_000_000_u64,
                "BytesWired": 404_500_000_000_u64, "Gaps": 1, "Rescans": 1, "Sessions": 4,
            },
            "LastError": null, "Verification": verification,
        },
        "Destination": {
            "Time": now, "Path": paths[1], "LastReplicated": watermark,
            "LastConsistent": watermark, "TimeSinceLastSync": behind, "Applied": 411_020,
            "Durable": 411_020, "Objects": 1_204_233, "Orphans": 0,
            "Enforcement": { "Kind": "mount", "Reason": "a read-only bind mount" },
            "Abilities": {
                "Chown": true, "Xattrs": true, "PrivilegedXattrs": true, "Devices": true,
                "Handles": true,
            },
            "Shortfalls": {}, "StagedBytes": 0, "Arriving": [], "Stalled": null, "Link": link,
            "LastError": null,
        },
    })
}

fn healthy(now: i64) -> Value {
    let mut value = base(1, now, 0.23, ["/srv/projects", "/mnt/replica/projects"]);
    let verification = &mut value["Source"]["Verification"];
    verification["Running"] = json!(true);
    verification["Pass"] = json!(13);
    verification["Objects"] = json!(402_119);
    verification["Bytes"] = json!(88_000_000_000_u64);
    verification["NextPass"] = json!(null);
    verification["Content"] = json!(1);
    verification["Extra"] = json!(1);
    verification["Repaired"] = json!(1);
    verification["Differences"] = json!([
        { "Kind": "CONTENT", "Path": "assets/render/scene-0041.exr", "Source": "41203312 bytes",
          "Replica": "41203312 bytes, other content from 8192", "Repaired": true,
          "Time": now - 340 * SECOND },
        { "Kind": "EXTRA", "Path": format!("inbox/{HOSTILE}"), "Source": "no such name",
          "Replica": "a file", "Repaired": false, "Time": now - 60 * SECOND },
    ]);
    value
}

fn syncing(now: i64) -> Value {
    let mut value = base(2, now, 0.0, ["/srv/media", "/mnt/replica/media"]);
    value["Status"] = json!("ENABLING");
    value["StatusMessage"] = json!("initial sync");
    value["Destination"]["LastReplicated"] = json!(null);
    value["Destination"]["LastConsistent"] = json!(null);
    let source = &mut value["Source"];
    source["Status"] = json!("ENABLING");
    source["Watermark"] = json!(i64::MIN);
    source["Verification"] = json!({});
    source["Progress"] = json!({
        "WalkComplete": true, "ObjectsFound": 318_220, "BytesFound": 2_400_000_000_000_u64,
        "ObjectsDone": 120_114, "BytesDone": 1_510_000_000_000_u64,
        "BytesPerSecond": 231_000_000.0, "ObjectsPerSecond": 41.0, "SecondsLeft": 3_852.0,
    });
    source["BlockedBy"] = json!([
        { "Reason": "initial sync", "Path": null, "BytesLeft": 890_000_000_000_u64,
          "Since": now - 6_500 * SECOND },
        { "Reason": "large file", "Path": "archive/2026/raw/camera-b/reel-0007-take-12-proxy-uncompressed.mov",
          "BytesLeft": 38_400_000_000_u64, "Since": now - 310 * SECOND },
    ]);
    value["Destination"]["Shortfalls"] = json!({ "Ownership": 12, "Examples": [
        { "Path": format!("people/{HOSTILE}/photo.jpg"), "Error": "Operation not permitted (os error 1)" },
    ]});
    value["Destination"]["Enforcement"] = json!({
        "Kind": "permissions", "Reason": "no CAP_SYS_ADMIN: the owner and root can write",
    });
    value
}

fn halted(now: i64) -> Value {
    let mut value = base(3, now, 754.0, ["/home", "/mnt/replica/home"]);
    value["Status"] = json!("HALTED");
    value["StatusMessage"] = json!(
        "61,204 of 90,113 objects were deleted on the source within ten minutes: the replica does not follow until `replicator resume --accept-deletions`"
    );
    value["Source"]["BacklogRecords"] = json!(182_402);
    value["Source"]["Skipped"]["Unreadable"] = json!([
        { "Path": "anna/.cache/lock", "Error": "Permission denied (os error 13)" },
    ]);
    value
}

fn cut_off(now: i64) -> Value {
    let mut value = base(4, now, 5_230.0, ["/var/lib/warehouse", "/replica"]);
    value["Status"] = json!("PAUSED");
    value["Source"]["Desired"] = json!("PAUSED");
    value["Source"]["BacklogRecords"] = json!(4_120);
    value["Source"]["Watcher"]["Doubts"] =
        json!(["a change through a hard link that comes and goes between two looks is not seen",]);
    for side in ["Source", "Destination"] {
        let link = &mut value[side]["Link"];
        link["Connected"] = json!(false);
        link["Since"] = json!(now - 5_220 * SECOND);
        link["LastError"] = json!("timed out");
        link["NextAttempt"] = json!(now + 3 * SECOND);
    }
    value["Destination"]["Time"] = json!(now - 5_220 * SECOND);
    value["Source"]["LastError"] = json!({
        "Time": now - 5_220 * SECOND, "Error": "the connection to 10.20.0.7:4481 was lost: timed out",
    });
    value
}
