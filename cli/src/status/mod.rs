//! `status`: everything that is known, for a person or as JSON.

mod render;
mod verified;

use std::io::IsTerminal;
use std::time::Duration;

use replicator_common::api::client::{Access, Client};
use replicator_common::stop::Stop;
use replicator_common::time::Timestamp;

use crate::arguments;
use crate::exit::{print, print_line, say};

/// How often `--watch` looks.
const PERIOD: Duration = Duration::from_secs(1);
/// Home, and clear to the end of the screen.
const CLEAR: &str = "\x1b[H\x1b[J";

pub fn run(access: &Access, arguments: &arguments::Status) -> anyhow::Result<()> {
    let client = Client::open(access)?;
    if !arguments.watch {
        let all = client.status()?;
        if arguments.json {
            return print(&all);
        }
        return print_line(&render::page(&all, Timestamp::now()));
    }
    watch(&client, arguments.json)
}

/// Ends with a signal; a daemon that does not answer is waited for.
fn watch(client: &Client, json: bool) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    loop {
        match client.status() {
            Ok(all) if json => print_line(&serde_json::to_string(&all)?)?,
            Ok(all) => print_line(&format!("{clear}{}", render::page(&all, Timestamp::now())))?,
            Err(error) => say(&format!("replicator: {error}")),
        }
        if stop.wait_for(PERIOD) {
            return Ok(());
        }
    }
}
