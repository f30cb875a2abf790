//! Amazon's own clients, unmodified: the AWS CLI and boto3.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::process::{Ended, run_to_end};

/// How long installing them may take.
const INSTALL: Duration = Duration::from_secs(600);
/// How long one command may take.
const COMMAND: Duration = Duration::from_secs(60);
/// What is installed: all of it, each in one version.
const REQUIREMENTS: &str = include_str!("../aws/requirements.txt");

/// They, in a Python environment of their own.
#[derive(Debug)]
pub struct Clients {
    environment: PathBuf,
}

impl Clients {
    /// Installs them below `directory`, unless an earlier test has.
    pub fn install(directory: &Path) -> Self {
        let name = format!("aws-{}", &blake3::hash(REQUIREMENTS.as_bytes()).to_hex()[..16]);
        let environment = directory.join(name);
        std::fs::create_dir_all(&environment).unwrap();
        // One at a time, over all test processes.
        let lock = File::create(environment.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let done = environment.join("installed");
        if !done.exists() {
            let mut make = Command::new("python3");
            make.args(["-m", "venv", "--clear"]).arg(environment.join("venv"));
            run_to_end(make, INSTALL).success();
            let requirements = environment.join("requirements.txt");
            std::fs::write(&requirements, REQUIREMENTS).unwrap();
            let mut pip = Command::new(environment.join("venv/bin/python"));
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]);
            run_to_end(
                {
                    pip.arg(requirements);
                    pip
                },
                INSTALL,
            )
            .success();
            File::create(done).unwrap();
        }
        Self { environment }
    }

    /// A program of theirs, which knows nothing of this machine's user.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.environment.join("venv/bin").join(program));
        for name in ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"] {
            command.env(name, self.environment.join("none"));
        }
        for name in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL"] {
            command.env_remove(name);
        }
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_DEFAULT_REGION", "xx-local");
        command.env("AWS_MAX_ATTEMPTS", "1").env("NO_PROXY", "*");
        command
    }

    /// `aws efs ARGUMENTS` to its end. `key`: id and secret; without one,
    /// requests are not signed.
    pub fn efs(&self, endpoint: &str, key: Option<(&str, &str)>, arguments: &[&str]) -> Ended {
        run_to_end(self.efs_command(endpoint, key, arguments), COMMAND)
    }

    /// The same, not yet run.
    pub fn efs_command(
        &self,
        endpoint: &str,
        key: Option<(&str, &str)>,
        arguments: &[&str],
    ) -> Command {
        let mut command = self.command("aws");
        command.args(["--endpoint-url", endpoint, "--output", "json"]);
        match key {
            Some((id, secret)) => {
                command.env("AWS_ACCESS_KEY_ID", id).env("AWS_SECRET_ACCESS_KEY", secret);
            }
            None => drop(command.arg("--no-sign-request")),
        }
        command.arg("efs").args(arguments);
        command
    }

    /// Runs one of the scripts beside `requirements.txt`.
    #[track_caller]
    pub fn script(&self, name: &str, arguments: &[&str], limit: Duration) {
        let scripts = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/aws"));
        let mut command = self.command("python");
        // Nothing is written beside the sources.
        command.arg("-B").arg(scripts.join(name)).args(arguments);
        run_to_end(command, limit).success();
    }
}
