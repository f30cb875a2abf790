//! The chunks of a large file of which most are probably what and where they were: of a
//! database in which some pages changed, or a log that grew.
//!
//! A chunk that has the hash of the one that began there needs no search, and can be looked
//! at without knowing those before it. So two threads share the file, each some mebibytes
//! at a time, and only what differs is cut, in order (bench/NOTES.md).
//!
//! Memory: two buffers of 512 KiB, or of the longest chunk, and a byte a chunk.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;

use replicator_common::chunk::{Chunk, Chunker, Expected};
use replicator_common::sys::stat::Stat;
use replicator_common::wire::{Extent, Hash};
use rustix::io::Errno;

use super::lane::LaneError;
use super::runs::HOLE;
use super::sink::SinkError;
use super::small::read_full;
use super::windows::{Part, each_chunk, each_part, is_zero, reader, unreadable};

/// Bytes of which one thread looks at the chunks.
const SHARE: u64 = 4 << 20;
/// Bytes that are read at once, or those of one chunk.
const SPAN: u64 = 512 << 10;
/// After so many shares, one after the other, of which nothing is where it was, nothing more
/// is expected to be: something was inserted, or all is new.
const MISSED: u32 = 8;

/// The chunks of a file in order, of which `list` was what it consisted of, cut with the same
/// average. Ends soon after it is to `stop`.
pub(super) fn chunks(
    (fd, stat): (BorrowedFd<'_>, &Stat),
    average: u32,
    list: &[Chunk],
    stop: &AtomicBool,
) -> Result<Vec<Chunk>, LaneError> {
    let mut chunks = Vec::with_capacity(list.len());
    if list.is_empty() {
        each_chunk((fd, stat), average, false, |chunk, _| {
            chunks.push(chunk);
            going_on(stop)
        })?;
        return Ok(chunks);
    }
    let expected = Expected::new(list);
    let look = Look::new(fd, average, &expected, stop);
    look.share()?;
    let seen = look.there.into_iter().map(AtomicBool::into_inner).collect();
    let known = Known { expected: expected.seen(seen), average, stop };
    each_part((fd, stat), |part| match part {
        Part::Hole(length) => {
            chunks.push(Chunk { length, hash: HOLE });
            Ok(u64::from(length))
        }
        Part::Data(extent) => known.chunks(fd, extent, &mut chunks),
    })?;
    Ok(chunks)
}

/// What was there, and what of it still is.
struct Known<'a> {
    expected: Expected<'a>,
    average: u32,
    stop: &'a AtomicBool,
}

impl Known<'_> {
    /// The chunks of a part of the file; gives the bytes that they are.
    fn chunks(
        &self,
        fd: BorrowedFd<'_>,
        part: Extent,
        chunks: &mut Vec<Chunk>,
    ) -> Result<u64, LaneError> {
        let (mut at, end) = (part.offset, part.offset + part.length);
        while at < end {
            if let Some(chunk) = self.at(at, end) {
                at += u64::from(chunk.length);
                chunks.push(chunk);
                continue;
            }
            match self.cut(fd, Extent { offset: at, length: end - at }, chunks)? {
                // The file was cut off meanwhile.
                0 => break,
                cut => at += cut,
            }
        }
        Ok(at - part.offset)
    }

    /// The chunks of some windows, of which one was read for the first that is not where it was,
    /// up to a window's end at which one begins that is, or the part's. Gives the bytes that they
    /// are.
    fn cut(
        &self,
        fd: BorrowedFd<'_>,
        part: Extent,
        chunks: &mut Vec<Chunk>,
    ) -> Result<u64, LaneError> {
        let (mut at, end) = (part.offset, part.offset + part.length);
        let chunker = Chunker::new(reader(fd, part, None), self.average);
        for window in chunker.expecting(&self.expected, at) {
            going_on(self.stop)?;
            let window = window.map_err(unreadable)?;
            let mut from = 0;
            for mut chunk in window.chunks {
                let range = from..from + chunk.length as usize;
                from = range.end;
                if is_zero(&window.bytes[range]) {
                    chunk.hash = HOLE;
                }
                chunks.push(chunk);
                at += u64::from(chunk.length);
            }
            if self.at(at, end).is_some() {
                break;
            }
        }
        Ok(at - part.offset)
    }

    /// The chunk that begins at `at` as it did, and ends before `end`.
    fn at(&self, at: u64, end: u64) -> Option<Chunk> {
        self.expected.seen_at(at).filter(|chunk| at + u64::from(chunk.length) <= end)
    }
}

