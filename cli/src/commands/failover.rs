//! `failover`: asks the daemon, or, while none runs, works on its state.

use std::path::{Path, PathBuf};

use anyhow::Context;
use replicator_common::api::client::{Access, Client, ClientError};
use replicator_common::api::own::FailoverBody;
use replicator_common::status::FailoverReport;
use replicator_common::time::Timestamp;

use crate::arguments::Failover;
use crate::exit::{print, say};
use crate::run::services;
use crate::words;

/// `access` is asked for only when a daemon is: what is wrong with it must not stand in
/// the way of a failover that asks none.
pub fn run(
    access: impl FnOnce() -> anyhow::Result<Access>,
    arguments: &Failover,
) -> anyhow::Result<()> {
    let report = match &arguments.state_dir {
        Some(directory) => {
            let directory = destination_state(directory)?;
            services::failover_offline(&directory, arguments.source_file_system_id.as_ref())?
        }
        None => Client::open(&access()?)?
            .failover(&FailoverBody {
                id: arguments.source_file_system_id.as_ref().map(ToString::to_string),
                mode: arguments.deletion_mode.into(),
            })
            .map_err(advise)?,
    };
    for line in tell(&report) {
        say(&line);
    }
    print(&report)
}

fn advise(error: ClientError) -> anyhow::Error {
    let unreachable = matches!(error, ClientError::Unreachable { .. });
    let error = anyhow::Error::new(error);
    if unreachable {
        error.context(
            "failover has to ask the destination's daemon; while none runs, use `replicator failover --state-dir DIR`",
        )
    } else {
        error
    }
}

/// The destination's part of a run's state directory, or the directory itself.
fn destination_state(directory: &Path) -> anyhow::Result<PathBuf> {
    let of_run = directory.join(services::DESTINATION_DIRECTORY);
    for candidate in [of_run.as_path(), directory] {
        match std::fs::metadata(candidate) {
            Ok(found) if found.is_dir() => return Ok(candidate.to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", candidate.display()));
            }
        }
    }
    anyhow::bail!("there is no state directory {}", directory.display())
}

/// The report in words.
pub fn tell(report: &FailoverReport) -> Vec<String> {
    let mut lines = vec![format!("{} is writable now", report.path)];
    lines.push(match (report.last_replicated, report.time_since_last_sync) {
        (Some(time), Some(age)) => {
            format!(
                "replicated: every change before {time} ({} before failover)",
                words::seconds(age)
            )
        }
        (Some(time), None) => format!("replicated: every change before {time}"),
        (None, _) => "the initial sync was never done: the replica is INCOMPLETE".to_owned(),
    });
    if let Some(time) = report.last_consistent {
        lines.push(consistency(time, report.last_replicated));
    }
    lines.extend(not_replicated(report));
    if report.put_back > 0 {
        let objects = words::several(report.put_back, "object", "objects");
        lines
            .push(format!("put back where it had been, since its move had not arrived: {objects}"));
    }
    match &report.lost_and_found {
        Some(directory) => lines.push(format!(
            "set aside in {directory}: {} (manifest.json says what each was to become)",
            words::several(report.set_aside, "item", "items")
        )),
        None => lines.push("nothing had to be set aside".to_owned()),
    }
    lines.extend(report.warnings.iter().map(|warning| format!("WARNING: {warning}")));
    lines
}

fn consistency(time: Timestamp, replicated: Option<Timestamp>) -> String {
    if replicated.is_none_or(|replicated| replicated <= time) {
        format!("the replica equals the source as of {time}")
    } else {
        format!("the last state that equalled one instant of the source: {time}")
    }
}

fn not_replicated(report: &FailoverReport) -> Vec<String> {
    match report.not_replicated_records {
        None => {
            vec!["not replicated: unknown, since the source did not take part".to_owned()]
        }
        Some(0) => vec!["not replicated: nothing".to_owned()],
        Some(records) => {
            let shown = report.not_replicated_paths.iter().take(20);
            let mut lines =
                vec![format!("not replicated: {}", words::several(records, "change", "changes"))];
            lines.extend(shown.map(|path| format!("  {path}")));
            if report.not_replicated_paths.len() > 20 {
                lines.push("  … (all that are known stand in the report)".to_owned());
            }
            lines
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> FailoverReport {
        FailoverReport {
            source_file_system_id: "fs-01234567".parse().unwrap(),
            destination_file_system_id: "fs-89abcdef".parse().unwrap(),
            path: "/replica".to_owned(),
            last_replicated: Some(Timestamp(1_795_248_930_250_000_000)),
            last_consistent: Some(Timestamp(1_795_248_930_250_000_000)),
            time_since_last_sync: Some(0.35),
            lost_and_found: None,
            set_aside: 0,
            put_back: 0,
            not_replicated_records: Some(0),
            not_replicated_paths: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn a_clean_failover() {
        assert_eq!(
            tell(&report()),
            [
                "/replica is writable now",
                "replicated: every change before 2026-11-21T08:15:30.250Z (350 ms before failover)",
                "the replica equals the source as of 2026-11-21T08:15:30.250Z",
                "not replicated: nothing",
                "nothing had to be set aside",
            ]
        );
    }

    #[test]
    fn what_was_lost_is_said() {
        let lossy = FailoverReport {
            last_replicated: None,
            last_consistent: None,
            not_replicated_records: Some(2),
            not_replicated_paths: vec!["a/b".to_owned(), "c".to_owned()],
            lost_and_found: Some("efs-replication-lost+found-fs-01234567-X".to_owned()),
            set_aside: 1,
            put_back: 3,
            warnings: vec!["no sync".to_owned()],
            ..report()
        };
        assert_eq!(
            tell(&lossy),
            [
                "/replica is writable now",
                "the initial sync was never done: the replica is INCOMPLETE",
                "not replicated: 2 changes",
                "  a/b",
                "  c",
                "put back where it had been, since its move had not arrived: 3 objects",
                "set aside in efs-replication-lost+found-fs-01234567-X: 1 item (manifest.json says what each was to become)",
                "WARNING: no sync",
            ]
        );
        let dead = FailoverReport { not_replicated_records: None, ..report() };
        assert!(
            tell(&dead).contains(
                &"not replicated: unknown, since the source did not take part".to_owned()
            )
        );
    }

    #[test]
    fn a_runs_state_directory_holds_the_destinations() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(destination_state(directory.path()).unwrap(), directory.path());
        let inner = directory.path().join(services::DESTINATION_DIRECTORY);
        std::fs::create_dir(&inner).unwrap();
        assert_eq!(destination_state(directory.path()).unwrap(), inner);
        assert!(destination_state(&directory.path().join("none")).is_err());
    }
}
