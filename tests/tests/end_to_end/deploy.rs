//! What is delivered to run it: each file is what it has to be, and they agree with
//! each other. (What the units do, `packages` tries.)

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use replicator_common::config::{self, DestinationConfig, SourceConfig};
use serde_yaml_ng::Value;

fn deploy(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(deploy(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// All documents of a file.
fn yaml(name: &str) -> Vec<Value> {
    let text = read(name);
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    documents
        .map(|document| {
            let mut value: Value = serde::Deserialize::deserialize(document)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            value.apply_merge().unwrap();
            value
        })
        .collect()
}

#[test]
fn sample_configurations_are_valid() {
    let source = |name: &str| config::load::<SourceConfig>(&deploy(name)).unwrap();
    let destination = |name: &str| config::load::<DestinationConfig>(&deploy(name)).unwrap();
    assert_eq!(source("config/source.toml"), SourceConfig::default());
    assert_eq!(destination("config/destination.toml").replicas.len(), 1);
    // Where the image keeps its state is where the units do.
    let image = source("container/source.toml");
    assert_eq!(image.state_dir, SourceConfig::default().state_dir);
    let image = destination("container/destination.toml");
    assert_eq!(image.state_dir, DestinationConfig::default().state_dir);
    assert_eq!(image.replicas[0].path, Path::new("/replica"));
    for (name, map, key) in [
        ("kubernetes/base/source.yaml", "source", "source.toml"),
        ("kubernetes/base/destination.yaml", "destination", "destination.toml"),
    ] {
        let all = yaml(name);
        let found = all.iter().find(|one| one["kind"] == "ConfigMap").unwrap();
        assert_eq!(found["metadata"]["name"], map);
        let text = found["data"][key].as_str().unwrap();
        match map {
            "source" => drop(config::parse::<SourceConfig>(text, Path::new(name)).unwrap()),
            _ => drop(config::parse::<DestinationConfig>(text, Path::new(name)).unwrap()),
        }
    }
}

/// The one list of rights is the unit's, where a test has tried it.
fn of_unit(name: &str) -> BTreeSet<String> {
    let text = read(&format!("systemd/{name}.service"));
    let lines = text.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let words = lines.flat_map(str::split_whitespace);
    words.map(|word| word.trim_start_matches("CAP_").to_owned()).collect()
}

fn words(list: &Value) -> BTreeSet<String> {
    let list = list.as_sequence().unwrap_or_else(|| panic!("no list: {list:?}"));
    list.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

#[test]
fn containers_have_the_rights_of_the_units_and_no_others() {
    let compose = &yaml("container/compose.yaml")[0];
    for (service, unit) in [("source", "replicator-src"), ("destination", "replicator-dst")] {
        let service = &compose["services"][service];
        assert_eq!(words(&service["cap_add"]), of_unit(unit));
        assert_eq!(words(&service["cap_drop"]), BTreeSet::from(["ALL".to_owned()]));
        assert_eq!(service["command"][0], unit);
        assert!(service["privileged"].is_null());
    }
    for (name, kind, unit) in [
        ("kubernetes/base/source.yaml", "DaemonSet", "replicator-src"),
        ("kubernetes/base/destination.yaml", "StatefulSet", "replicator-dst"),
        ("kubernetes/sidecar.yaml", "StatefulSet", "replicator-src"),
    ] {
        let all = yaml(name);
        let found = all.iter().find(|one| one["kind"] == kind).unwrap();
        let containers = found["spec"]["template"]["spec"]["containers"].as_sequence().unwrap();
        let container = containers.iter().find(|one| one["name"] == unit).unwrap();
        let context = &container["securityContext"];
        assert_eq!(words(&context["capabilities"]["add"]), of_unit(unit), "{name}");
        assert_eq!(words(&context["capabilities"]["drop"]), BTreeSet::from(["ALL".to_owned()]));
        assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(container["command"][0], unit);
        // A source sees what is mounted on its host later, and writes nowhere.
        for mount in container["volumeMounts"].as_sequence().unwrap() {
            if unit == "replicator-src" && mount["name"] == "data" {
                assert_eq!(mount["mountPropagation"], "HostToContainer", "{name}");
                assert_eq!(mount["readOnly"], true, "{name}");
            }
        }
    }
}

#[test]
fn manifests_are_what_they_are_called() {
    let kinds = |name: &str| -> Vec<String> {
        let named = |one: &Value| {
            assert!(one["apiVersion"].is_string() && one["metadata"]["name"].is_string());
            one["kind"].as_str().unwrap().to_owned()
        };
        yaml(name).iter().map(named).collect()
    };
    assert_eq!(kinds("kubernetes/base/namespace.yaml"), ["Namespace"]);
    assert_eq!(kinds("kubernetes/base/source.yaml"), ["ConfigMap", "DaemonSet"]);
    let destination = ["ConfigMap", "Service", "StatefulSet"];
    assert_eq!(kinds("kubernetes/base/destination.yaml"), destination);
    assert_eq!(kinds("kubernetes/sidecar.yaml"), ["StatefulSet"]);
    let base = &yaml("kubernetes/base/kustomization.yaml")[0];
    for resource in words(&base["resources"]) {
        assert!(deploy("kubernetes/base").join(&resource).is_file(), "{resource}");
    }
    // Kubernetes lets only a privileged container show its mounts to others.
    let patches = &yaml("kubernetes/shared-replica/destination.yaml")[0];
    let values: Vec<_> = patches.as_sequence().unwrap().iter().map(|one| &one["value"]).collect();
    assert!(values.iter().any(|value| value["privileged"] == true));
    // The directory above the replica, so that the mount over it is known at the next
    // start.
    let mount = values.iter().find(|value| value["mountPropagation"] == "Bidirectional");
    let mount = mount.unwrap()["mountPath"].as_str().unwrap();
    let changes = yaml("kubernetes/shared-replica/kustomization.yaml")[0]["patches"][0]["patch"]
        .as_str()
        .map(|text| serde_yaml_ng::from_str::<Value>(text).unwrap())
        .unwrap();
    let text = changes[0]["value"].as_str().unwrap();
    let parsed = config::parse::<DestinationConfig>(text, Path::new("shared-replica")).unwrap();
    let replica = &parsed.replicas[0].path;
    assert_eq!(replica.parent(), Some(Path::new(mount)), "{}", replica.display());
}

/// A mount that the destination makes in a mount namespace of its own protects nobody
/// else; these give a unit one (systemd.exec(5)).
#[test]
fn units_of_the_destination_have_no_mounts_of_their_own() {
    let forbidden = [
        "ProtectSystem",
        "ProtectHome",
        "ProtectProc",
        "ProcSubset",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateIPC",
        "PrivateUsers",
        "PrivateNetwork",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "BindPaths",
        "BindReadOnlyPaths",
        "TemporaryFileSystem",
        "MountFlags",
        "MountImages",
        "RootDirectory",
        "RootImage",
        "LogNamespace",
        "DynamicUser",
        "NetworkNamespacePath",
    ];
    for unit in ["replicator-dst", "replicator-dst-protect"] {
        let text = read(&format!("systemd/{unit}.service"));
        let keys = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once('=').map(|(key, _)| key));
        let found: Vec<_> = keys.filter(|key| forbidden.contains(key)).collect();
        assert!(found.is_empty(), "{unit}: {found:?}");
    }
}