fn going_on(stop: &AtomicBool) -> Result<(), LaneError> {
    // Nothing is sent meanwhile that would tell that the session has ended.
    if stop.load(Ordering::Relaxed) { Err(SinkError::Closed.into()) } else { Ok(()) }
}

/// The look at which chunks are still there.
struct Look<'a> {
    fd: BorrowedFd<'a>,
    average: u32,
    expected: &'a Expected<'a>,
    stop: &'a AtomicBool,
    /// The first chunk that no thread has taken on.
    next: AtomicUsize,
    missed: AtomicU32,
    /// A thread could not read.
    failed: AtomicBool,
    there: Vec<AtomicBool>,
}

impl<'a> Look<'a> {
    fn new(
        fd: BorrowedFd<'a>,
        average: u32,
        expected: &'a Expected<'a>,
        stop: &'a AtomicBool,
    ) -> Self {
        let there = (0..expected.len()).map(|_| AtomicBool::new(false)).collect();
        let (next, missed, failed) =
            (AtomicUsize::new(0), AtomicU32::new(0), AtomicBool::new(false));
        Self { fd, average, expected, stop, next, missed, failed, there }
    }

    /// Looks at all, with the help of another thread where there is enough for two.
    fn share(&self) -> Result<(), LaneError> {
        if self.expected.len() <= self.each() {
            return self.work();
        }
        thread::scope(|scope| {
            let other = thread::Builder::new().name("lane-ahead".to_owned());
            let other = other.spawn_scoped(scope, || self.work());
            self.work()?;
            match other {
                Ok(other) => other.join().unwrap_or(Err(Errno::IO.into())),
                // Too many threads on this host: one did it all.
                Err(_) => Ok(()),
            }
        })
    }

    /// Looks at one share after the other, until none is left.
    fn work(&self) -> Result<(), LaneError> {
        let looked = self.shares();
        if looked.is_err() {
            // The other need not go on.
            self.failed.store(true, Ordering::Relaxed);
        }
        looked
    }

    fn shares(&self) -> Result<(), LaneError> {
        let mut buffer = Vec::new();
        let goes_on =
            || self.missed.load(Ordering::Relaxed) < MISSED && !self.failed.load(Ordering::Relaxed);
        while goes_on() {
            let share = self.take();
            if share.is_empty() {
                break;
            }
            let (mut number, mut looked, mut met) = (share.start, 0, 0);
            while number < share.end {
                let span = self.span(number, share.end);
                number = span.end;
                let found = self.look(span, &mut buffer)?;
                (looked, met) = (looked + found.0, met + found.1);
            }
            match (looked, met) {
                (0, _) => {}
                (_, 0) => _ = self.missed.fetch_add(1, Ordering::Relaxed),
                _ => self.missed.store(0, Ordering::Relaxed),
            }
        }
        Ok(())
    }

    /// The next share: chunks of [`SHARE`] bytes, about.
    fn take(&self) -> Range<usize> {
        let first = self.next.fetch_add(self.each(), Ordering::Relaxed).min(self.expected.len());
        first..(first + self.each()).min(self.expected.len())
    }

    /// Chunks of a share.
    fn each(&self) -> usize {
        (SHARE / u64::from(self.average)) as usize
    }

    /// Chunks from `first` on that are read at once.
    fn span(&self, first: usize, end: usize) -> Range<usize> {
        let ends = |number| self.expected.get(number).map_or(0, |(at, c)| at + u64::from(c.length));
        let begins = self.expected.get(first).map_or(0, |(at, _)| at);
        let more = (first + 1..end).take_while(|number| ends(*number) - begins <= SPAN);
        first..first + 1 + more.count()
    }

