//! The programs that are compared.

use std::path::Path;
use std::process::Command;

use replicator_tests::binary;
use replicator_tests::process::free_port;
use serde::Serialize;

/// A program that brings a tree to another place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Peer {
    /// This project's.
    Replicator,
    /// `rsync -a`.
    Rsync,
    /// `cp -a`.
    Cp,
}

impl Peer {
    /// In the order in which they take turns.
    pub const ALL: [Self; 3] = [Self::Replicator, Self::Rsync, Self::Cp];

    /// As the tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicator => "replicator",
            Self::Rsync => "rsync -a",
            Self::Cp => "cp -a",
        }
    }

    /// One pass from `source` to `replica` that ends by itself. Replicator
    /// keeps its state in `state`.
    pub fn pass(self, source: &Path, replica: &Path, state: &Path) -> Command {
        match self {
            Self::Replicator => {
                let mut command = replicator(source, replica, state, free_port());
                command.arg("--once");
                command
            }
            Self::Rsync => {
                let mut command = Command::new("rsync");
                // The slash makes it copy what is in the directory.
                command.arg("-a").arg(source.join("")).arg(replica);
                command
            }
            Self::Cp => {
                let mut command = Command::new("cp");
                command.arg("-a").arg(source.join(".")).arg(replica);
                command
            }
        }
    }
}

/// `replicator run`.
pub fn replicator(source: &Path, replica: &Path, state: &Path, port: u16) -> Command {
    let mut command = Command::new(binary::replicator_optimised());
    command.arg("run").arg(source).arg(replica).arg("--state-dir").arg(state);
    command.args(["--api", &format!("127.0.0.1:{port}")]);
    command.env("RUST_LOG", "warn");
    command
}
