//! What Prometheus is told, by the real Prometheus.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;

use replicator_common::status::ReplicationStatus;
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::prometheus::{Prometheus, check_page, deployed, promtool};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;
use serde_json::{Value, json};

/// Words of a text that are names of metrics.
fn metrics_in(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("replicator_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// Every expression of the dashboard, with its variables filled in.
fn dashboard_expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets
        .map(|target| {
            let text = target["expr"].as_str().unwrap();
            text.replace("$source", ".*").replace("$__rate_interval", "1m")
        })
        .collect()
}

#[test]
fn rules_and_dashboard_are_valid_and_the_rules_do_what_they_are_for() {
    promtool(&["check", "rules", "--lint-fatal"], &deployed("prometheus/alerts.yaml"));
    promtool(&["test", "rules"], &deployed("prometheus/alerts.test.yaml"));
    let dashboard = fs::read_to_string(deployed("grafana/replicator.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    assert!(dashboard_expressions(&dashboard).len() > 40);
    // A rule without a case of its own would go unnoticed.
    let rules = fs::read_to_string(deployed("prometheus/alerts.yaml")).unwrap();
    let cases = fs::read_to_string(deployed("prometheus/alerts.test.yaml")).unwrap();
    let advice = fs::read_to_string(deployed("../docs/monitoring.md")).unwrap();
    for line in rules.lines() {
        let Some(alert) = line.trim().strip_prefix("- alert: ") else { continue };
        assert!(cases.contains(&format!("name: {alert} fires\n")), "{alert} is not tested");
        assert!(cases.contains(&format!("name: {alert} is quiet\n")), "{alert} is not tested");
        assert!(advice.contains(&format!("### {alert}\n")), "{alert} is not documented");
    }
}

#[test]
fn the_real_prometheus_finds_every_metric_that_rules_and_dashboard_name() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    // Enough for the initial sync to be seen under way.
    for directory in 0..30 {
        let directory = pair.source().join(format!("d{directory}"));
        fs::create_dir(&directory).unwrap();
        for file in 0..100 {
            fs::write(directory.join(format!("f{file}")), content::incompressible(file, 8192))
                .unwrap();
        }
    }
    fs::write(pair.source().join("large"), content::incompressible(7, 64 << 20)).unwrap();

    let port = free_port();
    let prometheus = Prometheus::scraping(&format!("127.0.0.1:{port}"));
    let mut command = pair.command(port, &["--watcher", "inotify"]);
    command.stdin(Stdio::null());
    let log = pair.outside().join("log");
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    let during = pages_of_the_initial_sync(&mut daemon);
    fs::write(pair.source().join("after"), "a change").unwrap();
    pair.settle(&daemon, &"all is replicated");
    daemon.request("POST", "/replicator/v1/verify", Some(json!({}))).unwrap();

    // What each part of the page needs has happened once it shows this.
    let verified = "replicator_source_last_verified_timestamp_seconds";
    prometheus.poll("a verification", || prometheus.query(verified).pop());
    let passes = "sum(replicator_source_verification_passes_total) > 0";
    prometheus.poll("the passes are counted", || prometheus.query(passes).pop());

    let rules = fs::read_to_string(deployed("prometheus/alerts.yaml")).unwrap();
    let dashboard = fs::read_to_string(deployed("grafana/replicator.json")).unwrap();
    let scraped = prometheus.names();
    // What there is during the initial sync alone, Prometheus may have come too late for.
    let shown = |name: &str| scraped.contains(name) || during.contains(&format!("\n{name}{{"));
    for name in metrics_in(&rules).union(&metrics_in(&dashboard)) {
        // Notifications are of the daemons, and have a test of their own. An estimate of the
        // time that is left takes longer than this sync.
        let elsewhere = name.starts_with("replicator_notify")
            || name == "replicator_source_sync_remaining_seconds";
        assert!(elsewhere || shown(name), "{name} was never scraped");
    }
    let runs =
        |line: &str| line.starts_with("replicator_source_sync_running{") && line.ends_with(" 1");
    assert!(during.lines().any(runs), "{during}");
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    for expression in dashboard_expressions(&dashboard) {
        prometheus.query(&expression);
    }
    look_at_values(&prometheus);
    alerts(&prometheus);

    let page = ureq::get(format!("{}/metrics", daemon.endpoint())).call().unwrap();
    let kind = page.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let page = page.into_body().read_to_string().unwrap();
    assert_eq!(check_page(&page), "", "{page}");

    // What halts shows, and so does what has died.
    daemon.request("POST", "/replicator/v1/pause", Some(json!({}))).unwrap();
    prometheus.poll("a pause", || prometheus.query("replicator_source_paused == 1").pop());
    daemon.kill();
    prometheus
        .poll("it is down", || (prometheus.state("ReplicatorDown") != "inactive").then_some(()));
    prometheus.poll("it is absent", || {
        (prometheus.state("ReplicatorAbsentSource") != "inactive").then_some(())
    });
}

/// Waits for the end of the initial sync; what the page said until then.
fn pages_of_the_initial_sync(daemon: &mut Daemon) -> String {
    let url = format!("{}/metrics", daemon.endpoint());
    let mut pages = String::from("\n");
    daemon.poll_until(patience(), "the initial sync", |daemon| {
        if let Ok(page) = ureq::get(&url).call() {
            pages.push_str(&page.into_body().read_to_string().unwrap());
        }
        let status = daemon.try_status()?;
        let synced = status.destination.is_some_and(|there| there.last_replicated.is_some());
        (status.status == ReplicationStatus::Enabled && synced).then_some(())
    });
    pages
}

/// Figures that must be so after what was done.
fn look_at_values(prometheus: &Prometheus) {
    for (expression, least, most) in [
        ("max(replicator_status{status=\"ENABLED\",side=\"source\"})", 1.0, 1.0),
        ("sum(replicator_status)", 2.0, 2.0),
        ("min(replicator_connection_up)", 1.0, 1.0),
        ("max(replicator_time_since_last_sync_seconds)", 0.0, 60.0),
        ("min(replicator_destination_objects)", 3032.0, 3040.0),
        ("replicator_source_shipped_objects_total", 3031.0, 1e6),
        ("replicator_source_changed_bytes_total", 88e6, 200e6),
        ("replicator_source_shipped_bytes_total", 88e6, 400e6),
        ("sum(replicator_source_batches_total)", 2.0, 1e6),
        ("replicator_source_sync_running", 0.0, 0.0),
        ("sum(replicator_source_lag_seconds_count{stage=\"applied\"})", 1.0, 1e6),
        ("replicator_source_watches", 31.0, 40.0),
        ("sum(replicator_source_verification_differences)", 0.0, 0.0),
        ("time() - replicator_source_capture_timestamp_seconds", -1.0, 30.0),
        ("replicator_destination_received_bytes_total", 80e6, 400e6),
        ("process_resident_memory_bytes{job=\"replicator\"}", 1e6, 4e9),
        ("process_cpu_seconds_total{job=\"replicator\"}", 0.01, 1e6),
        ("replicator_state_directory_bytes", 1e4, 2e9),
    ] {
        let found = prometheus.query(expression);
        let [(_, value)] = &found[..] else { panic!("{expression}: {found:?}") };
        assert!((least..=most).contains(value), "{expression} is {value}");
    }
}

/// All rules can be evaluated, and none that is critical is on its way to fire.
fn alerts(prometheus: &Prometheus) {
    let rules = prometheus.poll("all rules were evaluated", || {
        let rules = prometheus.rules();
        rules.iter().all(|rule| rule["health"] != "unknown").then_some(rules)
    });
    assert!(rules.len() > 20);
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule}");
    }
    // Before the daemon was there, it was absent; the next evaluation ends that.
    prometheus.poll("nothing critical is on its way", || {
        let critical = |rule: &Value| rule["labels"]["severity"] == "critical";
        let calm = |rule: &Value| !critical(rule) || rule["state"] == "inactive";
        prometheus.rules().iter().all(calm).then_some(())
    });
}
