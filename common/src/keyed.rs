//! HMAC-SHA256: what only those can have said who know a secret.

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// The code of what is added to it, under `secret`.
pub(crate) fn hmac(secret: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(secret).unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"))
}
