//! `verify`: a pass of verification, to its end.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use replicator_common::api::client::{Access, Client};
use replicator_common::api::own::{FindingsBody, VerifyBody};
use replicator_common::verification::{Findings, Verification};

use crate::arguments::Verify;
use crate::exit::{Differed, complain, print_line, say, shown, speaks_json};

/// Between two questions.
const POLL: Duration = Duration::from_millis(250);
/// Between two lines of progress, where they do not replace each other.
const PROGRESS: Duration = Duration::from_secs(10);

pub fn run(access: &Access, arguments: &Verify) -> anyhow::Result<()> {
    let client = Client::open(access)?;
    let begun = client.verify(&VerifyBody {
        id: arguments.id.clone(),
        repair: !arguments.no_repair,
        bytes_per_second: arguments.rate,
    })?;
    let id = Some(begun.source_file_system_id);
    let mut progress = Progress::new(arguments.quiet || speaks_json());
    let (mut after, mut lost) = (0, 0);
    loop {
        let body = FindingsBody { id: id.clone(), pass: begun.pass, after };
        let findings = client.findings(&body)?;
        for difference in &findings.differences {
            progress.clear();
            print_line(&serde_json::to_string(difference).context("cannot write JSON")?)?;
        }
        (after, lost) = (findings.next, lost + findings.lost);
        if findings.done {
            progress.clear();
            return conclude(&findings, lost, arguments.quiet);
        }
        progress.show(&findings.verification);
        std::thread::sleep(POLL);
    }
}

fn conclude(findings: &Findings, lost: u64, quiet: bool) -> anyhow::Result<()> {
    let now = &findings.verification;
    if lost > 0 {
        complain(&format!("{lost} differences were found and could not be listed"));
    }
    for error in &now.errors {
        complain(&format!("{} cannot be read: {}", error.path, error.error));
    }
    let found = now.found();
    let summary = format!(
        "{} objects, {} bytes compared; {found} differences ({} missing, {} extra, {} content, {} attributes), {} repaired; {} changing, {} unreadable",
        now.objects,
        now.bytes,
        now.missing,
        now.extra,
        now.content,
        now.attributes,
        now.repaired,
        now.changing,
        now.read_errors
    );
    if found > 0 {
        return Err(Differed(summary).into());
    }
    if now.read_errors > 0 {
        bail!(summary);
    }
    if !quiet {
        say(&summary);
    }
    Ok(())
}

/// How far it is, on standard error.
struct Progress {
    quiet: bool,
    terminal: bool,
    shown: bool,
    last: Instant,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { quiet, terminal, shown: false, last: Instant::now() }
    }

    fn show(&mut self, now: &Verification) {
        if self.quiet || !self.terminal && self.last.elapsed() < PROGRESS {
            return;
        }
        self.last = Instant::now();
        let share = 100.0 * now.objects as f64 / now.objects_expected.max(1) as f64;
        let mut line = format!(
            "{:.0}%: {} of {} objects, {} MiB, {} differences",
            share.min(100.0),
            now.objects,
            now.objects_expected,
            now.bytes >> 20,
            now.found()
        );
        if let Some(why) = &now.waiting {
            line.push_str(&format!("; waits: {why}"));
        }
        if self.terminal {
            // Back to the line's start, and what is left of the last one away.
            eprint!("\r{}\x1b[K", shown(&line));
            self.shown = true;
        } else {
            say(&line);
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprint!("\r\x1b[K");
        }
    }
}
