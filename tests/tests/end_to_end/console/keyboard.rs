//! A replication is watched, paused, resumed, verified and failed over through
//! the page, without a mouse and without reloading.

use std::fs;
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_common::time::Timestamp;
use replicator_tests::browser::Browser;
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::showcase::HOSTILE;
use serde_json::json;

use crate::verify::BackDoor;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_replication_is_operated_by_keyboard() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let back_door = BackDoor::new(pair.replica());
    fs::write(pair.source().join(HOSTILE), vec![b'x'; 10_000]).unwrap();
    let daemon = pair.start_enabled("fanotify");
    assert!(daemon.output().contains(&format!("console and API at {}/", daemon.endpoint())));
    let browser = Browser::start();
    browser.open(&format!("{}/", daemon.endpoint()));
    await_state(&browser, "ENABLED");
    // Gone, should the page be loaded anew.
    browser.evaluate("window.kept = true");

    the_watermark_moves(&pair, &browser);
    pause_and_resume(&pair, &daemon, &browser);
    verify(&back_door, &daemon, &browser);
    browser.assert_usable("verified");
    browser.picture("verified");
    think_twice(&daemon, &browser);
    fail_over(&pair, daemon, &browser);

    assert_eq!(browser.evaluate("window.kept"), true);
    assert_eq!(browser.evaluate("document.images.length"), 0, "a file's name became an element");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[track_caller]
fn await_state(browser: &Browser, state: &str) {
    browser
        .until(LIMIT, &format!("document.querySelector('.card .state')?.innerText === '{state}'"));
}

fn focused(browser: &Browser) -> String {
    let text = browser.evaluate("document.activeElement.innerText");
    text.as_str().unwrap().to_owned()
}

fn the_watermark_moves(pair: &Pair, browser: &Browser) {
    let passed = |moment: &str| {
        let shown = "document.querySelector('[data-watermark]').dataset.watermark";
        browser.until(LIMIT, &format!("{shown} > '{moment}'"));
    };
    for round in 0..2 {
        fs::write(pair.source().join(format!("file-{round}")), "new").unwrap();
        passed(&Timestamp::now().to_rfc3339());
        assert!(pair.replica().join(format!("file-{round}")).exists());
    }
    // The chart grows, and says in words what it shows.
    browser.until(LIMIT, "document.querySelector('.chart .line') !== null");
    browser.until(
        LIMIT,
        "document.querySelector('.chart').getAttribute('aria-label').includes('Now')",
    );
}

fn pause_and_resume(pair: &Pair, daemon: &Daemon, browser: &Browser) {
    browser.tab_to("Pause");
    browser.press("Enter");
    await_state(browser, "PAUSED");
    assert_eq!(daemon.status().status, ReplicationStatus::Paused);
    browser.until(LIMIT, "document.title.startsWith('PAUSED')");
    // Whichever comes first, the answer to the click or the new state: both are said.
    let said = |end: &str| {
        let lines = "[...document.getElementById('announcer').children]";
        browser
            .until(LIMIT, &format!("{lines}.some((line) => line.textContent.endsWith('{end}'))"));
    };
    said("PAUSED");
    said("not shipped.");
    fs::write(pair.source().join("later"), "while paused").unwrap();
    let backlog = "[...document.querySelectorAll('.figure')].find((node) => node.innerText.startsWith('Backlog')).innerText";
    browser.until(LIMIT, &format!("/[1-9][0-9]* records?/.test({backlog})"));
    assert!(!pair.replica().join("later").exists());

    // The focus has stayed: the same key takes it back.
    assert_eq!(focused(browser), "Resume");
    browser.press(" ");
    await_state(browser, "ENABLED");
    assert_eq!(focused(browser), "Pause");
    pair.settle(daemon, &"resumed");
}

fn verify(back_door: &BackDoor, daemon: &Daemon, browser: &Browser) {
    back_door.flip(HOSTILE, 5_000);
    browser.tab_to("Verify");
    browser.press("Enter");
    let row = "[...document.querySelectorAll('tbody tr')].find((row) => row.innerText.includes('CONTENT'))";
    let cells = format!("[...({row})?.cells ?? []].map((cell) => cell.textContent)");
    browser.until(LIMIT, &format!("({cells}).includes('repaired')"));
    let path = browser.evaluate(&format!("({cells})[1]"));
    assert_eq!(path, HOSTILE);
    assert_eq!(daemon.status().source.unwrap().verification.repaired, 1);
}

/// The dialog says what would be lost, wants the word, and can be left.
fn think_twice(daemon: &Daemon, browser: &Browser) {
    browser.tab_to("Fail over…");
    browser.press("Enter");
    browser.until(LIMIT, "document.getElementById('failover').open");
    assert_eq!(browser.evaluate("document.activeElement.id"), "failover-word");
    let loss = browser.evaluate("document.getElementById('failover-loss').innerText");
    let loss = loss.as_str().unwrap();
    assert!(
        loss.contains("ago, may be missing") && loss.contains("in the source’s journal"),
        "{loss}"
    );
    browser.assert_usable("the dialog");
    browser.picture("failover");
    browser.write("fail");
    browser.press("Enter");
    assert_eq!(browser.evaluate("document.getElementById('failover-do').disabled"), true);
    browser.press("Escape");
    browser.until(LIMIT, "!document.getElementById('failover').open");
    assert_eq!(focused(browser), "Fail over…");
    assert_eq!(daemon.status().status, ReplicationStatus::Enabled);
}

fn fail_over(pair: &Pair, daemon: Daemon, browser: &Browser) {
    let id = daemon.status().source_file_system_id;
    browser.press("Enter");
    browser.until(LIMIT, "document.getElementById('failover').open");
    browser.write(id.as_str());
    browser.tab_to("Fail over");
    browser.press("Enter");
    let report = browser.until(LIMIT, "document.querySelector('.outcome')?.innerText");
    let report = report.as_str().unwrap();
    assert!(report.contains("is writable now") && report.contains("nothing"), "{report}");
    assert!(focused(browser).starts_with("Failed over"));
    assert!(daemon.join(patience()).success());
    fs::write(pair.replica().join("written"), "by hand").unwrap();

    // `run` has ended with its replication: the page says that nobody answers.
    browser.until(LIMIT, "document.getElementById('connection').innerText === 'disconnected'");
    let stale = browser.evaluate("document.getElementById('stale').innerText");
    assert!(stale.as_str().unwrap().contains(" old"), "{stale}");
    browser.assert_usable("disconnected");
    browser.picture("failed-over");
    browser.tab_to("Put away");
    browser.press("Enter");
    assert_eq!(browser.evaluate("document.querySelectorAll('.outcome').length"), json!(0));
}
