//! What has arrived does not travel again: sessions that are cut, a source and
//! a destination that are killed, in the middle of a large file and of many
//! small ones. What went over the cable is counted, over all sessions.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::scenario::patience;
use replicator_tests::workload::content;

const MIB: u64 = 1 << 20;
/// What a cut may cost: frames that wait for a stager, what is on its way, and
/// the chunks that the record did not have yet.
const CUT: u64 = 12 * MIB;

/// What ends a session, and begins the next.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// The destination ends and is started again; the source lives on.
    Session,
    /// `kill -9` of the source; the destination lives on.
    Source,
    /// `kill -9` of both: only files are left, of processes that are no more.
    Both,
}

impl Cut {
    fn make(self, hosts: &mut Hosts, meanwhile: impl FnOnce(&Hosts)) {
        match self {
            Self::Session => {
                hosts.interrupt(Side::Destination);
                meanwhile(hosts);
                hosts.start(Side::Destination);
            }
            Self::Source => {
                hosts.kill(Side::Source);
                meanwhile(hosts);
                hosts.start(Side::Source);
            }
            Self::Both => {
                hosts.kill(Side::Source);
                hosts.kill(Side::Destination);
                meanwhile(hosts);
                hosts.start(Side::Destination);
                hosts.start(Side::Source);
            }
        }
    }
}

/// A generator whose seed is printed; `SEED` in the environment repeats a run.
fn random() -> SmallRng {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    eprintln!("SEED={seed}");
    SmallRng::seed_from_u64(seed)
}

/// Every kind of cut once, in a random order.
fn cuts(random: &mut SmallRng) -> [Cut; 3] {
    let mut cuts = [Cut::Session, Cut::Source, Cut::Both];
    cuts.swap(0, random.random_range(0..3));
    cuts.swap(1, random.random_range(1..3));
    cuts
}

#[track_caller]
fn assert_shipped(
    hosts: &Hosts,
    before: u64,
    content: u64,
    cuts: u64,
    context: &dyn std::fmt::Debug,
) {
    let shipped = hosts.shipped() - before;
    eprintln!("{shipped} bytes for {content}, {context:?}");
    let most = content + content / 10 + cuts * CUT;
    assert!(shipped <= most, "{shipped} bytes travelled for {content}, {context:?}");
    // Else nothing was measured.
    assert!(shipped >= content / 2, "{shipped} bytes travelled for {content}");
}

/// After the first cut the file goes on as it was. After the second, bytes are
/// put in before what has arrived, so that nothing is where it was; after the
/// third, some are written over and some taken out. What still occurs of what
/// has arrived is used.
#[test]
fn a_large_file_arrives_however_often_it_is_cut() {
    const SIZE: u64 = 256 * MIB;
    let (mut hosts, mut random) = (Hosts::enrolled(), random());
    hosts.slow_cable("400mbit");
    let before = hosts.shipped();
    let path = hosts.source().join("large");
    let mut bytes = content::incompressible(1, SIZE as usize);
    fs::write(&path, &bytes).unwrap();
    let cuts = cuts(&mut random);
    for (number, cut) in cuts.into_iter().enumerate() {
        // Together far more than what a cut may cost: from scratch, it would show.
        let more = random.random_range(48 * MIB..72 * MIB);
        hosts.await_shipped_up_to(more, before + SIZE / 10 * 9);
        cut.make(&mut hosts, |_| {
            let at = random.random_range(0..bytes.len() / 8);
            let some = content::incompressible(3, 100_000);
            match number {
                0 => return,
                1 => drop(bytes.splice(at..at, some)),
                _ => {
                    bytes[at..at + some.len()].copy_from_slice(&some);
                    bytes.drain(at + MIB as usize..at + MIB as usize + 1000);
                }
            }
            rewrite(&path, &bytes);
        });
    }
    hosts.settle(&format!("{cuts:?}"));
    assert_shipped(&hosts, before, SIZE, 3, &cuts);
}

/// Every other block of a part of a file is overwritten: blocks travel, not the chunks
/// around them, and those that have arrived when a session ends do not travel again.
#[test]
fn blocks_of_a_patch_travel_once_however_it_is_cut() {
    blocks_travel_once(160 * MIB);
}

/// So much of the file changes that it is put together anew.
#[test]
fn blocks_of_a_new_file_travel_once_however_it_is_cut() {
    blocks_travel_once(96 * MIB);
}

