//! The Debian packages, built of the programs under test and installed into a
//! directory that is some host's root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binary;
use crate::mounts::{Scratch, run};

/// The packages.
pub const PACKAGES: [&str; 3] = ["replicator", "replicator-src", "replicator-dst"];

/// A root directory with dpkg's records, and nothing else at first.
#[derive(Debug)]
pub struct Root {
    scratch: Scratch,
}

impl Root {
    /// Nothing is installed in it.
    pub fn empty() -> Self {
        let root = Self { scratch: Scratch::new("root") };
        for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "etc/systemd/system"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        fs::write(root.path().join("var/lib/dpkg/status"), "").unwrap();
        root
    }

    /// All packages are installed in it.
    pub fn installed() -> Self {
        let root = Self::empty();
        root.install(&Packages::build(""));
        root
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// Installs the packages, or upgrades to them; a file of the operator's stays.
    pub fn install(&self, packages: &Packages) {
        let mut dpkg = self.dpkg();
        dpkg.args(["--force-confold", "--install"]).args(&packages.files);
        run(&mut dpkg);
    }

    /// `dpkg`, on this root. What the packages depend on is the machine's.
    pub fn dpkg(&self) -> Command {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", self.path().display()));
        command.args(["--force-depends", "--force-script-chrootless", "--log=/dev/null"]);
        command
    }

    /// Writes a file of it.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Files that `dpkg` takes.
#[derive(Debug)]
pub struct Packages {
    _scratch: Scratch,
    /// One for each of [`PACKAGES`].
    pub files: Vec<PathBuf>,
}

impl Packages {
    /// Builds them as operators do; `suffix` is of their version.
    pub fn build(suffix: &str) -> Self {
        let scratch = Scratch::new("packages");
        let programs = [binary::replicator(), binary::replicator_src(), binary::replicator_dst()];
        let mut build =
            Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/debian/build"));
        build.arg(scratch.path()).env("BIN_DIR", programs[0].parent().unwrap());
        // Nobody waits for a small file here.
        run(build.env("SUFFIX", suffix).env("COMPRESSION", "none"));
        let entries = fs::read_dir(scratch.path()).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|kind| kind == "deb"));
        files.sort();
        assert_eq!(files.len(), PACKAGES.len(), "{files:?}");
        Self { _scratch: scratch, files }
    }
}
