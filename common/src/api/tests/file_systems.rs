//! File systems, their protection and their tags.

use std::path::PathBuf;

use super::*;
use crate::id::FileSystemId;

const ALL: &str = "/2015-02-01/file-systems";

/// An API that runs both sides, with directories to register.
struct Site {
    fake: Arc<Fake>,
    api: Api,
}

impl Site {
    fn new() -> Self {
        let fake = Arc::new(Fake::default());
        let api = api(&fake).with_tokens(Arc::new(FakeTokens));
        Self { fake, api }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.fake.state.path().canonicalize().unwrap().join(name)
    }

    fn body(&self, name: &str) -> Value {
        let path = self.path(name);
        json!({
            "CreationToken": name,
            "Tags": [
                { "Key": "replicator:path", "Value": path },
                { "Key": "Name", "Value": name },
            ],
        })
    }

    /// Registers a directory; its id.
    fn register(&self, name: &str) -> String {
        let (status, made) = self.ask("POST", ALL, self.body(name));
        assert_eq!(status, 201, "{made}");
        made["FileSystemId"].as_str().unwrap().to_owned()
    }

    fn ask(&self, method: &str, target: &str, body: Value) -> (u16, Value) {
        ask(&self.api, method, target, body)
    }

    fn class(&self, method: &str, target: &str, body: Value) -> (u16, String) {
        class(self.ask(method, target, body))
    }

    fn protect(&self, id: &str, word: &str) -> (u16, Value) {
        let body = json!({ "ReplicationOverwriteProtection": word });
        self.ask("PUT", &format!("{ALL}/{id}/protection"), body)
    }

    fn protection(&self, id: &str) -> String {
        let (_, found) = self.ask("GET", &format!("{ALL}?FileSystemId={id}"), Value::Null);
        let protection = &found["FileSystems"][0]["FileSystemProtection"];
        protection["ReplicationOverwriteProtection"].as_str().unwrap().to_owned()
    }

    fn replicate(&self, source: &str, destination: &str) -> (u16, Value) {
        let body = json!({ "Destinations": [{ "FileSystemId": destination }] });
        self.ask("POST", &at(source), body)
    }

    fn refused(&self, source: &str, destination: &str) -> (u16, String) {
        class(self.replicate(source, destination))
    }
}

fn is(status: u16, name: &str) -> (u16, String) {
    (status, name.to_owned())
}

#[test]
fn a_file_system_has_efs_shape() {
    let site = Site::new();
    let id = site.register("data");
    assert!(site.path("data").is_dir(), "it was made");
    let (status, mut found) = site.ask("GET", &format!("{ALL}?CreationToken=data"), Value::Null);
    assert_eq!(status, 200);
    let one = &mut found["FileSystems"][0];
    assert!(one["SizeInBytes"]["Value"].as_u64().unwrap() > 0, "{one}");
    assert!(one["CreationTime"].as_f64().unwrap() > 1.7e9, "{one}");
    for volatile in ["SizeInBytes", "CreationTime"] {
        one.as_object_mut().unwrap().remove(volatile);
    }
    let expected = json!({
        "FileSystems": [{
            "OwnerId": "000000000000",
            "CreationToken": "data",
            "FileSystemId": id,
            "FileSystemArn": format!("arn:aws:elasticfilesystem:xx-local:000000000000:file-system/{id}"),
            "LifeCycleState": "available",
            "Name": "data",
            "NumberOfMountTargets": 0,
            "PerformanceMode": "generalPurpose",
            "Encrypted": false,
            "ThroughputMode": "bursting",
            "Tags": [
                { "Key": "Name", "Value": "data" },
                { "Key": "replicator:path", "Value": site.path("data") },
            ],
            "FileSystemProtection": { "ReplicationOverwriteProtection": "ENABLED" },
        }],
    });
    assert_eq!(found, expected);
    std::fs::remove_dir(site.path("data")).unwrap();
    let (_, found) = site.ask("GET", ALL, Value::Null);
    assert_eq!(found["FileSystems"][0]["LifeCycleState"], "error");
    let answer = site.protect(&id, "DISABLED");
    assert_eq!(class(answer), is(409, "IncorrectFileSystemLifeCycleState"));
    assert_eq!(site.refused(&id, "T"), is(409, "IncorrectFileSystemLifeCycleState"));
}

