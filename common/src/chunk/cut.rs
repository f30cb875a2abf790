//! Where FastCDC cuts, found faster: four places are looked at at a time.
//!
//! A gear hash is a chain, each step of which waits for the one before, so one
//! search leaves most of a processor idle. But the bits that are looked at come
//! from the last 48 bytes alone (the masks have none above), so a search can begin
//! anywhere, [`WARM`] bytes early. The cuts are those of the crate `fastcdc`
//! (`v2020`, normalization 1), which gives the tables; the tests hold them to that.

use fastcdc::v2020::{MASKS, get_gear_with_seed, logarithm2};

/// Bytes that a hash depends on, and some.
const WARM: usize = 64;
/// Bytes that each of the searches goes through.
const STEP: usize = 1024;
/// Searches at a time.
const LANES: usize = 4;

/// Finds the ends of chunks of one average size.
pub struct Cutter {
    min: usize,
    average: usize,
    max: usize,
    mask_short: u64,
    mask_long: u64,
    gear: Box<[u64; 256]>,
}

impl Cutter {
    /// Minimum a quarter of `average`, which is a power of two, maximum four times it.
    pub fn new(average: u32) -> Self {
        let bits = logarithm2(average) as usize;
        let average = average as usize;
        Self {
            min: average / 4,
            average,
            max: average * 4,
            mask_short: MASKS[bits + 1],
            mask_long: MASKS[bits - 1],
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
        let middle = self.average.min(end) & !1;
        self.search(bytes, self.min, middle, self.mask_short)
            .or_else(|| self.search(bytes, middle, end & !1, self.mask_long))
            .unwrap_or(end)
    }

    /// The first place from `from` to `to` whose hash has no bit of the mask.
    fn search(&self, bytes: &[u8], mut from: usize, to: usize, mask: u64) -> Option<usize> {
        while to - from >= LANES * STEP {
            if let Some(found) = self.search_block(bytes, from, mask) {
                return Some(found);
            }
            from += LANES * STEP;
        }
        let mut hash = self.warm(bytes, from);
        for (at, byte) in bytes[from..to].iter().enumerate() {
            hash = self.roll(hash, *byte);
            if hash & mask == 0 {
                return Some(from + at);
            }
        }
        None
    }

    fn search_block(&self, bytes: &[u8], from: usize, mask: u64) -> Option<usize> {
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
            if hashes.iter().any(|hash| hash & mask == 0) {
                if hashes[0] & mask == 0 {
                    return Some(from + at);
                }
                for lane in 1..LANES {
                    if hashes[lane] & mask == 0 {
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
