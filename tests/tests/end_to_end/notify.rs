//! Notifications: a real receiver and a real command are told by a real daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use replicator_tests::binary;
use replicator_tests::loopback::{Site, replicate};
use replicator_tests::mounts::Scratch;
use replicator_tests::process::{free_port, run_to_end};
use replicator_tests::receiver::Receiver;
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use serde_json::{Value, json};

fn hmac(secret: &str, file: &Path) -> String {
    // Not our own code: an oracle.
    let mut command = Command::new("openssl");
    command.args(["dgst", "-sha256", "-hmac", secret, "-r"]).arg(file);
    let said = run_to_end(command, Duration::from_secs(60)).success().stdout;
    said.split(' ').next().unwrap().to_owned()
}

#[test]
fn a_lag_and_its_end_reach_the_webhook_and_the_command() {
    let _share = serial::share();
    let scratch = Scratch::new("notify");
    let daemons = Site::new(scratch.path());
    let (source, replica) = (daemons.path("tree"), daemons.path("replica"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    fs::write(daemons.path("key"), "the secret\n").unwrap();
    let (told, script) = (daemons.path("told"), daemons.path("script"));
    // It fails on the first event, and does not hold up the second.
    let text = format!(
        "#!/bin/sh\necho \"$1 $REPLICATOR_EVENT $REPLICATOR_RECOVERED_FROM\" >> {told:?}\ncat >> {told:?}\n[ $REPLICATOR_EVENT = RECOVERED ]\n"
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    // The receiver refuses at first.
    let receiver = Receiver::start(2);
    let notify = format!(
        "[notify]\nwebhook = {:?}\nwebhook_secret_file = {:?}\ncommand = [{script:?}, \"argument\"]\nlag_threshold = \"3s\"\nhold = \"1s\"\n",
        receiver.url(),
        daemons.path("key")
    );

    let (source_api, destination_api) = (free_port(), free_port());
    let destination = daemons.destination(destination_api);
    let mut source_daemon = daemons.source(source_api, &notify);
    replicate(&source_daemon, &source, &destination, &replica);
    source_daemon.wait_enabled(patience());

    // A lag of three seconds that lasts one: the destination is away.
    destination.kill();
    let lag = receiver.wait_for("a lag", |event| event["Event"] == "LAG");
    let refused = receiver.posted().into_iter().find(|one| one.refused).unwrap();
    assert_eq!(refused.json()["Id"], lag.json()["Id"], "sent again as the same event");
    let event = lag.json();
    assert_eq!(event["Side"], "source");
    assert!(event["TimeSinceLastSync"].as_f64().unwrap() > 3.0, "{event}");
    assert_eq!(lag.header("content-type"), "application/json");
    let signed = daemons.path("signed");
    let time = lag.header("replicator-timestamp");
    fs::write(&signed, [time.as_bytes(), b".", &lag.body].concat()).unwrap();
    let expected = format!("v1={}", hmac("the secret", &signed));
    assert_eq!(lag.header("replicator-signature"), expected);

    // It is back.
    let destination = daemons.destination(destination_api);
    let over = receiver.wait_for("its end", |event| event["Event"] == "RECOVERED").json();
    assert_eq!(over["RecoveredFrom"], "LAG", "{over}");
    assert_eq!(over["SourceFileSystemId"], event["SourceFileSystemId"]);
    let lines = source_daemon.poll_until(patience(), "the command was told of both", |_| {
        let text = fs::read_to_string(&told).unwrap_or_default();
        text.contains("argument RECOVERED LAG\n").then_some(text)
    });
    assert!(lines.starts_with("argument LAG \n{"), "{lines}");
    let first: Value = serde_json::Deserializer::from_str(&lines["argument LAG \n".len()..])
        .into_iter()
        .next()
        .unwrap()
        .unwrap();
    assert_eq!(first["Id"], event["Id"], "one event, told by both");

    source_daemon.poll_until(patience(), "all of it is counted", |daemon| {
        let page = ureq::get(format!("{}/metrics", daemon.endpoint())).call().unwrap();
        let page = page.into_body().read_to_string().unwrap();
        let counted = [
            "replicator_notify_events_total{event=\"LAG\"} 1",
            "replicator_notify_delivered_total{channel=\"webhook\"} 2",
            "replicator_notify_failures_total{channel=\"webhook\"} 2",
            "replicator_notify_failures_total{channel=\"command\"} 1",
            "replicator_notify_dropped_total{channel=\"webhook\"} 0",
            "replicator_notify_pending{channel=\"webhook\"} 0",
        ];
        counted.iter().all(|line| page.contains(line)).then_some(())
    });
    assert!(source_daemon.output().contains("a notification failed"));
    assert!(source_daemon.terminate().success());
    assert!(destination.terminate().success());
}

/// A source that is not there, and one whose replica was failed over without it.
#[test]
fn a_halt_its_end_and_an_error_reach_the_webhook() {
    let _share = serial::share();
    let scratch = Scratch::new("notify-halt");
    let daemons = Site::new(scratch.path());
    let (source, replica) = (daemons.path("tree"), daemons.path("replica"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let receiver = Receiver::start(0);
    let notify = format!("[notify]\nwebhook = {:?}\nhold = \"0s\"\n", receiver.url());
    let (source_api, destination_api) = (free_port(), free_port());
    let destination = daemons.destination(destination_api);
    let mut source_daemon = daemons.source(source_api, &notify);
    replicate(&source_daemon, &source, &destination, &replica);
    source_daemon.wait_enabled(patience());

    let away = daemons.path("away");
    fs::rename(&source, &away).unwrap();
    let halted = receiver.wait_for("a halt", |event| event["Event"] == "HALTED").json();
    assert_eq!((&halted["Status"], &halted["Side"]), (&json!("HALTED"), &json!("source")));
    assert!(halted["Message"].as_str().is_some_and(|message| !message.is_empty()), "{halted}");
    fs::rename(&away, &source).unwrap();
    let over = receiver.wait_for("its end", |event| event["Event"] == "RECOVERED").json();
    assert_eq!(over["RecoveredFrom"], "HALTED", "{over}");

    let body = json!({ "mode": "LOCAL_CONFIGURATION_ONLY" });
    destination.request("POST", "/replicator/v1/failover", Some(body)).unwrap();
    let error = receiver.wait_for("an error", |event| event["Event"] == "ERROR").json();
    assert_eq!(error["Status"], "ERROR", "{error}");
    assert!(source_daemon.terminate().success());
    assert!(destination.terminate().success());
}

#[test]
fn the_configurations_check_reads_what_it_names() {
    let scratch = Scratch::new("notify-check");
    let config = scratch.path().join("source.toml");
    let text = format!(
        "[notify]\nwebhook = \"https://a.example\"\nwebhook_secret_file = {:?}\n",
        scratch.path().join("missing")
    );
    fs::write(&config, text).unwrap();
    let check = || {
        let mut command = Command::new(binary::replicator_src());
        command.args(["check-config", "--config"]).arg(&config);
        run_to_end(command, Duration::from_secs(60))
    };
    let ended = check();
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("notify: cannot read"), "{ended:#?}");
    fs::write(scratch.path().join("missing"), "key").unwrap();
    let shown = check().success().json();
    assert!(!shown.to_string().contains("\"key\""), "the secret is not shown: {shown}");
    fs::write(&config, "[notify]\ncommand = [\"/nonexistent/pager\"]\n").unwrap();
    let ended = check();
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("/nonexistent/pager: cannot be run"), "{ended:#?}");
}
