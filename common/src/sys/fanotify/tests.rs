use super::*;
use crate::sys::handle;
use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};
use std::fs;
use std::path::Path;

/// Captured on Linux 6.18 from an ext4 file system by
/// `what_the_kernel_writes_is_read_in_full`, an event a line: creating, writing and closing
/// `file`, then renaming it to `new`, then unlinking that.
#[rustfmt::skip]
const CAPTURED: [&str; 4] = [
    "58000000030018000a01000000000000ffffffffe03700000200240039acc3cb7d7590f80800000001000000cda50c00f0e5fe4d66696c650000000001001c0039acc3cb7d7590f80800000001000000d1a50c0082a61aaa",
    "78000000030018000000001000000000ffffffffe03700000a00240039acc3cb7d7590f80800000001000000cda50c00f0e5fe4d66696c65000000000c00200039acc3cb7d7590f80800000001000000cda50c00f0e5fe4d6e65770001001c0039acc3cb7d7590f80800000001000000d1a50c0082a61aaa",
    "34000000030018000400000000000000ffffffffe037000001001c0039acc3cb7d7590f80800000001000000d1a50c0082a61aaa",
    "54000000030018000002000000000000ffffffffe03700000200200039acc3cb7d7590f80800000001000000cda50c00f0e5fe4d6e65770001001c0039acc3cb7d7590f80800000001000000d1a50c0082a61aaa",
];

fn rename_mask() -> u64 {
    libc::FAN_CREATE
        | libc::FAN_DELETE
        | libc::FAN_RENAME
        | libc::FAN_CLOSE_WRITE
        | libc::FAN_MODIFY
        | libc::FAN_ATTRIB
        | libc::FAN_ONDIR
}

fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// Everything that is queued: others may be busy on the same file system.
fn read_all(group: &Group) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match group.read(&mut buffer) {
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                return bytes;
            }
        }
    }
}

fn events(bytes: &[u8]) -> Vec<Event> {
    parse(bytes).collect::<Result<_, _>>().unwrap()
}

#[test]
fn what_the_kernel_writes_is_read_in_full() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let root = open(directory.path());
    let id = handle::of_fd(root.as_fd()).unwrap();
    let group = Group::new(Detail::Target, Queue::Unlimited).expect("needs root (CAP_SYS_ADMIN)");
    group.mark_file_system(root.as_fd(), rename_mask()).unwrap();
    assert_eq!(group.marks().unwrap(), 1);
    let path = directory.path().join("file");
    fs::write(&path, "x").unwrap();
    let object = {
        let file = fs::File::open(&path).unwrap();
        handle::of_fd(file.as_fd()).unwrap()
    };
    fs::rename(&path, directory.path().join("new")).unwrap();
    fs::remove_file(directory.path().join("new")).unwrap();
    assert!(group.queued().unwrap() >= 3);
    let bytes = read_all(&group);
    let ours: Vec<Event> =
        events(&bytes).into_iter().filter(|e| e.target.as_ref() == Some(&object)).collect();
    let place =
        |name: &[u8]| Some(Place { directory: id.clone(), name: Some(Name::new(name).unwrap()) });
    let pid = std::process::id() as i32;
    assert!(ours.iter().all(|event| event.pid == pid));
    assert_eq!(ours[0].place, place(b"file"));
    assert!(ours[0].is(libc::FAN_CREATE) && ours[0].is(libc::FAN_CLOSE_WRITE));
    assert_eq!((&ours[1].old, &ours[1].new), (&place(b"file"), &place(b"new")));
    assert!(ours[1].is(libc::FAN_RENAME));
    assert!(ours[2..].iter().any(|e| e.is(libc::FAN_DELETE) && e.place == place(b"new")));
}

fn captured() -> Vec<u8> {
    hex::decode(CAPTURED.concat()).unwrap()
}

/// The capture is of a little-endian machine.
#[cfg(target_endian = "little")]
#[test]
fn captured_events_are_read_as_they_were_meant() {
    let events = events(&captured());
    let directory = ObjectId::new(1, &hex::decode("cda50c00f0e5fe4d").unwrap()).unwrap();
    let target = ObjectId::new(1, &hex::decode("d1a50c0082a61aaa").unwrap());
    let place = |name: &[u8]| {
        Some(Place { directory: directory.clone(), name: Some(Name::new(name).unwrap()) })
    };
    let event = |mask| Event { mask, pid: 0x37e0, target: target.clone(), ..Event::default() };
    let written = libc::FAN_CREATE | libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE;
    let expected = [
        Event { place: place(b"file"), ..event(written) },
        Event { old: place(b"file"), new: place(b"new"), ..event(libc::FAN_RENAME) },
        event(libc::FAN_ATTRIB),
        Event { place: place(b"new"), ..event(libc::FAN_DELETE) },
    ];
    assert_eq!(events, expected);
}

#[test]
fn a_cut_capture_gives_whole_events_and_then_an_error() {
    let bytes = captured();
    let ends: Vec<usize> = CAPTURED
        .iter()
        .scan(0, |end, line| {
            *end += line.len() / 2;
            Some(*end)
        })
        .collect();
    for cut in 0..=bytes.len() {
        let results: Vec<_> = parse(&bytes[..cut]).collect();
        let whole = ends.iter().filter(|end| **end <= cut).count();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), whole, "{cut}");
        let on_boundary = cut == 0 || ends.contains(&cut);
        assert_eq!(results.last().is_some_and(Result::is_err), !on_boundary, "{cut}");
    }
}

#[test]
fn an_overflow_has_neither_place_nor_target() {
    let mut bytes = vec![24, 0, 0, 0, METADATA_VERSION, 0, 24, 0];
    bytes.extend(libc::FAN_Q_OVERFLOW.to_ne_bytes());
    bytes.extend((-1i32).to_ne_bytes());
    bytes.extend(0i32.to_ne_bytes());
    let expected = Event { mask: libc::FAN_Q_OVERFLOW, ..Event::default() };
    assert!(expected.is_overflow());
    assert_eq!(events(&bytes), [expected]);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic_and_with_an_end(
        bytes in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        prop_assert!(parse(&bytes).count() <= bytes.len() / METADATA_LEN + 1);
    }

    /// Random bytes seldom get past the first check; damaged events do.
    #[test]
    fn damaged_events_are_read_without_panic_and_with_an_end(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = captured();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        prop_assert!(parse(&bytes).count() <= bytes.len() / METADATA_LEN + 1);
    }
}