fn blocks_travel_once(size: u64) {
    const PART: u64 = 56 * MIB;
    let (mut hosts, mut random) = (Hosts::enrolled(), random());
    let path = hosts.source().join("base");
    fs::write(&path, content::incompressible(1, size as usize)).unwrap();
    hosts.settle(&"the file as it was");
    hosts.slow_cable("200mbit");
    let before = hosts.shipped();
    let file = fs::File::options().write(true).open(&path).unwrap();
    let new = content::incompressible(2, PART as usize / 2);
    for (number, block) in new.chunks(4096).enumerate() {
        file.write_all_at(block, 8 * MIB + number as u64 * 8192).unwrap();
    }
    hosts.await_shipped_up_to(22 * MIB, before + PART / 2);
    // What is before the part is copied, and so is half of the part.
    await_staged(&hosts, 8 * MIB + 2 * 18 * MIB, || {
        let mut last = [0; 4096];
        let replica = fs::File::open(hosts.replica().join("base")).unwrap();
        replica.read_exact_at(&mut last, 8 * MIB + PART - 8192).unwrap();
        new.ends_with(&last)
    });
    let cut = cuts(&mut random)[0];
    cut.make(&mut hosts, |_| {});
    hosts.settle(&format!("{cut:?}"));
    assert_shipped(&hosts, before, PART / 2, 1, &cut);
}

/// Waits until so much of a file is staged, or all of it has come: on a machine with much else
/// to do the window of a connection may be full of what no stager has seen, and is lost with it.
fn await_staged(hosts: &Hosts, bytes: u64, has_come: impl Fn() -> bool) {
    let start = Instant::now();
    loop {
        let report = hosts.daemon(Side::Destination).status().destination.unwrap();
        let staged = report.arriving.first().map_or(0, |arriving| arriving.bytes);
        if staged >= bytes || has_come() {
            return;
        }
        assert!(start.elapsed() < patience(), "{staged} bytes are staged");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The same file with other content.
fn rewrite(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

#[test]
fn small_files_arrive_however_often_they_are_cut() {
    const FILES: u64 = 20_000;
    const EACH: u64 = 6000;
    let (mut hosts, mut random) = (Hosts::enrolled(), random());
    hosts.slow_cable("120mbit");
    let before = hosts.shipped();
    let root = hosts.source().join("many");
    for directory in 0..20 {
        let path = root.join(directory.to_string());
        fs::create_dir_all(&path).unwrap();
        for file in 0..FILES / 20 {
            let bytes = content::incompressible(directory * FILES + file, EACH as usize);
            fs::write(path.join(file.to_string()), bytes).unwrap();
        }
    }
    let cuts = cuts(&mut random);
    for cut in cuts {
        let more = random.random_range(12 * MIB..20 * MIB);
        hosts.await_shipped_up_to(more, before + FILES * EACH / 10 * 9);
        cut.make(&mut hosts, |_| {});
    }
    hosts.settle(&format!("{cuts:?}"));
    // 300 bytes: attributes, names, the packet's own.
    assert_shipped(&hosts, before, FILES * (EACH + 300), 3, &cuts);
}

/// Failover while the next session uses what was kept: all of it is there.
#[test]
fn what_was_kept_is_in_lost_and_found() {
    let mut hosts = Hosts::enrolled();
    hosts.slow_cable("24mbit");
    hosts.arrives("large", &content::incompressible(9, 64 << 20));
    hosts.await_shipped(12 * MIB);
    Cut::Both.make(&mut hosts, |_| {});
    hosts.await_shipped(6 * MIB);
    hosts.kill(Side::Source);
    let failover = ["failover", "--deletion-mode", "LOCAL_CONFIGURATION_ONLY"];
    let report = hosts.on(Side::Destination, &failover).success().json();
    let name = report["LostAndFound"].as_str().unwrap_or_else(|| panic!("nothing kept: {report}"));
    let directory = hosts.replica().join(name);
    let manifest = fs::read_to_string(directory.join("manifest.json")).unwrap();
    assert!(manifest.contains("partial file"), "{manifest}");
    let sizes = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    let most = sizes.map(|stat| std::os::unix::fs::MetadataExt::blocks(&stat) * 512).max();
    let most = most.unwrap_or(0);
    // Of both sessions together; each alone has less.
    assert!(most > 14 * MIB, "{most} bytes kept: {manifest}");
    assert!(!hosts.replica().join("large").exists());
}