#[test]
fn what_cannot_be_registered() {
    let site = Site::new();
    let id = site.register("data");
    let (status, body) = site.ask("POST", ALL, site.body("data"));
    assert_eq!((status, &body["ErrorCode"]), (409, &json!("FileSystemAlreadyExists")));
    assert_eq!(body["FileSystemId"], json!(id));
    let mut same_path = site.body("data");
    same_path["CreationToken"] = json!("other");
    assert_eq!(site.ask("POST", ALL, same_path).1["FileSystemId"], json!(id));

    let without = |member: &str| {
        let mut body = site.body("new");
        body.as_object_mut().unwrap().remove(member);
        body
    };
    let with = |member: &str, value: Value| {
        let mut body = site.body("new");
        body[member] = value;
        body
    };
    let tag = |key: &str, value: &str| json!([{ "Key": key, "Value": value }]);
    std::fs::write(site.path("file"), "").unwrap();
    for (body, class) in [
        (without("CreationToken"), "BadRequest"),
        (with("CreationToken", json!("")), "BadRequest"),
        (with("CreationToken", json!("x".repeat(65))), "BadRequest"),
        (without("Tags"), "BadRequest"),
        (with("Tags", tag("replicator:path", "relative")), "BadRequest"),
        (with("Tags", tag("replicator:path", "/missing/parent")), "BadRequest"),
        (site.body("file"), "BadRequest"),
        (with("Encrypted", json!(true)), "BadRequest"),
        (with("Backup", json!(true)), "BadRequest"),
        (with("PerformanceMode", json!("maxIO")), "BadRequest"),
        (with("ThroughputMode", json!("provisioned")), "BadRequest"),
        (with("AvailabilityZoneName", json!("xx-local-a")), "UnsupportedAvailabilityZone"),
        (json!([]), "BadRequest"),
    ] {
        assert_eq!(site.class("POST", ALL, body.clone()), is(400, class), "{body}");
    }
    assert!(!site.path("new").exists(), "nothing was made");
}

#[test]
fn a_registered_pair_is_replicated_by_id() {
    let site = Site::new();
    let (source, replica) = (site.register("source"), site.register("replica"));
    assert_eq!(site.refused(&source, &replica), is(409, "ConflictException"));
    assert_eq!(site.refused(&source, &source), is(400, "ValidationException"));
    assert_eq!(site.refused(&source, "fs-0123abcd"), is(404, "FileSystemNotFound"));
    assert_eq!(site.refused(&source, "fs-bogus"), is(400, "BadRequest"));
    assert_eq!(site.refused("fs-0123abcd", &replica), is(404, "FileSystemNotFound"));
    // A known file system without a configuration.
    let described = format!("{LIST}?FileSystemId={source}");
    assert_eq!(site.class("GET", &described, Value::Null), is(404, "ReplicationNotFound"));
    assert_eq!(site.class("DELETE", &at(&source), Value::Null), is(404, "ReplicationNotFound"));
    assert_eq!(
        site.class("DELETE", &at("fs-0123abcd"), Value::Null),
        is(404, "FileSystemNotFound")
    );

    let disabled = json!({ "ReplicationOverwriteProtection": "DISABLED" });
    assert_eq!(site.protect(&replica, "DISABLED"), (200, disabled));
    let arn =
        format!("arn%3Aaws%3Aelasticfilesystem%3Axx-local%3A000000000000%3Afile-system%2F{source}");
    let (status, made) = site.replicate(&arn, &replica);
    assert_eq!(status, 200, "{made}");
    assert_eq!(made["SourceFileSystemId"], json!(source));
    assert_eq!(made["Destinations"][0]["FileSystemId"], json!(replica));
    let asked = site.fake.created.lock().unwrap()[0].clone();
    assert_eq!(asked.source, site.path("source"));
    assert_eq!(asked.token, format!("token-for-{}", site.path("replica").display()));

    assert_eq!(site.protection(&replica), "REPLICATING");
    assert_eq!(site.protection(&source), "ENABLED");
    for id in [&source, &replica] {
        let answer = site.protect(id, "DISABLED");
        assert_eq!(class(answer), is(409, "ReplicationAlreadyExists"));
        let target = format!("{ALL}/{id}");
        assert_eq!(site.class("DELETE", &target, Value::Null), is(409, "FileSystemInUse"));
        let found = site.ask("GET", &format!("{LIST}?FileSystemId={id}"), Value::Null);
        assert_eq!(found.1["Replications"].as_array().unwrap().len(), 1);
    }
    let third = site.register("third");
    for (from, to) in [(&source, &third), (&third, &source), (&replica, &third), (&third, &replica)]
    {
        assert_eq!(site.refused(from, to), is(409, "ReplicationAlreadyExists"), "{from} {to}");
    }
    // The destination's id names no configuration to delete.
    assert_eq!(site.class("DELETE", &at(&replica), Value::Null), is(404, "ReplicationNotFound"));

    assert_eq!(site.ask("DELETE", &at(&source), Value::Null).0, 204);
    assert_eq!(site.protection(&replica), "ENABLED");
    assert_eq!(site.refused(&source, &replica), is(409, "ConflictException"));
    for id in [&source, &replica] {
        assert_eq!(site.ask("DELETE", &format!("{ALL}/{id}"), Value::Null), (204, Value::Null));
        let target = format!("{ALL}/{id}");
        assert_eq!(site.class("DELETE", &target, Value::Null), is(404, "FileSystemNotFound"));
    }
    assert!(site.path("replica").is_dir(), "it is forgotten, not deleted");
}

