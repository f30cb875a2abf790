//! Enrolment tokens: the one line an operator carries from the destination to
//! the source.
//!
//! `replicator1:` and, in base64url without padding: the certificate's
//! fingerprint (32 bytes), the secret (32 bytes), the address (UTF-8,
//! `HOST:PORT`), and the first four bytes of the SHA-256 of all that. The number
//! is the version; so far there is 1.
//!
//! Whoever holds a token can enrol with it once, until it expires: it is to be
//! carried like a password.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::identity::Fingerprint;
use super::quic::check_host_port;

const NAME: &str = "replicator";
const VERSION: u32 = 1;
/// Fingerprint and secret.
const FIXED: usize = 64;
const CHECKSUM: usize = 4;
/// The most bytes a token's line may have: a DNS name of 253 bytes fits.
const LINE_MAX: usize = 512;

/// 256 random bits that prove the right to enrol. Never shown by `Debug`.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// A new one from the thread's cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a source needs to find a destination, to know it, and to be let in.
/// `Display` and `FromStr` are the line; `Debug` hides the secret.
#[derive(Clone, Debug)]
pub struct Token {
    /// Where the destination listens, `HOST:PORT` (UDP).
    pub address: String,
    /// The destination's certificate.
    pub fingerprint: Fingerprint,
    /// What the destination asks for.
    pub secret: Secret,
}

/// Why a text is not a token that can be used here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidToken {
    /// It does not even look like one.
    #[error("not an enrolment token (expected one line that begins with \"replicator1:\")")]
    NotAToken,
    /// It is one, but bytes are missing or changed.
    #[error("the enrolment token is damaged ({0}): copy the whole line again")]
    Damaged(&'static str),
    /// A newer program made it.
    #[error(
        "the enrolment token has version {found}, this program knows up to {VERSION}: update replicator here"
    )]
    Newer {
        /// The version it says.
        found: u32,
    },
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(FIXED + self.address.len() + CHECKSUM);
        bytes.extend_from_slice(&self.fingerprint.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(self.address.as_bytes());
        bytes.extend_from_slice(&checksum(&bytes));
        write!(f, "{NAME}{VERSION}:{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let encoded = split_version(line.trim())?;
        let bytes =
            URL_SAFE_NO_PAD.decode(encoded).map_err(|_| InvalidToken::Damaged("not base64url"))?;
        let (body, sum) =
            bytes.split_last_chunk::<CHECKSUM>().ok_or(InvalidToken::Damaged("too short"))?;
        if *sum != checksum(body) {
            return Err(InvalidToken::Damaged("checksum"));
        }
        let (fingerprint, rest) =
            body.split_first_chunk::<32>().ok_or(InvalidToken::Damaged("too short"))?;
        let (secret, address) =
            rest.split_first_chunk::<32>().ok_or(InvalidToken::Damaged("too short"))?;
        let address = str::from_utf8(address).map_err(|_| InvalidToken::Damaged("address"))?;
        check_host_port(address).map_err(|_| InvalidToken::Damaged("address"))?;
        Ok(Self {
            address: address.to_owned(),
            fingerprint: Fingerprint(*fingerprint),
            secret: Secret(*secret),
        })
    }
}

/// What follows `replicator1:`.
fn split_version(line: &str) -> Result<&str, InvalidToken> {
    if line.len() > LINE_MAX {
        return Err(InvalidToken::NotAToken);
    }
    let (version, encoded) = line
        .strip_prefix(NAME)
        .and_then(|rest| rest.split_once(':'))
        .ok_or(InvalidToken::NotAToken)?;
    match version.parse::<u32>() {
        Ok(VERSION) => Ok(encoded),
        Ok(found) if found > VERSION => Err(InvalidToken::Newer { found }),
        _ => Err(InvalidToken::NotAToken),
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let hash: [u8; 32] = Sha256::digest(bytes).into();
    [hash[0], hash[1], hash[2], hash[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            address: "replica.example:4481".to_owned(),
            fingerprint: Fingerprint([7; 32]),
            secret: Secret([0xab; 32]),
        }
    }

    #[test]
    fn round_trip() {
        let line = token().to_string();
        assert!(line.starts_with("replicator1:") && !line.contains(char::is_whitespace));
        let read: Token = format!("  {line}\n").parse().unwrap();
        assert_eq!(read.address, token().address);
        assert_eq!(read.fingerprint, token().fingerprint);
        assert_eq!(read.secret.0, token().secret.0);
    }

    #[test]
    fn every_changed_or_missing_character_is_noticed() {
        let line = token().to_string();
        for i in 0..line.len() {
            assert!(line[..i].parse::<Token>().is_err(), "cut at {i}");
            let mut changed = line.clone().into_bytes();
            changed[i] = if changed[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(changed.parse::<Token>().is_err(), "changed at {i}");
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        let error = |text: &str| text.parse::<Token>().unwrap_err();
        assert_eq!(error("fs-0123456789abcdef0"), InvalidToken::NotAToken);
        assert_eq!(error("replicator:AAAA"), InvalidToken::NotAToken);
        assert_eq!(error("replicator0:AAAA"), InvalidToken::NotAToken);
        assert_eq!(error("replicator2:AAAA"), InvalidToken::Newer { found: 2 });
        assert_eq!(error("replicator1:AAAA"), InvalidToken::Damaged("too short"));
        assert_eq!(error("replicator1:A A"), InvalidToken::Damaged("not base64url"));
        assert_eq!(error(&"x".repeat(10_000)), InvalidToken::NotAToken);
    }

    #[test]
    fn an_address_nobody_can_call_is_damage() {
        for address in ["", "host", "host:0", "host:99999", "a b:1", "::1:80", "[::1]", "[x]:1"] {
            let line = Token { address: address.to_owned(), ..token() }.to_string();
            assert_eq!(
                line.parse::<Token>().unwrap_err(),
                InvalidToken::Damaged("address"),
                "{address}"
            );
        }
        for address in ["127.0.0.1:4481", "[::1]:4481", "a-b.example:1"] {
            assert!(
                Token { address: address.to_owned(), ..token() }
                    .to_string()
                    .parse::<Token>()
                    .is_ok()
            );
        }
    }

    #[test]
    fn debug_hides_the_secret() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains("ab") && !shown.contains("171"), "{shown}");
    }
}
