use super::*;
use crate::api::auth::Permission;

fn path() -> &'static Path {
    Path::new("x.toml")
}

fn source(text: &str) -> Result<SourceConfig, String> {
    parse(text, path()).map_err(|error| error.to_string())
}

fn destination(text: &str) -> Result<DestinationConfig, String> {
    parse(text, path()).map_err(|error| error.to_string())
}

/// The keys of a sample, commented-out ones among them.
fn keys(sample: &str) -> Vec<&str> {
    sample
        .lines()
        .map(|line| line.trim_start_matches('#').trim_start())
        .filter_map(|line| match line.split_once(" = ") {
            Some((key, _)) => Some(key),
            None => line.strip_prefix("[[")?.strip_suffix("]]"),
        })
        .filter(|key| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
        .collect()
}

/// Keys without a default.
const API_KEYS: [&str; 2] = ["api_certificate", "api_private_key"];

/// What a sample shows of credentials is valid once it is no comment.
#[test]
fn samples_of_credentials_are_valid() {
    for sample in [
        include_str!("../../../deploy/config/source.toml"),
        include_str!("../../../deploy/config/destination.toml"),
    ] {
        let (_, tables) = sample.split_once("# [[api_key]]").unwrap();
        let tables =
            tables.replace("\n# ", "\n").replace("64 hexadecimal digits", &"ab".repeat(32));
        let config = source(&format!("api_tls = true\n[[api_key]]{tables}")).unwrap();
        assert_eq!((config.api_keys.len(), config.api_clients.len()), (1, 1));
        let credentials = config.api().credentials();
        assert_eq!(credentials.keys[0].1, Permission::Full);
        assert_eq!(credentials.clients[0].1, Permission::ReadOnly);
        let shown = serde_json::to_string(&config).unwrap();
        assert!(!shown.contains("openssl"), "a secret is shown: {shown}");
    }
}

#[test]
fn an_api_that_others_reach_needs_tls_and_credentials() {
    let key = format!("[[api_key]]\nid = \"{}\"\nsecret = \"{}\"", "A".repeat(16), "s".repeat(32));
    let client = format!("[[api_client]]\nfingerprint = \"{}\"", "ab".repeat(32));
    let remote = "api = \"0.0.0.0:4480\"\n";
    let tls = "api_tls = true\n";
    assert!(source(&format!("{remote}{tls}{key}")).is_ok());
    assert!(source(&format!("{remote}{tls}{client}")).is_ok());
    assert!(source(&format!("{tls}{key}")).is_ok());
    assert!(source(&key).is_ok());
    let refused = "x.toml: api = \"0.0.0.0:4480\" can be reached from other hosts: set api_tls = true and give an [[api_key]] or [[api_client]], or use a loopback address";
    for (text, expected) in [
        (remote.to_owned(), refused),
        (format!("{remote}{tls}"), refused),
        (format!("{remote}{key}"), refused),
        (client, "x.toml: [[api_client]] is of no use without api_tls = true"),
        (format!("{key}\n{key}"), "x.toml: api_key AAAAAAAAAAAAAAAA is given twice"),
        (
            format!("{tls}api_certificate = \"/c\""),
            "x.toml: api_certificate and api_private_key go together",
        ),
        (
            "api_certificate = \"/c\"\napi_private_key = \"/k\"".to_owned(),
            "x.toml: api_certificate is of no use without api_tls = true",
        ),
        (
            key.replace(&"s".repeat(32), "short"),
            "x.toml:3: the secret of an access key has at least 32 characters",
        ),
        (
            key.replace(&"A".repeat(16), "AK"),
            "x.toml:2: \"AK\" is no access key's id (16 to 128 letters and digits)",
        ),
    ] {
        assert_eq!(source(&text).unwrap_err(), expected, "{text}");
    }
    assert!(destination(remote).is_err());
}

#[test]
fn empty_means_defaults() {
    assert_eq!(source("").unwrap(), SourceConfig::default());
    assert_eq!(destination("").unwrap(), DestinationConfig::default());
}

#[test]
fn samples_say_the_defaults_and_name_every_key() {
    let sample = include_str!("../../../deploy/config/source.toml");
    assert_eq!(source(sample).unwrap(), SourceConfig::default());
    let toml::Value::Table(all) = toml::Value::try_from(SourceConfig::default()).unwrap() else {
        panic!("a table")
    };
    for key in all.keys().map(String::as_str).filter(|key| *key != "notify").chain(API_KEYS) {
        assert!(keys(sample).contains(&key), "source.toml lacks {key}");
    }
    names_every_key_of_notify(sample);

    let sample = include_str!("../../../deploy/config/destination.toml");
    let replicas = vec![ReplicaConfig { path: PathBuf::from("/srv/replica"), reconcile: false }];
    assert_eq!(
        destination(sample).unwrap(),
        DestinationConfig { replicas, ..DestinationConfig::default() }
    );
    let toml::Value::Table(all) = toml::Value::try_from(DestinationConfig::default()).unwrap()
    else {
        panic!("a table")
    };
    let rest = API_KEYS.into_iter().chain(["advertise"]);
    let all = all.keys().map(String::as_str);
    for key in all.filter(|key| !matches!(*key, "replica" | "notify")).chain(rest) {
        assert!(keys(sample).contains(&key), "destination.toml lacks {key}");
    }
    names_every_key_of_notify(sample);
}

fn names_every_key_of_notify(sample: &str) {
    assert!(sample.contains("\n[notify]\n"), "{sample}");
    for key in [
        "webhook",
        "webhook_secret_file",
        "webhook_ca_file",
        "command",
        "command_timeout",
        "lag_threshold",
        "hold",
    ] {
        assert!(keys(sample).contains(&key), "a sample lacks notify.{key}");
    }
}

#[test]
fn notify_is_checked() {
    let good = "[notify]\nwebhook = \"https://a.example/b\"\nwebhook_secret_file = \"/k\"\ncommand = [\"/bin/true\", \"x\"]\nhold = \"0ms\"";
    let config = source(good).unwrap();
    assert_eq!(source(&toml::to_string(&config).unwrap()).unwrap(), config);
    assert_eq!(destination(good).unwrap().notify, config.notify);
    for (text, expected) in [
        ("webhook = \"ftp://a\"", "\"ftp://a\" is not an http:// or https:// address"),
        ("webhook = \"a.example\"", "\"a.example\" is not an http:// or https:// address"),
        (
            "command = [\"mail\"]",
            "[\"mail\"] is not a command (expected a program's absolute path and its arguments)",
        ),
        ("webhook_secret_file = \"k\"", "expected an absolute path, got \"k\""),
        ("lag_threshold = \"0s\"", "\"0s\" is out of bounds (expected 1s to 30d)"),
    ] {
        let error = source(&format!("[notify]\n{text}")).unwrap_err();
        assert_eq!(error, format!("x.toml:2: {expected}"));
    }
    let error = destination("[notify]\nwebhook_secret_file = \"/k\"").unwrap_err();
    assert!(error.ends_with("but no webhook"), "{error}");
}

#[test]
fn what_is_written_reads_back() {
    let config = SourceConfig { heartbeat: Interval::from_millis(250), ..SourceConfig::default() };
    assert_eq!(source(&toml::to_string(&config).unwrap()).unwrap(), config);
    let config = DestinationConfig {
        advertise: Some("a.example:1".to_owned()),
        replicas: vec![ReplicaConfig { path: PathBuf::from("/r"), reconcile: true }],
        ..DestinationConfig::default()
    };
    assert_eq!(destination(&toml::to_string(&config).unwrap()).unwrap(), config);
}

#[test]
fn invalid_sources_are_told_in_one_line() {
    for (text, expected) in [
        (
            "\nheartbaet = \"1s\"",
            "x.toml:2: unknown field `heartbaet`, expected one of `state_dir`, `api`, `api_hosts`, `api_tls`, `api_certificate`, `api_private_key`, `region`, `heartbeat`, `settle`, `rescan_interval`, `max_batch_bytes`, `halt_deletions_percent`, `halt_deletions_min`, `halt_deletions_window`, `verify_interval`, `verify_rate`, `watcher`, `devices`, `log`, `log_format`, `notify`, `api_key`, `api_client`",
        ),
        ("heartbeat = \"2m\"", "x.toml:1: \"2m\" is out of bounds (expected 100ms to 1m)"),
        (
            "heartbeat = \"1\"",
            "x.toml:1: \"1\" is not a duration (expected a whole number and ms, s, m, h or d, as in \"500ms\")",
        ),
        ("heartbeat = 1", "x.toml:1: invalid type: integer `1`, expected a string"),
        ("halt_deletions_percent = 101", "x.toml:1: 101 is out of bounds (expected 0 to 100)"),
        ("halt_deletions_min = 0", "x.toml:1: 0 is out of bounds (expected 1 to 1000000000)"),
        (
            "max_batch_bytes = \"1TiB\"",
            "x.toml:1: \"1TiB\" is not a size (expected a whole number and B, KiB, MiB or GiB, as in \"64MiB\")",
        ),
        ("state_dir = \"state\"", "x.toml:1: expected an absolute path, got \"state\""),
        ("api = \"localhost\"", "x.toml:1: invalid socket address syntax"),
        (
            "region = \"local\"",
            "x.toml:1: \"local\" is not a region (expected the form of eu-central-1 or xx-local)",
        ),
        (
            "watcher = \"magic\"",
            "x.toml:1: unknown variant `magic`, expected one of `auto`, `fanotify`, `inotify`, `scan`",
        ),
        (
            "api_hosts = [\"a:1\"]",
            "x.toml:1: \"a:1\" is not a host name (letters, digits, dots and dashes, without a port)",
        ),
        ("devices = true\n\ndevices = false", "x.toml:3: duplicate key"),
    ] {
        assert_eq!(source(text).unwrap_err(), expected, "{text}");
    }
}

#[test]
fn invalid_destinations_are_told_in_one_line() {
    for (text, expected) in [
        ("[[replica]]\nreconcile = true", "x.toml:1: missing field `path`"),
        (
            "[[replica]]\npath = \"/r\"\n[[replica]]\npath = \"/r\"",
            "x.toml: replica /r is given twice",
        ),
        (
            "[[replica]]\npath = \"/r\"\nmode = 1",
            "x.toml:3: unknown field `mode`, expected `path` or `reconcile`",
        ),
        ("listen = \"[::]:0\"", "x.toml: listen needs a fixed port: tokens name it"),
        (
            "advertise = \"replica.example.org\"",
            "x.toml:1: \"replica.example.org\" is not HOST:PORT (as in replica.example.org:4481 or [2001:db8::1]:4481)",
        ),
        ("token_validity = \"8d\"", "x.toml:1: \"8d\" is out of bounds (expected 1m to 7d)"),
    ] {
        assert_eq!(destination(text).unwrap_err(), expected, "{text}");
    }
    assert!(destination("advertise = \"[2001:db8::1]:4481\"").is_ok());
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = load::<SourceConfig>(Path::new("/nonexistent/x.toml")).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot read configuration /nonexistent/x.toml: No such file or directory (os error 2)"
    );
}

#[test]
fn regions() {
    for good in ["xx-local", "eu-central-1", "us-gov-west-1", "us-iso-east-1", "us-isob-east-1"] {
        assert!(is_region(good), "{good}");
    }
    for bad in
        ["local", "", "-", "eu-", "e-central-1", "eu-central-12", "EU-central-1", "us-x-west-1"]
    {
        assert!(!is_region(bad), "{bad}");
    }
}
