//! Where FastCDC cuts, found faster: four places are looked at at a time.
//!
//! A gear hash is a chain, each step of which waits for the one before, so one
//! search leaves most of a processor idle. But the bits that are looked at come
//! from the last 48 bytes alone (the masks have none above), so a search can begin
//! anywhere, [`WARM`] bytes early. The cuts are those of the crate `fastcdc`
//! (`v2020`, no normalization), which gives the tables; the tests hold them to that.
//!
//! A chunk is three quarters of the average long at least, and no place before that
//! is looked at; from there on each place is a cut with the probability of two in the
//! average, which makes five quarters of it in the mean. With a quarter as the minimum,
//! the usual choice, 80 % of the bytes are looked at, so 40 %; what an insertion makes
//! new is the same within a tenth (bench/NOTES.md).

use fastcdc::v2020::{MASKS, get_gear_with_seed, logarithm2};

/// Bytes that a hash depends on, and some.
const WARM: usize = 64;
/// Bytes that each of the searches goes through.
const STEP: usize = 512;
/// Searches at a time.
const LANES: usize = 4;

/// Finds the ends of chunks of one average size.
pub struct Cutter {
    min: usize,
    max: usize,
    mask: u64,
    gear: Box<[u64; 256]>,
}

impl Cutter {
    /// Minimum three quarters of `average`, which is a power of two, maximum four times it.
    pub fn new(average: u32) -> Self {
        let bits = logarithm2(average) as usize;
        let average = average as usize;
        Self {
            min: average / 4 * 3,
            max: average * 4,
            mask: MASKS[bits - 1],
            gear: get_gear_with_seed(0).0,
        }
    }

    /// Length of the chunk that begins where `bytes` do; all of them when they end
    /// before it does.
    pub fn cut(&self, bytes: &[u8]) -> usize {
        if bytes.len() <= self.min {
            return bytes.len();
        }
        let end = bytes.len().min(self.max);
        // FastCDC goes by twos.
        self.search(bytes, self.min, end & !1).unwrap_or(end)
    }

    /// The first place from `from` to `to` whose hash has no bit of the mask.
    fn search(&self, bytes: &[u8], mut from: usize, to: usize) -> Option<usize> {
        while to - from >= LANES * STEP {
            if let Some(found) = self.search_block(bytes, from) {
                return Some(found);
            }
            from += LANES * STEP;
        }
        let mut hash = self.warm(bytes, from);
        for (at, byte) in bytes[from..to].iter().enumerate() {
            hash = self.roll(hash, *byte);
            if hash & self.mask == 0 {
                return Some(from + at);
            }
        }
        None
    }

    fn search_block(&self, bytes: &[u8], from: usize) -> Option<usize> {
        let mut hashes: [u64; LANES] =
            std::array::from_fn(|lane| self.warm(bytes, from + lane * STEP));
        let (first, rest) = bytes[from..from + LANES * STEP].split_at(STEP);
        let (second, rest) = rest.split_at(STEP);
        let (third, fourth) = rest.split_at(STEP);
        let mut found = [usize::MAX; LANES];
        let lanes = first.iter().zip(second).zip(third).zip(fourth);
        for (at, (((a, b), c), d)) in lanes.enumerate() {
            hashes[0] = self.roll(hashes[0], *a);
            hashes[1] = self.roll(hashes[1], *b);
            hashes[2] = self.roll(hashes[2], *c);
            hashes[3] = self.roll(hashes[3], *d);
            if hashes.iter().any(|hash| hash & self.mask == 0) {
                if hashes[0] & self.mask == 0 {
                    return Some(from + at);
                }
                for lane in 1..LANES {
                    if hashes[lane] & self.mask == 0 {
                        found[lane] = found[lane].min(from + lane * STEP + at);
                    }
                }
            }
        }
        // Those of a lane lie before those of the next.
        found.into_iter().min().filter(|at| *at < usize::MAX)
    }

    fn roll(&self, hash: u64, byte: u8) -> u64 {
        (hash << 1).wrapping_add(self.gear[usize::from(byte)])
    }

    /// The hash before `at`.
    fn warm(&self, bytes: &[u8], at: usize) -> u64 {
        let from = at.saturating_sub(WARM).max(self.min).min(at);
        bytes[from..at].iter().fold(0, |hash, byte| self.roll(hash, *byte))
    }
}