    /// How many of these chunks can be looked at, and how many are still there.
    fn look(&self, span: Range<usize>, buffer: &mut Vec<u8>) -> Result<(usize, usize), LaneError> {
        going_on(self.stop)?;
        let regular = |number: &usize| self.expected.is_regular(*number, self.average);
        let chunks =
            || span.clone().filter(regular).filter_map(|n| Some((n, self.expected.get(n)?)));
        let (Some((_, (from, _))), Some((_, (last, chunk)))) = (chunks().next(), chunks().last())
        else {
            return Ok((0, 0));
        };
        buffer.resize((last + u64::from(chunk.length) - from) as usize, 0);
        // Not quietly: what differs is read again.
        let read = read_full(self.fd, buffer, from)?;
        let (mut looked, mut met) = (0, 0);
        for (number, (at, chunk)) in chunks() {
            let at = (at - from) as usize;
            let bytes = buffer[..read].get(at..at + chunk.length as usize);
            let there = bytes.is_some_and(|bytes| Hash::of(bytes) == chunk.hash);
            self.there[number].store(there, Ordering::Relaxed);
            (looked, met) = (looked + 1, met + usize::from(there));
        }
        Ok((looked, met))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use rand::rngs::StdRng;
    use rand::{Rng, RngCore, SeedableRng};
    use replicator_common::chunk::AVERAGE_MIN;
    use replicator_common::sys::{place, stat};

    use super::*;

    static STOP: AtomicBool = AtomicBool::new(true);
    static GO: AtomicBool = AtomicBool::new(false);

    /// As a file is cut of which nothing is known.
    fn cut(file: &File) -> Vec<Chunk> {
        let stat = stat::of_fd(file.as_fd()).unwrap();
        let mut chunks = Vec::new();
        each_chunk((file.as_fd(), &stat), AVERAGE_MIN, false, |chunk, _| {
            chunks.push(chunk);
            Ok(())
        })
        .unwrap();
        chunks
    }

    fn cut_again(file: &File, list: &[Chunk]) -> Vec<Chunk> {
        let stat = stat::of_fd(file.as_fd()).unwrap();
        chunks((file.as_fd(), &stat), AVERAGE_MIN, list, &GO).unwrap()
    }

    fn noise(rng: &mut StdRng, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        bytes
    }

    /// One change, as programs make them; the last kind of them makes holes.
    fn change(file: &File, rng: &mut StdRng, kinds: u8) -> &'static str {
        let size = file.metadata().unwrap().len();
        let at = rng.random_range(0..=size);
        match rng.random_range(0..kinds) {
            0..3 => {
                for _ in 0..rng.random_range(1..20) {
                    let at = rng.random_range(0..=size) / 4096 * 4096;
                    file.write_all_at(&noise(rng, 4096), at).unwrap();
                }
                "pages"
            }
            3 => {
                let length = rng.random_range(1..6 << 20);
                file.write_all_at(&noise(rng, length), at).unwrap();
                "a long piece"
            }
            4 => {
                let mut rest = vec![0; (size - at) as usize];
                file.read_exact_at(&mut rest, at).unwrap();
                file.write_all_at(b"inserted", at).unwrap();
                file.write_all_at(&rest, at + 8).unwrap();
                "an insertion"
            }
            5 => {
                let length = rng.random_range(1..200_000);
                file.write_all_at(&noise(rng, length), size).unwrap();
                "appended"
            }
            6 => {
                file.set_len(size - rng.random_range(0..(size / 20).max(1))).unwrap();
                "cut off"
            }
            _ => {
                let length = rng.random_range(1..1 << 20);
                place::punch(file, at, length).unwrap();
                "a hole"
            }
        }
    }

