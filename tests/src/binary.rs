//! Where the programs under test are.
//!
//! Cargo tells a test of the programs of its own package only, and `cargo test
//! --workspace` need not have built those of other packages. So the tests ask
//! cargo to build them, once a process, in the profile that they were built in
//! themselves: a fraction of a second when nothing changed. Tests of a
//! packaged build set `REPLICATOR_BIN_DIR` to a directory that holds them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The command line.
pub fn replicator() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| locate("replicator", "replicator", debug_build()))
}

/// The source's daemon.
pub fn replicator_src() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| locate("replicator-src", "replicator-src", debug_build()))
}

/// The destination's daemon.
pub fn replicator_dst() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| locate("replicator-dst", "replicator-dst", debug_build()))
}

/// The command line with all optimisation, for benchmarks.
pub fn replicator_optimised() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| locate("replicator", "replicator", false))
}

fn debug_build() -> bool {
    cfg!(debug_assertions)
}

fn locate(package: &str, binary: &str, debug: bool) -> PathBuf {
    if let Some(directory) = std::env::var_os("REPLICATOR_BIN_DIR") {
        let path = PathBuf::from(directory).join(binary);
        assert!(path.exists(), "REPLICATOR_BIN_DIR holds no {binary}");
        return path;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--message-format=json-render-diagnostics"]);
    build.args(["--package", package, "--bin", binary]);
    build.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    if !debug {
        build.arg("--release");
    }
    let output = build.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{build:?}: {}", output.status);
    let messages = String::from_utf8(output.stdout).unwrap();
    executable(&messages, binary).unwrap_or_else(|| panic!("{build:?} made no {binary}"))
}

/// Cargo's messages name each artifact it made, or found up to date.
fn executable(messages: &str, binary: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let named = message["target"]["name"] == binary;
        named.then(|| message["executable"].as_str().map(PathBuf::from))?
    })
}