#[test]
fn both_ends_of_a_configuration_are_file_systems() {
    let fake = Arc::new(Fake::with([1]));
    let api = api(&fake);
    let (_, found) = ask(&api, "GET", ALL, Value::Null);
    let all = found["FileSystems"].as_array().unwrap();
    let ids: Vec<&str> = all.iter().map(|one| one["FileSystemId"].as_str().unwrap()).collect();
    assert_eq!(ids, [id(1).as_str(), id(0x1001).as_str()]);
    assert_eq!(all[0]["FileSystemArn"].as_str().unwrap().split(':').nth(3), Some("xx-here-1"));
    assert_eq!(all[0]["Tags"], json!([{ "Key": "replicator:path", "Value": "/data" }]));
    let protection = &all[1]["FileSystemProtection"]["ReplicationOverwriteProtection"];
    assert_eq!(protection, "REPLICATING");
    // They are at other daemons, as far as this registry knows.
    let tags = format!("/2015-02-01/resource-tags/{}", id(1));
    let body = json!({ "Tags": [{ "Key": "a", "Value": "b" }] });
    assert_eq!(class(ask(&api, "POST", &tags, body)), is(400, "BadRequest"));
    assert_eq!(ask(&api, "GET", &tags, Value::Null).0, 200);
}

#[test]
fn an_id_is_no_destination_of_a_daemon_without_that_side() {
    let site = Site::new();
    let (source, replica) = (site.register("source"), site.register("replica"));
    site.protect(&replica, "DISABLED");
    let source_only = api(&site.fake);
    let body = json!({ "Destinations": [{ "FileSystemId": replica }] });
    let (status, error) = ask(&source_only, "POST", &at(&source), body);
    assert_eq!((status, &error["ErrorCode"]), (404, &json!("FileSystemNotFound")));
    assert!(error["Message"].as_str().unwrap().contains("token"), "{error}");
    // By token, a registered source keeps its id.
    let body = json!({ "Destinations": [{ "FileSystemId": "TOKEN" }] });
    let (status, made) = ask(&source_only, "POST", &at(&source), body);
    assert_eq!((status, &made["SourceFileSystemId"]), (200, &json!(source)));
}

