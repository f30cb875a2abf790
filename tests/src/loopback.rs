//! Daemons of both kinds on loopback, as a host has them that takes part in two
//! replications, one each way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::binary;
use crate::process::{Daemon, free_port};

/// One such host: its directory has configurations, state and trees.
#[derive(Debug)]
pub struct Site {
    directory: PathBuf,
    listen: u16,
}

impl Site {
    /// Made in a directory of its own.
    pub fn new(directory: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        Self { directory: directory.to_owned(), listen: free_port() }
    }

    /// Something in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Starts its destination, whose API is at this port, and waits for it.
    pub fn destination(&self, api: u16) -> Daemon {
        let listen = self.listen;
        let more = format!("listen = \"127.0.0.1:{listen}\"\nadvertise = \"127.0.0.1:{listen}\"\n");
        self.serve(binary::replicator_dst(), "destination", api, &more)
    }

    /// Starts its source with `more` lines of configuration, and waits for it.
    pub fn source(&self, api: u16, more: &str) -> Daemon {
        let more = format!("watcher = \"inotify\"\n{more}");
        self.serve(binary::replicator_src(), "source", api, &more)
    }

    fn serve(&self, program: &Path, name: &str, api: u16, more: &str) -> Daemon {
        let (config, state) =
            (self.path(&format!("{name}.toml")), self.path(&format!("{name}.state")));
        let text = format!("state_dir = {state:?}\napi = \"127.0.0.1:{api}\"\n{more}");
        fs::write(&config, text).unwrap();
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&config);
        let endpoint = format!("http://127.0.0.1:{api}");
        let mut daemon = Daemon::spawn(command, &endpoint, &config.with_extension("log"));
        daemon.wait_ready();
        daemon
    }
}

/// Makes a replication of `tree` to `replica`, whatever that holds.
pub fn replicate(source: &Daemon, tree: &Path, destination: &Daemon, replica: &Path) {
    let body = json!({ "replica": replica, "reconcile": true });
    let token = destination.request("POST", "/replicator/v1/tokens", Some(body)).unwrap();
    let body = json!({ "source": tree, "token": token["Token"] });
    source.request("POST", "/replicator/v1/replications", Some(body)).unwrap();
}
