//! Events by a command: words in the environment, JSON on standard input.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::Access;
use rustix::process::{Pid, Signal, kill_process_group};

use super::{Channel, Event, NotifyError};
use crate::config::NotifyConfig;
use crate::sys::quiet;

/// Between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(20);

pub(super) struct Command {
    words: Vec<String>,
    time: Duration,
}

impl Command {
    /// As configured; `None` when there is none.
    pub(super) fn new(config: &NotifyConfig) -> Option<Self> {
        (!config.command.is_empty())
            .then(|| Self { words: config.command.clone(), time: config.command_timeout.get() })
    }

    /// Whether there is such a program. (One without a slash is looked for when it is
    /// run.)
    pub(super) fn check(config: &NotifyConfig) -> Result<(), NotifyError> {
        let Some(program) = config.command.first().filter(|word| word.contains('/')) else {
            return Ok(());
        };
        rustix::fs::access(program.as_str(), Access::EXEC_OK).map_err(|error| {
            let reason = format!("cannot be run: {error}");
            NotifyError::Invalid { path: program.into(), reason }
        })
    }

    fn spawn(&self, event: &Event) -> Result<Child, String> {
        let (program, arguments) = self.words.split_first().ok_or("no command")?;
        let lag = event.time_since_last_sync.map(|lag| lag.to_string()).unwrap_or_default();
        let from = event.recovered_from.map_or("", |kind| kind.as_str());
        let mut command = std::process::Command::new(program);
        quiet::wake_as_usual(&mut command);
        command
            .args(arguments)
            .env("REPLICATOR_EVENT", event.kind.as_str())
            .env("REPLICATOR_EVENT_ID", &event.id)
            .env("REPLICATOR_RECOVERED_FROM", from)
            .env("REPLICATOR_TIME", event.time.to_rfc3339())
            .env("REPLICATOR_SIDE", event.side)
            .env("REPLICATOR_SOURCE_FILE_SYSTEM_ID", &event.source_file_system_id)
            .env("REPLICATOR_DESTINATION_FILE_SYSTEM_ID", &event.destination_file_system_id)
            .env("REPLICATOR_STATUS", event.status)
            // No variable can hold NUL.
            .env("REPLICATOR_MESSAGE", event.message.replace('\0', " "))
            .env("REPLICATOR_TIME_SINCE_LAST_SYNC", lag)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A group of its own: what it starts ends with it when it is ended.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot run {program}: {error}"))
    }

    fn wait(&self, child: &mut Child) -> Result<ExitStatus, String> {
        let end = Instant::now() + self.time;
        loop {
            if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
                return Ok(status);
            }
            if Instant::now() >= end {
                if let Some(group) = Pid::from_raw(child.id() as i32) {
                    // It may have ended just now.
                    let _ = kill_process_group(group, Signal::KILL);
                }
                let _ = child.wait();
                return Err(format!("it took longer than {} s and was ended", self.time.as_secs()));
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Channel for Command {
    const NAME: &'static str = "command";
    // What it did before it failed, nobody knows.
    const RETRIES: bool = false;

    fn tell(&self, event: &Event) -> Result<(), String> {
        let body = serde_json::to_vec(event).map_err(|error| error.to_string())?;
        let mut child = self.spawn(event)?;
        if let Some(mut stdin) = child.stdin.take() {
            // Less than a pipe holds (the message is cut), so this never waits; a
            // command may as well not read it.
            let _ = stdin.write_all(&body);
        }
        match self.wait(&mut child)? {
            status if status.success() => Ok(()),
            status => Err(format!("it ended with {status}")),
        }
    }
}

#[cfg(test)]
mod tests;
