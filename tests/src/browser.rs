//! A headless Chromium, used as a person uses it: by keyboard, with what the
//! page shows and what a screen reader is told.
//!
//! It is driven over a pipe (`--remote-debugging-pipe`: the DevTools protocol on
//! descriptors 3 and 4, each message ended by NUL), so that no port is open and
//! no library is needed. It dies with the test.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::{Value, json};

use crate::mounts::Scratch;
use crate::process::die_with_parent;

/// How long one command may take; far beyond what is normal.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(50);
/// What is answered for a page that is left while it is asked.
const GOING: [&str; 3] = [
    "Inspected target navigated or closed",
    "Execution context was destroyed.",
    "Cannot find default execution context",
];
/// More controls than any page has.
const TABS_MAX: usize = 100;
/// Looks for what keeps people from using a page.
const LOOK: &str = include_str!("browser/look.js");

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    commands: RefCell<File>,
    messages: Receiver<Value>,
    session: String,
    last: Cell<u64>,
    complaints: RefCell<Vec<String>>,
    _profile: Scratch,
}

impl Browser {
    /// Starts it on an empty page.
    pub fn start() -> Self {
        let profile = Scratch::new("browser");
        let (commands_in, commands) = rustix::pipe::pipe().unwrap();
        let (messages, messages_out) = rustix::pipe::pipe().unwrap();
        let mut command = Command::new("chromium");
        command
            .args(["--headless=new", "--remote-debugging-pipe", "--disable-gpu"])
            // The tests run as root, and in containers whose /dev/shm is small.
            .args(["--no-sandbox", "--disable-dev-shm-usage"])
            .args(["--no-first-run", "--disable-extensions", "--disable-sync"])
            .args(["--disable-background-networking", "--disable-component-update"])
            .args(["--no-proxy-server", "--hide-scrollbars", "--force-color-profile=srgb"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        die_with_parent(&mut command);
        give(&mut command, commands_in, messages_out);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        drop(command);
        let mut browser = Self {
            child,
            commands: RefCell::new(commands.into()),
            messages: read(messages.into()),
            session: String::new(),
            last: Cell::new(0),
            complaints: RefCell::default(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.window(1280, 900);
        browser
    }

    /// Opens an address.
    pub fn open(&self, url: &str) {
        let answer = self.call("Page.navigate", json!({ "url": url }));
        assert_eq!(answer.get("errorText"), None, "{url}");
    }

    /// The value of an expression of JavaScript, awaited.
    #[track_caller]
    pub fn evaluate(&self, expression: &str) -> Value {
        let answer = self.ask("Runtime.evaluate", awaited(expression));
        value(expression, &answer.unwrap_or_else(|error| panic!("{expression}: {error}")))
    }

    /// Waits until an expression has a value that is neither empty nor false.
    #[track_caller]
    pub fn until(&self, limit: Duration, expression: &str) -> Value {
        let start = Instant::now();
        loop {
            match self.ask("Runtime.evaluate", awaited(expression)) {
                Ok(answer) => {
                    let value = value(expression, &answer);
                    let empty = [json!(null), json!(false), json!(""), json!(0)];
                    if !empty.contains(&value) {
                        return value;
                    }
                }
                // A page that makes way for the next takes what it was asked with it.
                Err(error) if GOING.iter().any(|going| error["message"] == *going) => {}
                Err(error) => panic!("{expression}: {error}"),
            }
            let shown = || self.evaluate("document.body.innerText");
            assert!(start.elapsed() < limit, "not within {limit:?}: {expression}\n{}", shown());
            thread::sleep(POLL);
        }
    }

    /// Presses and lets go a key: `Tab`, `Enter`, `Escape` or a space.
    pub fn press(&self, key: &str) {
        let (code, number, text) = match key {
            "Tab" => ("Tab", 9, None),
            "Enter" => ("Enter", 13, Some("\r")),
            "Escape" => ("Escape", 27, None),
            " " => ("Space", 32, Some(" ")),
            other => panic!("the key {other:?} is not known here"),
        };
        let mut event = json!({
            "type": "keyDown", "key": key, "code": code, "windowsVirtualKeyCode": number,
        });
        if let Some(text) = text {
            event["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", event.clone());
        event["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", event);
    }

    /// Writes into what has the focus.
    pub fn write(&self, text: &str) {
        self.call("Input.insertText", json!({ "text": text }));
    }

    /// Goes on by Tab to the control whose text or label this is.
    #[track_caller]
    pub fn tab_to(&self, name: &str) {
        let mut seen = Vec::new();
        for _ in 0..TABS_MAX {
            self.press("Tab");
            let focused = self.evaluate(
                "(document.activeElement.labels?.[0] ?? document.activeElement).innerText.trim()",
            );
            if focused == name {
                let shown = "document.activeElement.matches(':focus-visible')";
                assert_eq!(self.evaluate(shown), true, "the focus of {name:?} cannot be seen");
                return;
            }
            seen.push(focused);
        }
        panic!("no control named {name:?} is reached by Tab, but {seen:?}");
    }

    /// The size of what shows the page.
    pub fn window(&self, width: u32, height: u32) {
        self.call(
            "Emulation.setDeviceMetricsOverride",
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false }),
        );
    }

    /// What the person prefers: `light` or `dark`.
    pub fn scheme(&self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Keeps a picture of what is shown, where `REPLICATOR_SCREENSHOTS` names a
    /// directory.
    pub fn picture(&self, name: &str) {
        let Some(directory) = std::env::var_os("REPLICATOR_SCREENSHOTS") else { return };
        let whole = json!({ "captureBeyondViewport": true });
        let answer = self.call("Page.captureScreenshot", whole);
        let text = answer["data"].as_str().unwrap();
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        std::fs::write(PathBuf::from(directory).join(format!("{name}.png")), bytes).unwrap();
    }

    /// Panics when something keeps people from using the page as it is now: see
    /// `look.js`, and each control has a name for those who hear it.
    #[track_caller]
    pub fn assert_usable(&self, context: &str) {
        // A colour on its way to another is not what is read.
        self.until(COMMAND_LIMIT, "document.getAnimations().length === 0");
        let found = self.evaluate(LOOK);
        assert_eq!(found, json!([]), "{context}");
        let tree = self.call("Accessibility.getFullAXTree", json!({}));
        let mut controls = 0;
        for node in tree["nodes"].as_array().unwrap() {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            let is_control =
                ["button", "link", "textbox", "radio", "checkbox", "DisclosureTriangle", "image"]
                    .contains(&role);
            if !is_control || node["ignored"] == true {
                continue;
            }
            controls += 1;
            let name = node["name"]["value"].as_str().unwrap_or_default();
            assert!(!name.trim().is_empty(), "{context}: a {role} has no name: {node}");
        }
        assert!(controls > 0, "{context}: no control is heard of");
    }

    /// What the page's scripts and its policy complained of.
    pub fn complaints(&self) -> Vec<String> {
        // Whatever happened before this is answered has been told of.
        self.evaluate("1");
        self.complaints.borrow().clone()
    }

    /// Gives a command; its answer.
    #[track_caller]
    pub fn call(&self, method: &str, parameters: Value) -> Value {
        self.ask(method, parameters).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Gives a command; its answer, or the error that the browser answers with.
    #[track_caller]
    fn ask(&self, method: &str, parameters: Value) -> Result<Value, Value> {
        let id = self.last.get() + 1;
        self.last.set(id);
        let mut command = json!({ "id": id, "method": method, "params": parameters });
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.commands.borrow_mut().write_all(&bytes).unwrap();
        let end = Instant::now() + COMMAND_LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left);
            let mut message = message.unwrap_or_else(|error| panic!("{method}: {error}"));
            if message["id"] == id {
                return match message.get_mut("error") {
                    Some(error) => Err(error.take()),
                    None => Ok(message["result"].take()),
                };
            }
            self.complaints.borrow_mut().extend(complaint(&message));
        }
    }
}

/// What asks for the value of an expression, awaited.
fn awaited(expression: &str) -> Value {
    json!({ "expression": expression, "awaitPromise": true, "returnByValue": true })
}

/// The value that an answer holds.
#[track_caller]
fn value(expression: &str, answer: &Value) -> Value {
    assert_eq!(answer.get("exceptionDetails"), None, "{expression}");
    answer["result"]["value"].clone()
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its helpers end with it, and then leave the profile alone.
        let _ = self.commands.borrow_mut().write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let end = Instant::now() + CLOSE_LIMIT;
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an event says is wrong. (That a daemon is gone is no fault of the page.)
fn complaint(event: &Value) -> Option<String> {
    let entry = &event["params"]["entry"];
    let wrong = match event["method"].as_str()? {
        "Runtime.exceptionThrown" => true,
        "Log.entryAdded" => entry["level"] == "error" && entry["source"] != "network",
        "Runtime.consoleAPICalled" => event["params"]["type"] == "error",
        _ => false,
    };
    wrong.then(|| event.to_string())
}

/// Makes these the child's descriptors 3 and 4.
fn give(command: &mut Command, third: OwnedFd, fourth: OwnedFd) {
    // Out of the way of each other's place.
    let aside = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, 10).unwrap();
    let (third, fourth) = (aside(third), aside(fourth));
    let place = move || {
        for (from, to) in [(&third, 3), (&fourth, 4)] {
            // SAFETY: dup2 takes two numbers; in the child nothing owns 3 and 4.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, and makes system calls that
    // are async-signal-safe.
    unsafe { command.pre_exec(place) };
}

/// Reads while commands are given: a full pipe would stop the browser.
fn read(file: File) -> Receiver<Value> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for message in BufReader::new(file).split(0) {
            let Ok(bytes) = message else { return };
            let Ok(value) = serde_json::from_slice(&bytes) else { return };
            if sender.send(value).is_err() {
                return;
            }
        }
    });
    receiver
}
