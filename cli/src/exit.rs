//! How commands end: one line for the operator, an exit status for scripts.

use std::borrow::Cow;
use std::io::Write;
use std::process::ExitCode;
use std::sync::OnceLock;

use anyhow::Context;
use replicator_common::api::client::ClientError;
use replicator_common::control::ControlError;
use serde::Serialize;

/// The arguments make no sense together; exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The command has done its work, and what it found is to be told by exit
/// status 2.
#[derive(Debug)]
pub struct Differed(pub String);

impl std::fmt::Display for Differed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Differed {}

/// Whether all is said as JSON.
static JSON: OnceLock<bool> = OnceLock::new();

/// From now on all is said as JSON, or nothing is. The first word counts.
pub fn speak_json(json: bool) {
    let _ = JSON.set(json);
}

/// Whether all is said as JSON.
pub fn speaks_json() -> bool {
    JSON.get().is_some_and(|json| *json)
}

/// Says in one line why a command failed, and with what status it ends; as JSON
/// for who wants that.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if is_closed_pipe(&error) {
        // Whoever read our output has read enough.
        return ExitCode::SUCCESS;
    }
    let code = code(&error);
    let line = one_line(&format!("{error:#}"));
    match speaks_json() {
        true => write(&serde_json::json!({ "Error": line, "ExitStatus": code }).to_string()),
        false => write(&format!("replicator: {}", shown(&line))),
    }
    ExitCode::from(code)
}

/// Says in one line what went wrong, and goes on.
pub fn complain(error: &str) {
    let line = one_line(error);
    match speaks_json() {
        true => write(&serde_json::json!({ "Error": line }).to_string()),
        false => write(&format!("replicator: {}", shown(&line))),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Text as it may stand on a terminal: names of files may hold anything, and are their
/// users'. What would move the cursor, or more, is written out.
pub fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let written = |letter: char| match letter.is_control() {
        true => letter.escape_default().collect(),
        false => String::from(letter),
    };
    text.chars().map(written).collect::<String>().into()
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<Usage>() || cause.is::<Differed>() {
            return 2;
        }
        let timeout = cause.downcast_ref::<ClientError>().is_some_and(ClientError::is_timeout)
            || matches!(cause.downcast_ref(), Some(ControlError::TimedOut(_)));
        if timeout {
            return 3;
        }
    }
    1
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// A line for the operator; none for machines, which have the answer.
pub fn say(line: &str) {
    if !speaks_json() {
        write(&shown(line));
    }
}

/// When nobody can read it, it is lost.
fn write(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// An answer for machines: JSON on standard output.
pub fn print(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write the answer as JSON")?;
    print_line(&text)
}

/// A line on standard output.
pub fn print_line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_reach_the_terminal_raw() {
        assert_eq!(shown("dir/ä b"), "dir/ä b");
        assert_eq!(shown("x\n  forged\u{1b}]0;t\u{7}"), "x\\n  forged\\u{1b}]0;t\\u{7}");
    }

    #[test]
    fn codes() {
        let usage = anyhow::Error::new(Usage("x".to_owned()));
        assert_eq!(code(&usage), 2);
        assert_eq!(code(&anyhow::Error::new(Differed("x".to_owned()))), 2);
        let late = anyhow::Error::new(ControlError::TimedOut("x".to_owned())).context("wait");
        assert_eq!(code(&late), 3);
        let late = anyhow::Error::new(ClientError::TimedOut("x".to_owned()));
        assert_eq!(code(&late), 3);
        assert_eq!(code(&anyhow::anyhow!("x")), 1);
    }
}
