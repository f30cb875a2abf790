//! Content that names itself by a seed, so that an operation is small to print
//! and can be done again.

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// `length` bytes. Every other seed gives text that compresses well, the rest
/// what does not compress at all.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    if seed.is_multiple_of(2) { incompressible(seed, length) } else { text(seed, length) }
}

/// Random bytes.
pub fn incompressible(seed: u64, length: usize) -> Vec<u8> {
    let mut content = vec![0; length];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut content);
    content
}

fn text(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut content = Vec::with_capacity(length + 64);
    while content.len() < length {
        let word = rng.random_range(0..1000);
        content.extend(format!("{word} lines of a log that repeats itself\n").bytes());
    }
    content.truncate(length);
    content
}
