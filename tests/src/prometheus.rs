//! The real Prometheus: a server that scrapes what a test runs, and `promtool`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::mounts::Scratch;
use crate::process::{die_with_parent, free_port};
use crate::scenario::patience;

/// How often it scrapes: what there is only for a second is seen.
const SCRAPE: &str = "200ms";
/// Between two looks.
const POLL: Duration = Duration::from_millis(100);

/// A file of `deploy/`.
pub fn deployed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// A running server.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    endpoint: String,
    directory: Scratch,
}

impl Prometheus {
    /// Starts one that scrapes `target` (`HOST:PORT`) as the job `replicator`,
    /// and has the rules that are deployed.
    pub fn scraping(target: &str) -> Self {
        let directory = Scratch::new("prometheus");
        let config = format!(
            "global: {{ scrape_interval: {SCRAPE}, scrape_timeout: {SCRAPE}, evaluation_interval: 1s }}\n\
             rule_files: [{:?}]\n\
             scrape_configs:\n\
             - job_name: replicator\n  static_configs: [{{ targets: [{target:?}] }}]\n",
            deployed("prometheus/alerts.yaml")
        );
        let file = directory.path().join("prometheus.yml");
        fs::write(&file, config).unwrap();
        promtool(&["check", "config"], &file);
        let address = format!("127.0.0.1:{}", free_port());
        let log = File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        die_with_parent(&mut command);
        let child = command.spawn().expect("prometheus is installed (.ci/run does it)");
        let server = Self { child, endpoint: format!("http://{address}"), directory };
        server.poll("it is ready", || {
            ureq::get(format!("{}/-/ready", server.endpoint)).call().ok().map(drop)
        });
        server
    }

    /// Asks until there is an answer.
    pub fn poll<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + patience();
        loop {
            if let Some(found) = look() {
                return found;
            }
            if Instant::now() > end {
                let log = fs::read_to_string(self.directory.path().join("log"));
                panic!("not in time: {what}; Prometheus says {}", log.unwrap_or_default());
            }
            thread::sleep(POLL);
        }
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let request = ureq::get(format!("{}{path}", self.endpoint));
        let request = request.query_pairs(query.iter().copied());
        let request = request.config().http_status_as_error(false).build();
        let mut answer = request.call().unwrap();
        let body: Value = answer.body_mut().read_json().unwrap();
        assert_eq!(body["status"], "success", "{path} {query:?}: {body}");
        body["data"].clone()
    }

    /// The present values of an expression.
    pub fn query(&self, expression: &str) -> Vec<(Value, f64)> {
        let data = self.get("/api/v1/query", &[("query", expression)]);
        let rows = data["result"].as_array().cloned().unwrap_or_default();
        rows.into_iter()
            .map(|row| {
                let value = row["value"][1].as_str().unwrap_or_default().parse().unwrap();
                (row["metric"].clone(), value)
            })
            .collect()
    }

    /// Names of all that was ever scraped.
    pub fn names(&self) -> BTreeSet<String> {
        let names = self.get("/api/v1/label/__name__/values", &[]);
        serde_json::from_value(names).unwrap()
    }

    /// All alert rules as Prometheus sees them.
    pub fn rules(&self) -> Vec<Value> {
        let data = self.get("/api/v1/rules", &[]);
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap()).collect()
    }

    /// The state of one of them: `inactive`, `pending`, `firing`.
    pub fn state(&self, alert: &str) -> String {
        let rule = self.rules().into_iter().find(|rule| rule["name"] == alert);
        let rule = rule.unwrap_or_else(|| panic!("there is no alert {alert}"));
        rule["state"].as_str().unwrap_or_default().to_owned()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `promtool` on a file; fails with what it says.
pub fn promtool(arguments: &[&str], file: &Path) {
    let directory = file.parent().unwrap();
    let output = Command::new("promtool")
        .args(arguments)
        .arg(file)
        .current_dir(directory)
        .output()
        .expect("promtool is installed (.ci/run does it)");
    assert!(output.status.success(), "promtool {arguments:?}: {output:#?}");
}

/// What `promtool check metrics` says of a page; empty when all is well.
pub fn check_page(page: &str) -> String {
    let directory = Scratch::new("page");
    let file = directory.path().join("page");
    fs::write(&file, page).unwrap();
    let output = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(File::open(&file).unwrap())
        .output()
        .expect("promtool is installed (.ci/run does it)");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() { String::new() } else { format!("{}: {said}", output.status) }
}
