//! `status`: everything that is known, for a person or as JSON.

mod render;
mod screen;
mod verified;

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use replicator_common::api::client::{Access, Client};
use replicator_common::status::Status;
use replicator_common::stop::Stop;
use replicator_common::time::Timestamp;

use crate::arguments;
use crate::exit::{complain, print, print_line, shown};
use screen::Screen;

/// The screen is drawn at least so often, since what is heard grows old.
const REDRAW: Duration = Duration::from_secs(1);
/// How often the first answer is looked for.
const FIRST: Duration = Duration::from_millis(20);

pub fn run(access: &Access, arguments: &arguments::Status, json: bool) -> anyhow::Result<()> {
    let client = Client::open(access)?;
    if !arguments.watch {
        let all = client.status()?;
        if json {
            return print(&all);
        }
        return print_line(&render::page(&all, Timestamp::now()));
    }
    // The grammar has checked the bounds.
    let period = Duration::from_secs_f64(arguments.interval);
    let stop = Stop::on_signals()?;
    if !json && std::io::stdout().is_terminal() {
        return on_screen(client, &access.endpoint, period, &stop);
    }
    one_after_the_other(&client, json, period, &stop)
}

/// Ends with a signal; a daemon that does not answer is waited for.
fn one_after_the_other(
    client: &Client,
    json: bool,
    period: Duration,
    stop: &Stop,
) -> anyhow::Result<()> {
    loop {
        match client.status() {
            Ok(all) if json => print_line(&serde_json::to_string(&all)?)?,
            Ok(all) => print_line(&render::page(&all, Timestamp::now()))?,
            Err(error) => complain(&error.to_string()),
        }
        if stop.wait_for(period) {
            return Ok(());
        }
    }
}

/// What was heard of a daemon, by a thread that asks.
#[derive(Default)]
struct Heard {
    last: Option<(Vec<Status>, Timestamp)>,
    /// Why there was no answer the last time.
    error: Option<String>,
    asked: bool,
}

/// The same, drawn in place. What was shown last stays when it ends.
fn on_screen(client: Client, endpoint: &str, period: Duration, stop: &Stop) -> anyhow::Result<()> {
    let heard = Arc::new(Mutex::new(Heard::default()));
    let ours = heard.clone();
    // Apart, so that a daemon that does not answer holds up neither the screen nor
    // Ctrl-C. It ends with the process.
    std::thread::spawn(move || ask(&client, period, &ours));
    let screen = Screen::enter()?;
    loop {
        let page = {
            let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.asked.then(|| page(endpoint, &heard, Timestamp::now()))
        };
        if let Some(page) = &page {
            screen.draw(page)?;
        }
        if stop.wait_for(if page.is_some() { period.min(REDRAW) } else { FIRST }) {
            drop(screen);
            return page.map_or(Ok(()), |page| print_line(&page));
        }
    }
}

fn ask(client: &Client, period: Duration, heard: &Mutex<Heard>) {
    loop {
        let answer = client.status();
        let now = Timestamp::now();
        {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.asked = true;
            match answer {
                Ok(all) => (heard.last, heard.error) = (Some((all, now)), None),
                Err(error) => heard.error = Some(error.to_string()),
            }
        }
        std::thread::sleep(period);
    }
}

/// What is known, under a line that says where and when.
fn page(endpoint: &str, heard: &Heard, now: Timestamp) -> String {
    let mut lines = vec![format!("{endpoint}  {}  (Ctrl-C ends)", now.to_rfc3339())];
    if let Some(error) = &heard.error {
        let age = heard.last.as_ref().map(|(_, then)| render::ago(*then, now));
        let age = age.map(|age| format!("; what stands here is of {age}")).unwrap_or_default();
        lines.push(format!("NO ANSWER: {}{age}", shown(error)));
    }
    if let Some((all, then)) = &heard.last {
        lines.push(String::new());
        // Ages are those of when it was heard.
        lines.push(render::page(all, *then));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_is_said_and_the_last_one_stays() {
        let (then, now) = (Timestamp(0), Timestamp(5_000_000_000));
        let shown = |last: Option<Timestamp>, error: Option<&str>| {
            let last = last.map(|then| (Vec::new(), then));
            let heard = Heard { last, error: error.map(str::to_owned), asked: true };
            page("http://a:1", &heard, now)
        };
        let fresh = shown(Some(now), None);
        assert!(fresh.ends_with("\n\nno replication configuration here"), "{fresh}");
        let old = shown(Some(then), Some("refused"));
        assert!(old.contains("NO ANSWER: refused; what stands here is of 5.0 s ago\n"), "{old}");
        assert!(shown(None, Some("refused")).ends_with("NO ANSWER: refused"));
    }
}
