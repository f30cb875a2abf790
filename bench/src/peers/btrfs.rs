//! `btrfs send | btrfs receive`: whole first, then from snapshot to snapshot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Result, bail};

use crate::disk::Kind;
use crate::peers::{Abilities, PASS_LIMIT, Peer, Session, first_line};
use crate::site::{End, Site};

/// btrfs-progs.
pub struct Btrfs;

impl Peer for Btrfs {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn settings(&self) -> &'static str {
        "`btrfs subvolume snapshot -r`, `btrfs send [-p BEFORE] | btrfs receive`"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("btrfs").arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities { mirrors: true, only_on: Some(Kind::Btrfs), ..Abilities::default() }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Snapshots { site: site.clone(), made: 0 }))
    }
}

struct Snapshots {
    site: Arc<Site>,
    made: u32,
}

/// A snapshot's name beside `tree`. Others may have left theirs on the source.
fn snapshot(tree: &Path, number: u32) -> PathBuf {
    tree.with_file_name(format!("snapshot-{number}"))
}

/// Names what is given, takes the snapshot, sends it.
const SCRIPT: &str = r#"
set -eo pipefail
source="$0" to="$1" now="$2" before="$3"
if [ -e "$now" ]; then btrfs -q subvolume delete "$now"; fi
btrfs -q subvolume snapshot -r "$source" "$now"
btrfs -q send ${before:+-p "$before"} "$now" | btrfs -q receive "$to"
"#;

impl Session for Snapshots {
    fn pass(&mut self) -> Result<()> {
        let site = &self.site;
        let (now, to) = (snapshot(&site.source, self.made + 1), site.replica.with_file_name(""));
        let mut command = site.command(End::Source, "bash")?;
        command.arg("-c").arg(SCRIPT).arg(&site.source).arg(to).arg(now);
        if self.made > 0 {
            command.arg(snapshot(&site.source, self.made));
        }
        site.run(command, &[0], PASS_LIMIT)?;
        self.made += 1;
        Ok(())
    }

    fn follow(&mut self) -> Result<()> {
        bail!("btrfs send is not run in a loop here: each pass is another subvolume")
    }

    fn rest(&mut self) -> Result<()> {
        Ok(())
    }

    fn replica(&self) -> Option<PathBuf> {
        Some(snapshot(&self.site.replica, self.made))
    }
}
