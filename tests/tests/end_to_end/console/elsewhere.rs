//! What a page of somebody else's cannot do in a real browser, what the console
//! says when the daemon refuses, and when it is gone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use replicator_common::api::server::{self, Server};
use replicator_common::control::Side;
use replicator_tests::browser::Browser;
use replicator_tests::serial;
use replicator_tests::showcase::Showcase;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

fn serve(showcase: &Arc<Showcase>, address: SocketAddr) -> Server {
    server::bind(address).unwrap().serve(showcase.api()).unwrap()
}

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn opened(server: &Server) -> Browser {
    let browser = Browser::start();
    browser.open(&format!("http://{}/", server.address()));
    browser.until(LIMIT, "document.querySelectorAll('.card').length === 4");
    browser
}

/// A page of another origin, at the same host; for as long as the test's process lives.
fn page_elsewhere() -> SocketAddr {
    let listener = TcpListener::bind(any_port()).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let page = "<!doctype html><title>elsewhere</title><h1>elsewhere</h1>";
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
                page.len()
            );
        }
    });
    address
}

#[test]
fn a_page_elsewhere_neither_acts_nor_reads() {
    let _share = serial::share();
    let showcase = Arc::new(Showcase::default());
    let server = serve(&showcase, any_port());
    let target = format!("http://{}/replicator/v1", server.address());
    let browser = Browser::start();
    browser.open(&format!("http://{}/", page_elsewhere()));
    browser.until(LIMIT, "document.title === 'elsewhere'");
    let attempt = |what: &str, options: &str| {
        browser.evaluate(&format!(
            "fetch('{target}/{what}', {options}).then((answer) => answer.type === 'opaque' ? 'unseen' : answer.status, () => 'failed')"
        ))
    };
    let body = r#"{"id":"fs-00a1b2c3d4e5f0001"}"#;
    let header =
        format!("{{ method: 'POST', body: '{body}', headers: {{ 'X-Replicator-Console': '1' }} }}");
    assert_eq!(attempt("pause", &header), "failed", "the leave that is asked for is not given");
    let plain = format!("{{ method: 'POST', body: '{body}' }}");
    assert_eq!(attempt("failover", &plain), "failed");
    let blind = format!("{{ method: 'POST', body: '{body}', mode: 'no-cors' }}");
    attempt("failover", &blind);
    assert_eq!(attempt("status", "{}"), "failed");
    // Neither a form, nor a frame.
    browser.evaluate(&format!(
        "(() => {{
            const form = Object.assign(document.createElement('form'), {{ method: 'post', action: '{target}/pause' }});
            const frame = Object.assign(document.createElement('iframe'), {{ name: 'frame', src: 'http://{}/' }});
            document.body.append(form, frame);
            form.target = 'frame';
            return new Promise((done) => {{ frame.onload = () => {{ form.submit(); frame.onload = done; }}; }}).then(() => 1);
        }})()",
        server.address()
    ));
    assert_eq!(*showcase.asked.lock().unwrap(), Vec::<String>::new());

    // A link leads to the page, which works.
    browser.evaluate(&format!("location.href = 'http://{}/'; 1", server.address()));
    browser.until(LIMIT, "document.querySelectorAll('.card').length === 4");
    browser.tab_to("Pause");
    browser.press("Enter");
    browser.until(LIMIT, "document.body.innerText.includes('this is a showcase')");
    assert_eq!(showcase.asked.lock().unwrap().len(), 1);
}

#[test]
fn what_the_daemon_refuses_is_said_where_it_was_asked_for() {
    let _share = serial::share();
    let showcase = Arc::new(Showcase::default());
    let server = serve(&showcase, any_port());
    let browser = opened(&server);
    browser.tab_to("Accept deletions…");
    browser.press("Enter");
    browser.until(LIMIT, "document.getElementById('accept').open");
    // What is safe has the focus.
    assert_eq!(browser.evaluate("document.activeElement.innerText"), "Cancel");
    browser.assert_usable("the dialog that accepts deletions");
    browser.tab_to("Accept deletions and resume");
    browser.press("Enter");
    let said = "document.getElementById('accept-error').innerText";
    assert_eq!(browser.until(LIMIT, said), "this is a showcase");
    assert_eq!(*showcase.asked.lock().unwrap(), ["accept fs-00a1b2c3d4e5f0003"]);
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn each_side_offers_what_it_can_do() {
    let _share = serial::share();
    let buttons = "[...document.querySelectorAll('.card:last-child button')].filter((node) => node.checkVisibility()).map((node) => node.innerText)";
    for (side, expected, mode) in [
        (Side::Source, json!(["Resume", "Verify", "Fail over…"]), "mode-all"),
        // The source is not heard of (it is the last card's), so it cannot take part.
        (Side::Destination, json!(["Resume", "Fail over…"]), "mode-local"),
    ] {
        let showcase = Arc::new(Showcase { side: Some(side), ..Showcase::default() });
        let server = serve(&showcase, any_port());
        let browser = opened(&server);
        assert_eq!(browser.evaluate(buttons), expected, "{side:?}");
        browser
            .evaluate("document.querySelector('.card:last-child .danger:not([hidden])').focus()");
        browser.press("Enter");
        browser.until(LIMIT, "document.getElementById('failover').open");
        let chosen = "document.querySelector('input[name=mode]:checked').id";
        assert_eq!(browser.evaluate(chosen), mode, "{side:?}");
        browser.write("failover");
        browser.press("Enter");
        let said = "document.getElementById('failover-error').innerText";
        assert_eq!(browser.until(LIMIT, said), "this is a showcase");
        let how = if mode == "mode-all" { "AllConfigurations" } else { "LocalConfigurationOnly" };
        let asked = [format!("delete fs-00a1b2c3d4e5f0004 {how}")];
        assert_eq!(*showcase.asked.lock().unwrap(), asked);
    }
}

#[test]
fn a_daemon_that_is_gone_is_said_to_be_and_followed_again() {
    let _share = serial::share();
    let showcase = Arc::new(Showcase::default());
    let server = serve(&showcase, any_port());
    let address = server.address();
    let browser = opened(&server);
    let connection = "document.getElementById('connection').innerText";
    browser.until(LIMIT, &format!("{connection} === 'live'"));
    // The dialog must not show old figures as those of now.
    browser.tab_to("Fail over…");
    browser.press("Enter");
    server.stop();
    browser.until(LIMIT, "document.getElementById('failover-stale').checkVisibility()");
    browser.press("Escape");
    browser.until(LIMIT, &format!("{connection} === 'disconnected'"));
    browser
        .until(LIMIT, "document.getElementById('announcer').textContent.includes('Disconnected')");
    browser.assert_usable("disconnected");
    assert_eq!(browser.evaluate("document.getElementById('stale').hidden"), json!(false));
    let server = serve(&showcase, address);
    browser.until(LIMIT, &format!("{connection} === 'live'"));
    assert_eq!(browser.evaluate("document.getElementById('stale').hidden"), json!(true));
    assert_eq!(browser.evaluate("document.querySelectorAll('.card').length"), json!(4));
    server.stop();
}
