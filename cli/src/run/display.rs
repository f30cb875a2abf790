//! What `run` shows: a bar and a live line on a terminal, plain lines every
//! few seconds elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use replicator_common::status::{Progress, Status};
use replicator_common::time::Timestamp;
use tracing_subscriber::fmt::MakeWriter;

use crate::exit::{say, shown, speaks_json};
use crate::words::{bytes, count, rate, seconds, several, time};

/// How often an initial sync is told of where there is no terminal.
const PLAIN_PERIOD: Duration = Duration::from_secs(5);
/// How often continuous replication is, as long as nothing changes.
const QUIET_PERIOD: Duration = Duration::from_secs(300);

/// Standard error, with or without a terminal behind it.
pub struct Display {
    bar: ProgressBar,
    terminal: bool,
    last: Mutex<Option<Last>>,
}

/// The last plain line.
struct Last {
    at: Instant,
    topic: String,
}

impl Display {
    pub fn new() -> Self {
        let terminal = io::stderr().is_terminal() && !speaks_json();
        let target =
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bar: ProgressBar::with_draw_target(None, target), terminal, last: Mutex::new(None) }
    }

    /// Where log lines go, so that they do not tear the bar.
    pub fn log_writer(&self) -> LogWriter {
        LogWriter(self.bar.clone())
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| say(text));
    }

    /// A line in the bar's place; nothing without a terminal.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bar.set_style(plain_style());
            self.bar.set_message(shown(text).into_owned());
            self.bar.tick();
        }
    }

    /// Shows how replication stands.
    pub fn show(&self, status: &Status) {
        let progress = status.source.as_ref().and_then(|source| source.progress.as_ref());
        if !self.terminal {
            return self.show_plainly(status, progress);
        }
        match progress {
            Some(progress) if is_counted(progress) => self.show_bar(status, progress),
            Some(progress) => {
                self.note(&format!("{} {}", status.status.as_str(), in_short(progress)))
            }
            None => self.note(&line(status)),
        }
    }

    /// Takes away what is not to stay.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn show_bar(&self, status: &Status, progress: &Progress) {
        self.bar.set_style(bar_style());
        // Small files cost more than their bytes: each counts as 4 KiB.
        let weigh = |objects: u64, bytes: u64| bytes.saturating_add(objects.saturating_mul(4096));
        self.bar.set_length(weigh(progress.objects_found, progress.bytes_found).max(1));
        self.bar.set_position(weigh(progress.objects_done, progress.bytes_done));
        self.bar.set_message(format!("{} {}", status.status.as_str(), in_short(progress)));
        self.bar.tick();
    }

    fn show_plainly(&self, status: &Status, progress: Option<&Progress>) {
        let word = status.status.as_str();
        let (text, topic, period) = match progress {
            Some(progress) => {
                (format!("{word} {}", in_short(progress)), word.to_owned(), PLAIN_PERIOD)
            }
            None => {
                let message = status.status_message.as_deref().unwrap_or_default();
                (line(status), format!("{word} {message}"), QUIET_PERIOD)
            }
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let due =
            last.as_ref().is_none_or(|last| last.topic != topic || last.at.elapsed() >= period);
        if due {
            say(&text);
            *last = Some(Last { at: Instant::now(), topic });
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {percent:>3} % {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn plain_style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Whether there is a total, to which what is done is a share: what was found so far is none.
fn is_counted(progress: &Progress) -> bool {
    progress.walk_complete && progress.objects_found > 0
}

fn in_short(progress: &Progress) -> String {
    let left = match progress.seconds_left {
        Some(left) if progress.walk_complete => format!(", {} left", seconds(left)),
        _ => String::new(),
    };
    let of_all = |done, all, words: fn(u64) -> String| match is_counted(progress) && all > 0 {
        true => format!("{}/{}", words(done), words(all)),
        false => words(done),
    };
    format!(
        "{} files, {}, {}/s{left}",
        of_all(progress.objects_done, progress.objects_found, count),
        of_all(progress.bytes_done, progress.bytes_found, bytes),
        bytes(rate(progress.bytes_per_second)),
    )
}

/// The live status line.
fn line(status: &Status) -> String {
    let word = status.status.as_str();
    let mut parts = vec![match &status.status_message {
        Some(message) => format!("{word}: {message}"),
        None => word.to_owned(),
    }];
    if let Some(source) = &status.source {
        if source.watermark != Timestamp::NEVER {
            let age = time(source.time.since(source.watermark));
            parts.push(format!("replicated up to {age} ago"));
        }
        parts.push(format!("{} waiting", several(source.backlog_records, "record", "records")));
        let counters = &source.counters;
        parts.push(format!(
            "{} batches, {} shipped",
            count(counters.batches),
            bytes(counters.bytes_shipped)
        ));
        if let Some(blocker) = source.blocked_by.first() {
            let path = blocker.path.as_deref().map(|path| format!(" {path}")).unwrap_or_default();
            parts.push(format!("waits for {}{path}", blocker.reason));
        }
        if !source.link.connected {
            parts.push("not connected".to_owned());
        }
    }
    parts.join(", ")
}

/// Writes log lines above the bar.
#[derive(Clone)]
pub struct LogWriter(ProgressBar);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_is_told_once_there_is_one() {
        let mut progress = Progress {
            walk_complete: false,
            objects_found: 0,
            bytes_found: 0,
            objects_done: 0,
            bytes_done: 0,
            bytes_per_second: 0.0,
            objects_per_second: 0.0,
            seconds_left: Some(7.0),
        };
        assert_eq!(in_short(&progress), "0 files, 0 B, 0 B/s");
        (progress.objects_done, progress.objects_found) = (12, 1_000);
        assert_eq!(in_short(&progress), "12 files, 0 B, 0 B/s");
        (progress.objects_found, progress.walk_complete) = (20_351, true);
        assert_eq!(in_short(&progress), "12/20,351 files, 0 B, 0 B/s, 7.0 s left");
        progress.objects_done = 20_351;
        assert_eq!(in_short(&progress), "20,351/20,351 files, 0 B, 0 B/s, 7.0 s left");
    }
}