#[test]
fn protection_is_set_to_two_words_only() {
    let site = Site::new();
    let id = site.register("data");
    for word in ["DISABLED", "DISABLED", "ENABLED"] {
        let expected = json!({ "ReplicationOverwriteProtection": word });
        assert_eq!(site.protect(&id, word), (200, expected));
        assert_eq!(site.protection(&id), word);
    }
    for bad in ["REPLICATING", "enabled", ""] {
        assert_eq!(class(site.protect(&id, bad)), is(400, "BadRequest"), "{bad}");
    }
    let target = format!("{ALL}/{id}/protection");
    assert_eq!(site.class("PUT", &target, json!({})), is(400, "BadRequest"));
    assert_eq!(class(site.protect("fs-0123abcd", "ENABLED")), is(404, "FileSystemNotFound"));
    assert_eq!(class(site.protect("bogus", "ENABLED")), is(400, "BadRequest"));
}

/// As a part of a query.
fn quoted(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn tags_come_and_go() {
    let site = Site::new();
    let id = site.register("data");
    let tags = format!("/2015-02-01/resource-tags/{id}");
    let tag = |key: &str, value: &str| json!({ "Tags": [{ "Key": key, "Value": value }] });
    assert_eq!(site.ask("POST", &tags, tag("tier é", "gold")), (200, json!({})));
    assert_eq!(site.ask("POST", &tags, tag("Name", "")), (200, json!({})));
    let path = json!({ "Key": "replicator:path", "Value": site.path("data") });
    let (name, tier) =
        (json!({ "Key": "Name", "Value": "" }), json!({ "Key": "tier é", "Value": "gold" }));
    let expected = json!({ "Tags": [name, path, tier] });
    assert_eq!(site.ask("GET", &tags, Value::Null), (200, expected));

    // Page by page.
    let (_, first) = site.ask("GET", &format!("{tags}?MaxResults=2"), Value::Null);
    assert_eq!(first["Tags"], json!([name, path]));
    let next = first["NextToken"].as_str().unwrap();
    let (_, second) =
        site.ask("GET", &format!("{tags}?MaxResults=2&NextToken={next}"), Value::Null);
    assert_eq!(second, json!({ "Tags": [tier] }));

    // Also where keys are as long as they may be, and begin alike.
    let long: Vec<String> = (0..9).map(|n| format!("{}{n}", "é".repeat(127))).collect();
    for key in &long {
        assert_eq!(site.ask("POST", &tags, tag(key, "x")), (200, json!({})));
    }
    let (mut seen, mut next) = (Vec::new(), String::new());
    loop {
        let (_, page) = site.ask("GET", &format!("{tags}?MaxResults=2{next}"), Value::Null);
        seen.extend(page["Tags"].as_array().unwrap().iter().map(|tag| tag["Key"].clone()));
        let Some(token) = page["NextToken"].as_str() else { break };
        assert!(token.len() <= 128, "EFS's clients refuse longer ones: {token}");
        next = format!("&NextToken={token}");
    }
    assert_eq!(seen[..3], ["Name", "replicator:path", "tier é"]);
    let mut rest: Vec<&str> = seen[3..].iter().map(|key| key.as_str().unwrap()).collect();
    rest.sort_unstable();
    assert_eq!(rest, long);
    let keys: Vec<String> = long.iter().map(|key| format!("tagKeys={}", quoted(key))).collect();
    let target = format!("{tags}?{}", keys.join("&"));
    assert_eq!(site.ask("DELETE", &target, Value::Null), (200, json!({})));

    let target = format!("{tags}?tagKeys=tier%20%C3%A9&tagKeys=missing&tagKeys=Name");
    assert_eq!(site.ask("DELETE", &target, Value::Null), (200, json!({})));
    assert_eq!(site.ask("GET", &tags, Value::Null).1, json!({ "Tags": [path] }));

    let many: Vec<Value> = (0..51).map(|n| json!({ "Key": n.to_string(), "Value": "" })).collect();
    for (method, target, body) in [
        ("POST", &tags, tag("replicator:path", "/other")),
        ("POST", &tags, tag("", "x")),
        ("POST", &tags, tag("AWS:x", "x")),
        ("POST", &tags, tag("k%", "x")),
        ("POST", &tags, tag("k", "a\nb")),
        ("POST", &tags, tag(&"k".repeat(129), "x")),
        ("POST", &tags, tag("k", &"v".repeat(257))),
        ("POST", &tags, json!({ "Tags": many })),
        ("POST", &tags, json!({})),
        ("DELETE", &tags, Value::Null),
        ("DELETE", &format!("{tags}?tagKeys=replicator:path"), Value::Null),
        ("GET", &format!("{tags}?MaxResults=0"), Value::Null),
        ("GET", &"/2015-02-01/resource-tags/bogus".to_owned(), Value::Null),
    ] {
        assert_eq!(site.class(method, target, body), is(400, "BadRequest"), "{method} {target}");
    }
    assert_eq!(site.ask("GET", &tags, Value::Null).1, json!({ "Tags": [path] }));
    let target = "/2015-02-01/resource-tags/fs-0123abcd";
    assert_eq!(site.class("GET", target, Value::Null), is(404, "FileSystemNotFound"));
    let target = "/2015-02-01/resource-tags/fsap-0123abcd";
    assert_eq!(site.class("GET", target, Value::Null), is(404, "AccessPointNotFound"));
}

#[test]
fn file_systems_page_by_page() {
    let site = Site::new();
    let mut expected: Vec<String> = (0..5).map(|n| site.register(&format!("d{n}"))).collect();
    let (mut seen, mut marker): (Vec<String>, Option<String>) = (Vec::new(), None);
    loop {
        let after = marker.iter().map(|marker| format!("&Marker={marker}")).collect::<String>();
        let (status, page) = site.ask("GET", &format!("{ALL}?MaxItems=2{after}"), Value::Null);
        assert_eq!(status, 200);
        assert_eq!(page["Marker"].as_str(), marker.as_deref());
        let ids = page["FileSystems"].as_array().unwrap().iter();
        seen.extend(ids.map(|one| one["FileSystemId"].as_str().unwrap().to_owned()));
        marker = page["NextMarker"].as_str().map(str::to_owned);
        if marker.is_none() {
            break;
        }
    }
    expected.sort();
    seen.sort();
    assert_eq!(seen, expected);
    for bad in
        ["MaxItems=0", "Marker=x", "FileSystemId=bogus", "FileSystemId=fs-01234567&CreationToken=x"]
    {
        let answer = site.class("GET", &format!("{ALL}?{bad}"), Value::Null);
        assert_eq!(answer, is(400, "BadRequest"), "{bad}");
    }
    let answer = site.class("GET", &format!("{ALL}?FileSystemId=fs-0123abcd"), Value::Null);
    assert_eq!(answer, is(404, "FileSystemNotFound"));
    let (_, none) = site.ask("GET", &format!("{ALL}?CreationToken=none"), Value::Null);
    assert_eq!(none, json!({ "FileSystems": [] }));
}

#[test]
fn our_own_form_has_the_path() {
    let site = Site::new();
    let own = "/replicator/v1/file-systems";
    let path = site.path("data");
    let body = json!({ "path": path, "tags": { "Name": "data" } });
    let (status, made) = site.ask("POST", own, body.clone());
    assert_eq!((status, &made["Path"], &made["Here"]), (200, &json!(path), &json!(true)));
    let (status, again) = site.ask("POST", own, body);
    assert_eq!((status, &again["FileSystemId"]), (409, &made["FileSystemId"]));
    let (_, all) = site.ask("GET", own, Value::Null);
    let all: Vec<own::FileSystem> = serde_json::from_value(all).unwrap();
    let id: FileSystemId = all[0].file_system.file_system_id.parse().unwrap();
    assert_eq!(site.fake.registry.at(&path).unwrap().id, id);
    // A token for it, by its id.
    let body = json!({ "replica": id });
    let (status, token) = site.ask("POST", "/replicator/v1/tokens", body);
    assert_eq!((status, &token["Replica"]), (200, &json!(path)));
    let body = json!({ "replica": "fs-0123abcd" });
    let answer = site.class("POST", "/replicator/v1/tokens", body);
    assert_eq!(answer, is(404, "FileSystemNotFound"));
}
