//! Whether two states of an object are the same, and in words what differs.
//! Pure.

use replicator_common::object::{Attributes, Kind, ObjectState, Xattr};
use replicator_common::status::Abilities;
use replicator_common::time::Timestamp;

/// Attributes that the kernel of the replica's host keeps by itself.
const KERNEL_OWNED: [&[u8]; 4] =
    [b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor"];
/// Units in which file systems keep times, nanoseconds.
const GRAINS: [i64; 6] = [100, 1000, 1_000_000, 10_000_000, 1_000_000_000, 2_000_000_000];

/// What a source's and a replica's state differ in, in words: the source's side
/// and the replica's. What the replica cannot hold is not compared.
pub fn attributes(
    source: &ObjectState,
    replica: &ObjectState,
    abilities: &Abilities,
) -> Option<(String, String)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut note = |differs: bool, source: String, replica: String| {
        if differs {
            ours.push(source);
            theirs.push(replica);
        }
    };
    let (a, b) = (&source.attributes, &replica.attributes);
    let owner = |of: &Attributes| format!("owner {}:{}", of.uid, of.gid);
    note(abilities.chown && (a.uid, a.gid) != (b.uid, b.gid), owner(a), owner(b));
    // Without the right to chown, bits that speak of the owner may not be set.
    let mask = if abilities.chown { 0o7777 } else { 0o1777 };
    let modes = source.kind != Kind::Symlink && (a.mode ^ b.mode) & mask != 0;
    note(modes, format!("mode {:04o}", a.mode), format!("mode {:04o}", b.mode));
    let mtime = |of: &Attributes| {
        format!(
            "mtime {}.{:09}",
            of.mtime.0.div_euclid(1_000_000_000),
            of.mtime.0.rem_euclid(1_000_000_000)
        )
    };
    note(!same_time(a.mtime, b.mtime), mtime(a), mtime(b));
    let (x, y) = (comparable(&a.xattrs, abilities), comparable(&b.xattrs, abilities));
    note(x != y, xattrs(&x, &y), xattrs(&y, &x));
    let devices = source.kind.is_device() && source.rdev != replica.rdev;
    note(devices, format!("device {:x}", source.rdev), format!("device {:x}", replica.rdev));
    (!ours.is_empty()).then(|| (ours.join(", "), theirs.join(", ")))
}

/// Whether the states differ in nothing but the time of modification.
pub fn only_time(source: &ObjectState, replica: &ObjectState, abilities: &Abilities) -> bool {
    let mtime = source.attributes.mtime;
    let attributes = Attributes { mtime, ..replica.attributes.clone() };
    self::attributes(source, &ObjectState { attributes, ..replica.clone() }, abilities).is_none()
}

/// Whether the replica's time is the source's, as far as its file system keeps
/// it.
fn same_time(source: Timestamp, replica: Timestamp) -> bool {
    source == replica
        || GRAINS.iter().any(|grain| source.0 - source.0.rem_euclid(*grain) == replica.0)
}

/// What the replica can hold and its host does not set by itself.
fn comparable<'a>(xattrs: &'a [Xattr], abilities: &Abilities) -> Vec<&'a Xattr> {
    xattrs
        .iter()
        .filter(|xattr| {
            let name = xattr.name.as_slice();
            let open = name.starts_with(b"user.") || name.starts_with(b"system.");
            abilities.xattrs
                && (open || abilities.privileged_xattrs)
                && !KERNEL_OWNED.contains(&name)
        })
        .collect()
}

/// The names of those that the other side does not have so.
fn xattrs(own: &[&Xattr], other: &[&Xattr]) -> String {
    let names: Vec<_> = own
        .iter()
        .filter(|xattr| !other.contains(xattr))
        .map(|xattr| String::from_utf8_lossy(&xattr.name).into_owned())
        .collect();
    if names.is_empty() {
        "no such xattrs".to_owned()
    } else {
        format!("xattrs {}", names.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(mode: u32, mtime: i64, xattrs: &[(&str, &str)]) -> ObjectState {
        let xattrs = xattrs.iter().map(|(name, value)| Xattr {
            name: name.as_bytes().to_vec(),
            value: value.as_bytes().to_vec(),
        });
        let attributes =
            Attributes { mode, uid: 0, gid: 0, mtime: Timestamp(mtime), xattrs: xattrs.collect() };
        ObjectState { kind: Kind::File, attributes, size: 1, rdev: 0 }
    }

    fn abilities(all: bool) -> Abilities {
        Abilities {
            chown: all,
            xattrs: true,
            privileged_xattrs: all,
            devices: all,
            handles: all,
            links_max: None,
            name_max: None,
        }
    }

    #[test]
    fn what_differs_is_said() {
        let all = abilities(true);
        let a = state(0o644, 5_000_000_001, &[("user.a", "1")]);
        assert_eq!(attributes(&a, &a, &all), None);
        let b = state(0o600, 5_000_000_002, &[("user.a", "2")]);
        let (source, replica) = attributes(&a, &b, &all).unwrap();
        assert_eq!(source, "mode 0644, mtime 5.000000001, xattrs user.a");
        assert_eq!(replica, "mode 0600, mtime 5.000000002, xattrs user.a");
        assert!(!only_time(&a, &b, &all));
        assert!(only_time(&a, &state(0o644, 7, &[("user.a", "1")]), &all));
    }

    #[test]
    fn what_the_replica_cannot_hold_is_no_difference() {
        let none = abilities(false);
        let a = state(0o4644, 1_234_567_891, &[("trusted.a", "1"), ("user.a", "1")]);
        let b = state(0o644, 1_234_567_000, &[("user.a", "1")]);
        assert_eq!(attributes(&a, &b, &none), None);
        assert!(attributes(&a, &b, &abilities(true)).is_some());
        let mut label = a.clone();
        label.attributes.xattrs.insert(0, Xattr { name: KERNEL_OWNED[0].to_vec(), value: vec![] });
        assert_eq!(attributes(&a, &label, &abilities(true)), None);
        assert!(!same_time(Timestamp(2_000_000_001), Timestamp(1_000_000_000)));
    }
}