    /// Changes a file again and again; tells how it changed, and what it was cut into with the
    /// list before in hand.
    fn changing(kinds: u8, mut each: impl FnMut(&File, &[&str], Vec<Chunk>)) {
        let seed = std::env::var("REPLICATOR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(rand::random::<u64>);
        println!("REPLICATOR_SEED={seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&noise(&mut rng, 5 * SHARE as usize + 12_345), 0).unwrap();
        let mut list = cut(&file);
        assert!(cut_again(&file, &list) == list);
        for _ in 0..20 {
            let changes = rng.random_range(1..4);
            let changes: Vec<_> = (0..changes).map(|_| change(&file, &mut rng, kinds)).collect();
            let now = cut_again(&file, &list);
            list.clone_from(&now);
            each(&file, &changes, now);
        }
    }

    /// However a file changes, its chunks are those of a file of which nothing is known.
    #[test]
    fn what_was_there_changes_nothing_but_the_time() {
        changing(7, |file, changes, now| assert!(now == cut(file), "{changes:?}"));
    }

    /// Where holes come and go, what was cut short at one may be met again. All of it is in
    /// the list, and as it is.
    #[test]
    fn what_was_there_is_as_the_list_says() {
        changing(8, |file, changes, now| {
            let mut at = 0;
            for chunk in now {
                let mut bytes = vec![0; chunk.length as usize];
                file.read_exact_at(&mut bytes, at).unwrap();
                let hash = if is_zero(&bytes) { HOLE } else { Hash::of(&bytes) };
                assert_eq!(chunk.hash, hash, "at {at}, {changes:?}");
                at += u64::from(chunk.length);
            }
            assert_eq!(at, file.metadata().unwrap().len(), "{changes:?}");
        });
    }

    /// What is where it was is found by the look, which gives up where nothing is.
    #[test]
    fn what_is_there_is_found_by_the_look() {
        let mut rng = StdRng::seed_from_u64(1);
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let bytes = noise(&mut rng, 2 * MISSED as usize * SHARE as usize);
        file.write_all_at(&bytes, 0).unwrap();
        let list = cut(&file);
        let found = || {
            let expected = Expected::new(&list);
            let look = Look::new(file.as_fd(), AVERAGE_MIN, &expected, &GO);
            look.share().unwrap();
            let shares = look.next.load(Ordering::Relaxed) / look.each();
            let there = look.there.into_iter().filter(|there| there.load(Ordering::Relaxed));
            (there.count(), shares)
        };
        assert_eq!(found().0, list.len() - 1, "all but the last, which may have been cut short");
        file.write_all_at(b"else", 7 << 20).unwrap();
        assert_eq!(found().0, list.len() - 2);
        file.write_all_at(b"inserted", 0).unwrap();
        file.write_all_at(&bytes, 8).unwrap();
        let (there, shares) = found();
        assert!(there == 0 && shares <= MISSED as usize + 2, "{there} of {shares}");
    }

    /// Where a chunk differs one window is read and all of it used, of which what was seen is
    /// not hashed again.
    #[test]
    fn what_was_seen_is_not_looked_at_again() {
        let mut rng = StdRng::seed_from_u64(3);
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&noise(&mut rng, 3 * SHARE as usize), 0).unwrap();
        let list = cut(&file);
        let numbered = Expected::new(&list);
        let number = |at| (0..).find(|n| numbered.get(n + 1).unwrap().0 > at).unwrap();
        let (differs, claimed) = (number(1 << 20), number((1 << 20) + (200 << 10)));
        file.write_all_at(b"else", 1 << 20).unwrap();
        // Somebody claims to have seen what is not there any more: it is believed.
        file.write_all_at(b"else", (1 << 20) + (200 << 10)).unwrap();
        let seen = (0..list.len()).map(|number| number != differs).collect();
        let expected = Expected::new(&list).seen(seen);
        let known = Known { expected, average: AVERAGE_MIN, stop: &GO };
        let (from, mut chunks) = (numbered.get(differs).unwrap().0, Vec::new());
        let all = Extent { offset: from, length: 3 * SHARE - from };
        let found = known.cut(file.as_fd(), all, &mut chunks).unwrap();
        assert!((SPAN / 2..=SPAN).contains(&found), "{found} bytes of a window");
        assert_ne!(chunks[0], list[differs]);
        assert_eq!(chunks[claimed - differs], list[claimed], "it was hashed");
    }

    #[test]
    fn it_ends_when_told() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&noise(&mut StdRng::seed_from_u64(2), 300_000), 0).unwrap();
        let (list, stat) = (cut(&file), stat::of_fd(file.as_fd()).unwrap());
        for list in [&list[..], &[]] {
            let ended = chunks((file.as_fd(), &stat), AVERAGE_MIN, list, &STOP);
            assert!(matches!(ended, Err(LaneError::Sink(SinkError::Closed))), "{ended:?}");
        }
    }
}
