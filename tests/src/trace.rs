//! Which calls that make things durable a program made, and when: by strace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::time::Timestamp;

/// One call, with the file that its descriptor leads to.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// `fdatasync`, `syncfs`, …
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// When it was made.
    pub begin: Timestamp,
    /// When it returned.
    pub end: Timestamp,
}

/// `command` under strace, which writes to `output`. The process that is started
/// is the command's own; strace goes along as its child.
pub fn traced(command: &Command, output: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-D", "-f", "--seccomp-bpf", "-ttt", "-T", "-y", "-qq", "--status=successful"]);
    strace.args(["-e", "trace=fdatasync,fsync,syncfs,sync_file_range", "-e", "signal=none", "-o"]);
    strace.arg(output).arg(command.get_program()).args(command.get_args());
    strace
}

/// The calls that are in strace's output once it has written no more for a while.
pub fn calls(output: &Path) -> Vec<Call> {
    let start = Instant::now();
    let mut size = 0;
    let text = loop {
        thread::sleep(Duration::from_millis(300));
        let text = fs::read_to_string(output).unwrap();
        if text.len() == size || start.elapsed() > Duration::from_secs(10) {
            break text;
        }
        size = text.len();
    };
    text.lines().filter_map(call).collect()
}

/// `12 1700000000.123456 fdatasync(7</state/db>) = 0 <0.000123>`. With
/// `--status=successful` strace prints a call when it has returned, on one line.
fn call(line: &str) -> Option<Call> {
    let (_, rest) = line.trim_start().split_once(' ')?;
    let (begin, rest) = rest.trim_start().split_once(' ')?;
    let (name, arguments) = rest.split_once('(')?;
    let (_, path) = arguments.split_once('<')?;
    let (path, _) = path.split_once('>')?;
    let took = rest.rsplit_once('<')?.1.strip_suffix('>')?;
    let begin = nanoseconds(begin)?;
    let end = begin.checked_add(nanoseconds(took)?)?;
    let (begin, end) = (Timestamp(begin), Timestamp(end));
    Some(Call { name: name.to_owned(), path: PathBuf::from(path), begin, end })
}

/// Of seconds with a fraction of six digits.
fn nanoseconds(text: &str) -> Option<i64> {
    let (seconds, micros) = text.split_once('.')?;
    (micros.len() == 6).then_some(())?;
    let (seconds, micros): (i64, i64) = (seconds.parse().ok()?, micros.parse().ok()?);
    Some(seconds * 1_000_000_000 + micros * 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = "712  1700000000.123456 syncfs(7</mnt/a b>) = 0 <0.002001>";
        let read = call(line).unwrap();
        assert_eq!((read.name.as_str(), read.path), ("syncfs", PathBuf::from("/mnt/a b")));
        assert_eq!(read.begin, Timestamp(1_700_000_000_123_456_000));
        assert_eq!(read.end, Timestamp(1_700_000_000_125_457_000));
        assert_eq!(call("712 +++ exited with 0 +++"), None);
    }
}
