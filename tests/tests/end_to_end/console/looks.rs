//! All that the page can show, in both colour schemes and from the width of a
//! small telephone on.

use std::sync::Arc;
use std::time::Duration;

use replicator_common::api::server;
use replicator_tests::browser::Browser;
use replicator_tests::serial;
use replicator_tests::showcase::Showcase;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

/// An hour of samples for each replication, of which some are missing.
const HISTORY: &str = "
import('/console/main.js').then((page) => {
  const ids = [...document.querySelectorAll('.card')].map((node) => node.id.slice(3));
  const samples = (phase) => Array.from({ length: 700 }, (_, at) => {
    const wave = Math.sin(at / 9 + phase) + Math.sin(at / 41 + 2 * phase) + 2.2;
    const spike = at > 500 && at < 512 ? 3 : 0;
    if (at > 230 && at < 260) return null;
    return [Date.now() - (700 - at) * 5000, wave * 0.09 + spike, Math.max(0, wave * 2.1e7), wave * 40, 3];
  }).filter(Boolean);
  page.takeHello({ Version: 'VERSION', Side: 'BOTH', SamplePeriod: 5, SamplesMax: 720 });
  page.takeHistory(Object.fromEntries(ids.map((id, at) => [id, samples(at)])));
  return true;
})";

fn in_each_light(browser: &Browser, what: &str) {
    for scheme in ["light", "dark"] {
        browser.scheme(scheme);
        for (width, height) in [(1280, 900), (768, 1024), (390, 844), (320, 568)] {
            browser.window(width, height);
            let name = format!("{what}-{scheme}-{width}");
            browser.picture(&name);
            browser.assert_usable(&name);
        }
    }
}

/// The command line's own test of the same figures: `words` of the crate `replicator`.
#[test]
fn figures_read_as_on_the_command_line() {
    let _share = serial::share();
    let showcase = Arc::new(Showcase::default());
    let bound = server::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let server = bound.serve(showcase.api()).unwrap();
    let browser = Browser::start();
    browser.open(&format!("http://{}/", server.address()));
    for (expression, expected) in [
        (
            "[0, 1023, 1024, 1536, 2 ** 20 - 1].map(words.bytes)",
            json!(["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB"]),
        ),
        ("[0, 999, 1000, 1234567].map(words.count)", json!(["0", "999", "1,000", "1,234,567"])),
        (
            "[1, 7].map((value) => words.several(value, 'file', 'files'))",
            json!(["1 file", "7 files"]),
        ),
        (
            "[0, 0.35, 2.59, 59.999, 185, 7380, 439200, -1, NaN].map(words.time)",
            json!([
                "0 s",
                "350 ms",
                "2.5 s",
                "59 s",
                "3 min 5 s",
                "2 h 3 min",
                "5 d 2 h",
                "0 s",
                "?"
            ]),
        ),
        ("[words.iso(1795248930250000000)]", json!(["2026-11-21T08:15:30.250Z"])),
    ] {
        let said =
            browser.evaluate(&format!("import('/console/words.js').then((words) => {expression})"));
        assert_eq!(said, expected, "{expression}");
    }
}

#[test]
fn everything_can_be_read_in_any_light_and_at_any_width() {
    let _share = serial::share();
    let showcase = Arc::new(Showcase::default());
    let server =
        server::bind("127.0.0.1:0".parse().unwrap()).unwrap().serve(showcase.api()).unwrap();
    let browser = Browser::start();
    browser.open(&format!("http://{}/", server.address()));
    browser.until(LIMIT, "document.querySelectorAll('.card').length === 4");
    browser.until(LIMIT, &HISTORY.replace("VERSION", env!("CARGO_PKG_VERSION")));
    in_each_light(&browser, "page");
    // Unfolded, and with a dialog before it.
    browser
        .evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })");
    in_each_light(&browser, "unfolded");
    browser.evaluate("document.querySelector('.card:last-child .danger:not([hidden])').click()");
    in_each_light(&browser, "dialog");
    assert_eq!(browser.complaints(), Vec::<String>::new());
    server.stop();
}
