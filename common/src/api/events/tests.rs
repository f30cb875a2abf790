use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant as Moment;

use serde_json::Value;

use super::super::fake::{Fake, id};
use super::super::{Api, ApiOptions, server};
use super::*;

/// A client that follows the events.
struct Follower(BufReader<TcpStream>);

impl Follower {
    fn new(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(stream, "GET {PATH} HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
        Self(BufReader::new(stream))
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.0.read_line(&mut line).unwrap() > 0).then(|| line.trim_end().to_owned())
    }

    /// The answer's head.
    fn head(&mut self) -> String {
        let mut head = String::new();
        while let Some(line) = self.line().filter(|line| !line.is_empty()) {
            head.push_str(&line.to_ascii_lowercase());
            head.push('\n');
        }
        head
    }

    /// The next event; `None` at the end. (Between events stand the sizes of the
    /// chunks that they come in.)
    fn event(&mut self) -> Option<(String, Value)> {
        loop {
            let line = self.line()?;
            if let Some(name) = line.strip_prefix("event: ") {
                let data = self.line()?;
                let data = data.strip_prefix("data: ").unwrap();
                return Some((name.to_owned(), serde_json::from_str(data).unwrap()));
            }
        }
    }

    fn expect(&mut self, name: &str) -> Value {
        let (found, data) = self.event().unwrap();
        assert_eq!(found, name, "{data}");
        data
    }
}

fn serve(fake: &Arc<Fake>) -> server::Server {
    let bound = server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    bound.serve(Api::new(fake.clone(), fake.registry.clone(), ApiOptions::default())).unwrap()
}

#[test]
fn events_tell_what_is_and_then_what_changes() {
    let fake = Arc::new(Fake::with([1]));
    let server = serve(&fake);
    let address = server.address();
    let mut follower = Follower::new(address);
    let head = follower.head();
    assert!(head.starts_with("http/1.1 200 ") && head.contains("text/event-stream"), "{head}");
    assert!(head.contains("frame-ancestors 'none'"), "{head}");
    let hello = follower.expect("hello");
    assert_eq!((&hello["Side"], &hello["SamplesMax"]), (&json!("BOTH"), &json!(720)));
    let history = follower.expect("history");
    assert_eq!(history[id(1).as_str()].as_array().unwrap().len(), 1);
    let status = follower.expect("status");
    let one = &status["Configurations"][0];
    assert_eq!(one["Status"]["Status"], "ENABLING");
    assert_eq!((&one["Lag"], &one["LastReplicated"]), (&Value::Null, &Value::Null));

    // What is asked for is seen at once, and what happens otherwise within seconds.
    let body = r#"{"id":null}"#;
    let mut asker = TcpStream::connect(address).unwrap();
    write!(
        asker,
        "POST /replicator/v1/pause HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut follow = |what: &dyn Fn(&Value) -> bool| {
        while !follower.event().is_some_and(|(name, data)| name == "status" && what(&data)) {}
    };
    follow(&|data| data["Configurations"][0]["Status"]["Status"] == "PAUSED");
    fake.all.lock().unwrap().clear();
    follow(&|data| data["Configurations"] == json!([]));
}

#[test]
fn a_stream_does_not_hold_up_the_end() {
    let server = serve(&Arc::new(Fake::with([1])));
    let mut follower = Follower::new(server.address());
    follower.head();
    follower.expect("hello");
    let began = Moment::now();
    server.stop();
    // Else it would be given two seconds.
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    while follower.event().is_some() {}
}

#[test]
fn clients_are_bounded_and_make_room_when_they_go() {
    let server = serve(&Arc::new(Fake::with([1])));
    let mut all: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut follower = Follower::new(server.address());
            assert!(follower.head().starts_with("http/1.1 200 "));
            follower
        })
        .collect();
    assert!(Follower::new(server.address()).head().starts_with("http/1.1 429 "));
    all.pop();
    let began = Moment::now();
    while !Follower::new(server.address()).head().starts_with("http/1.1 200 ") {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn only_get_asks_for_events() {
    assert_eq!(are_asked_for("GET", PATH), Ok(true));
    assert_eq!(are_asked_for("GET", "/replicator/v1/status"), Ok(false));
    assert_eq!(are_asked_for("POST", PATH).unwrap_err().status, 405);
}
