//! Amazon's own clients work on the API as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use replicator_tests::aws::Clients;
use replicator_tests::binary;
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::mounts::Scratch;
use replicator_tests::process::{Daemon, Ended, free_port, replicator, run_to_end};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::serial::{self, Share};
use serde_json::Value;

fn clients() -> Clients {
    Clients::install(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

#[track_caller]
fn refused(ended: &Ended, class: &str) {
    assert_ne!(ended.code, Some(0), "{class} was expected: {ended:#?}");
    assert!(ended.stderr.contains(&format!("({class})")), "{class} was expected: {ended:#?}");
}

/// boto3, over everything that the API has; each answer is checked against
/// botocore's model of EFS.
#[test]
fn boto3_replicates_registered_file_systems() {
    let clients = clients();
    let pair = Pair::new(Layout::Same(Ext4));
    let mut daemon = pair.start_enabled("fanotify");
    let base = pair.mounts()[0].path().to_str().unwrap();
    clients.script("one_daemon.py", &[daemon.endpoint(), base], patience() * 4);

    // The pair that the daemon was started for is as it was, also the next time.
    let ids = |daemon: &Daemon| -> Vec<String> {
        let all = daemon.request("GET", "/replicator/v1/status", None).unwrap();
        let all = all.as_array().unwrap().clone();
        all.iter().map(|one| one["SourceFileSystemId"].as_str().unwrap().to_owned()).collect()
    };
    let before = ids(&daemon);
    assert_eq!(before.len(), 2, "the pair's and one of the script's: {before:?}");
    assert!(daemon.interrupt().success());
    daemon = pair.start("fanotify");
    assert_eq!(ids(&daemon), before);
    let known = daemon.request("GET", "/replicator/v1/file-systems", None).unwrap();
    assert!(known.to_string().contains("source-three"), "{known}");
}

/// The AWS CLI: a path and a token where EFS has ids, and no credentials.
#[test]
fn aws_cli_replicates_a_path() {
    let clients = clients();
    let pair = Pair::new(Layout::Same(Ext4));
    let daemon = pair.start_enabled("fanotify");
    let base = pair.mounts()[0].path();
    let (source, replica) = (base.join("source-cli"), base.join("replica-cli"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let efs = |arguments: &[&str]| clients.efs(daemon.endpoint(), None, arguments);
    let body = serde_json::json!({ "replica": replica });
    let token = daemon.request("POST", "/replicator/v1/tokens", Some(body)).unwrap();

    let create = |source: &str, destination: &str| {
        let destination = format!("FileSystemId={destination}");
        let operation = "create-replication-configuration";
        efs(&[operation, "--source-file-system-id", source, "--destinations", &destination])
    };
    let token = token["Token"].as_str().unwrap();
    let created = create(source.to_str().unwrap(), token).success().json();
    assert_eq!(created["Destinations"][0]["Status"], "ENABLING");
    let id = created["SourceFileSystemId"].as_str().unwrap();
    let until = |what: &str, look: &dyn Fn(&Value) -> bool| {
        let end = std::time::Instant::now() + patience();
        loop {
            let describe = ["describe-replication-configurations", "--file-system-id", id];
            let found = efs(&describe).success().json();
            let destination = found["Replications"][0]["Destinations"][0].clone();
            if look(&destination) {
                return destination;
            }
            assert!(std::time::Instant::now() < end, "{what}: {destination}");
        }
    };
    let enabled = until("ENABLED", &|d| d["Status"] == "ENABLED");
    assert_eq!(fs::read(replica.join("file")).unwrap(), b"content");
    let last = &enabled["LastReplicatedTimestamp"];
    until("an idle source's timestamp moves on", &|d| d["LastReplicatedTimestamp"] != *last);

    refused(&create(id, token), "ReplicationAlreadyExists");
    refused(&create("fs-0123abcd", token), "FileSystemNotFound");
    refused(&create("bogus", token), "BadRequest");
    let delete = |id: &str| efs(&["delete-file-system", "--file-system-id", id]);
    refused(&delete(id), "FileSystemInUse");
    // The CLI turns the pages by itself.
    let page = ["describe-replication-configurations", "--max-results", "1"];
    let first = efs(&page).success().json();
    let token = first["NextToken"].as_str().unwrap();
    let second = efs(&[&page[..], &["--next-token", token]].concat()).success().json();
    assert_eq!(second["Replications"][0]["SourceFileSystemId"], id);

    let operation = "delete-replication-configuration";
    let ended = efs(&[operation, "--source-file-system-id", id]).success();
    assert_eq!(ended.stdout, "");
    fs::write(replica.join("file"), "writable after failover").unwrap();
    let ended = efs(&["describe-replication-configurations", "--file-system-id", id]);
    refused(&ended, "ReplicationNotFound");
    let found = efs(&["describe-file-systems", "--file-system-id", id]).success().json();
    let tags = found["FileSystems"][0]["Tags"].to_string();
    assert!(tags.contains(source.to_str().unwrap()), "{found}");
}

const KEY: (&str, &str) =
    ("AKREPLICATOREXAMPLE0", "a secret that only the test and the daemon know");
const READER: (&str, &str) = ("AKREPLICATOREXAMPLE1", "another secret, for those who only look");

/// A destination's daemon that other hosts can reach.
struct Remote {
    daemon: Daemon,
    endpoint: String,
    scratch: Scratch,
    _share: Share,
}

impl Remote {
    fn start() -> Self {
        let share = serial::share();
        let scratch = Scratch::new("remote");
        let port = free_port();
        let key = |(id, secret): (&str, &str), read_only| {
            format!("[[api_key]]\nid = \"{id}\"\nsecret = \"{secret}\"\nread_only = {read_only}\n")
        };
        let config = format!(
            "state_dir = \"{}\"\nlisten = \"127.0.0.1:{}\"\napi = \"0.0.0.0:{port}\"\napi_tls = true\n{}{}",
            scratch.path().join("state").display(),
            free_port(),
            key(KEY, false),
            key(READER, true),
        );
        let file = scratch.path().join("destination.toml");
        fs::write(&file, config).unwrap();
        let serve = || {
            let mut command = Command::new(binary::replicator_dst());
            command.args(["serve", "--config"]).arg(&file);
            command
        };
        // Its secrets are none while others may read them.
        let ended = run_to_end(serve(), Duration::from_secs(10));
        assert!(ended.stderr.contains("chmod o-rwx"), "{ended:#?}");
        private(&file);
        let endpoint = format!("https://127.0.0.1:{port}");
        let mut daemon = Daemon::spawn(serve(), &endpoint, &scratch.path().join("log"));
        daemon.poll_until(patience(), "the API answers", |_| {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        daemon.poll_until(patience(), "its fingerprint", |daemon| fingerprint(&daemon.output()));
        Self { daemon, endpoint, scratch, _share: share }
    }

    fn certificate(&self) -> PathBuf {
        self.scratch.path().join("state/api-certificate.pem")
    }

    /// Our own command, with a key in its environment; `trust` says whose
    /// certificate is the right one.
    fn ours(&self, key: (&str, &str), trust: &[&str], arguments: &[&str]) -> Ended {
        let mut command = Command::new(binary::replicator());
        command.args(["--endpoint", &self.endpoint]).args(trust).args(arguments);
        command.env("AWS_ACCESS_KEY_ID", key.0).env("AWS_SECRET_ACCESS_KEY", key.1);
        run_to_end(command, Duration::from_secs(60))
    }
}

fn private(file: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The one in a log.
fn fingerprint(log: &str) -> Option<String> {
    let (_, rest) = log.split_once("fingerprint=")?;
    rest.get(..64).map(str::to_owned)
}

#[test]
fn over_tls_only_signed_requests_are_answered() {
    let clients = clients();
    let remote = Remote::start();
    let certificate = remote.certificate();
    let bundle = ["--ca-bundle", certificate.to_str().unwrap()];
    let command = |key, arguments: &[&str]| {
        clients.efs_command(&remote.endpoint, key, &[arguments, &bundle].concat())
    };
    let efs =
        |key, arguments: &[&str]| run_to_end(command(key, arguments), Duration::from_secs(60));
    let list = ["describe-replication-configurations"];
    for key in [KEY, READER] {
        let found = efs(Some(key), &list).success().json();
        assert_eq!(found["Replications"], Value::Array(Vec::new()));
    }
    refused(&efs(None, &list), "MissingAuthenticationToken");
    refused(&efs(Some((KEY.0, READER.1)), &list), "InvalidSignatureException");
    refused(&efs(Some(("AKUNKNOWN", KEY.1)), &list), "InvalidClientTokenId");
    // Another authority than this certificate's own.
    let ended = clients.efs(&remote.endpoint, Some(KEY), &list);
    assert!(ended.code != Some(0) && ended.stderr.contains("SSL"), "{ended:#?}");

    // Names that have to be encoded, in path, query and body.
    let path = remote.scratch.path().join("a b é");
    let tag = format!("Key=replicator:path,Value={}", path.display());
    let create = ["create-file-system", "--creation-token", "a/b c~é", "--tags", &tag];
    refused(&efs(Some(READER), &create), "AccessDeniedException");
    let made = efs(Some(KEY), &create).success().json();
    let found = efs(Some(READER), &["describe-file-systems", "--creation-token", "a/b c~é"]);
    assert_eq!(found.success().json()["FileSystems"][0]["FileSystemId"], made["FileSystemId"]);
    let arn = made["FileSystemArn"].as_str().unwrap();
    efs(Some(KEY), &["tag-resource", "--resource-id", arn, "--tags", "Key=k é,Value=+ /=@"])
        .success();
    efs(Some(KEY), &["untag-resource", "--resource-id", arn, "--tag-keys", "k é", "x"]).success();
    refused(
        &efs(Some(READER), &["delete-file-system", "--file-system-id", arn]),
        "AccessDeniedException",
    );

    // A clock that is off by more than a quarter of an hour, either way.
    for (offset, late) in [("-14m", false), ("-16m", true), ("+14m", false), ("+16m", true)] {
        let inner = command(Some(KEY), &list);
        let mut outer = Command::new("faketime");
        outer.args(["-f", offset]).arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        let ended = run_to_end(outer, Duration::from_secs(60));
        match late {
            true => refused(&ended, "RequestExpired"),
            false => drop(ended.success()),
        }
    }
}

#[test]
fn our_commands_work_over_tls_with_keys() {
    let remote = Remote::start();
    let pin = fingerprint(&remote.daemon.output()).unwrap();
    let pinned = ["--fingerprint", &pin];
    let found = remote.ours(READER, &pinned, &["status", "--json"]).success().json();
    assert_eq!(found, Value::Array(Vec::new()));
    let certificate = remote.certificate();
    let ca = ["--ca", certificate.to_str().unwrap()];
    remote.ours(READER, &ca, &["status", "--json"]).success();

    let replica = remote.scratch.path().join("replica");
    let create = ["create-file-system", "--path", replica.to_str().unwrap(), "--name", "r"];
    let ended = remote.ours(READER, &pinned, &create);
    assert!(ended.code == Some(1) && ended.stderr.contains("reading only"), "{ended:#?}");
    let made = remote.ours(KEY, &pinned, &create).success().json();
    let id = made["FileSystemId"].as_str().unwrap();
    let listed = remote.ours(READER, &pinned, &["describe-file-systems"]).success().json();
    assert_eq!(listed[0]["Path"], made["Path"]);

    // The daemon's own program finds key and certificate in the configuration.
    // A registered replica has a token once it may be overwritten.
    let token = || {
        let mut command = Command::new(binary::replicator_dst());
        command.args(["token", "--config"]).arg(remote.scratch.path().join("destination.toml"));
        command.arg("--replica").arg(&replica);
        run_to_end(command, Duration::from_secs(60))
    };
    let ended = token();
    assert!(ended.code == Some(1) && ended.stderr.contains("protection"), "{ended:#?}");
    let protect =
        ["update-file-system-protection", "--replication-overwrite-protection", "DISABLED"];
    let protect = [&protect[..], &["--file-system-id", id]].concat();
    remote.ours(KEY, &pinned, &protect).success();
    assert!(token().success().stdout.starts_with("replicator1:"));
    remote.ours(KEY, &pinned, &["delete-file-system", "--file-system-id", id]).success();

    let wrong = "00".repeat(32);
    for (trust, said, code) in
        [(&[][..], "--fingerprint", 2), (&["--fingerprint", &wrong][..], "certificate", 1)]
    {
        let ended = remote.ours(KEY, trust, &["status"]);
        assert!(ended.code == Some(code) && ended.stderr.contains(said), "{said}: {ended:#?}");
    }
    let nobody = replicator([&["--endpoint", &remote.endpoint, "status"], &pinned[..]].concat());
    assert!(nobody.stderr.contains("is not signed"), "{nobody:#?}");
}
