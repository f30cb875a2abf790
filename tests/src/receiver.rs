//! A real receiver of webhooks, which can be told to refuse.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::scenario::patience;

/// One request.
#[derive(Clone, Debug)]
pub struct Posted {
    /// `NAME: VALUE` as they came, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body as it came.
    pub body: Vec<u8>,
    /// It was answered with an error.
    pub refused: bool,
}

impl Posted {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map_or_else(|| panic!("no {name} in {self:?}"), |(_, value)| value)
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A running receiver.
#[derive(Debug)]
pub struct Receiver {
    address: String,
    posted: Arc<Mutex<Vec<Posted>>>,
    refusals: Arc<AtomicUsize>,
}

impl Receiver {
    /// Starts one, which ends with the test. The first so many requests are
    /// answered with an error.
    pub fn start(refusals: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let receiver = Self {
            address: listener.local_addr().unwrap().to_string(),
            posted: Arc::default(),
            refusals: Arc::new(AtomicUsize::new(refusals)),
        };
        let (posted, left) = (receiver.posted.clone(), receiver.refusals.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let refuse = |n: usize| n.checked_sub(1);
                let refused = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuse).is_ok();
                if let Some(one) = serve(stream, refused) {
                    posted.lock().unwrap().push(one);
                }
            }
        });
        receiver
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}/hook?a=b", self.address)
    }

    /// All requests so far.
    pub fn posted(&self) -> Vec<Posted> {
        self.posted.lock().unwrap().clone()
    }

    /// Waits for one that was taken and for which `wanted` holds.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Posted {
        let end = Instant::now() + patience();
        loop {
            let posted = self.posted();
            let found = posted.iter().find(|one| !one.refused && wanted(&one.json()));
            if let Some(found) = found {
                return found.clone();
            }
            assert!(Instant::now() < end, "{what} was never posted: {posted:#?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn serve(stream: TcpStream, refused: bool) -> Option<Posted> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    assert!(lines[0].starts_with("POST /hook?a=b "), "{lines:?}");
    let headers: Vec<(String, String)> = lines[1..]
        .iter()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name == "content-length")?.1.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let status = if refused { "503 Service Unavailable" } else { "204 No Content" };
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    (&stream).write_all(answer.as_bytes()).ok()?;
    Some(Posted { headers, body, refused })
}
