//! Enrolment: how a [`Token`] becomes two pinned certificates.
//!
//! The source connects under ALPN [`wire::ALPN_ENROL`], knowing the
//! destination's certificate from the token, and sends one [`EnrolRequest`]
//! with the token's secret. The destination learns the source's certificate
//! from the handshake, redeems the secret ([`Tokens`]), pins the certificate,
//! makes both durable and only then answers. An answer that is lost does no
//! harm: the same certificate may present the same secret again and gets the
//! same answer.

use std::time::Duration;

use quinn::{Connection, SendStream};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::NetError;
use super::frame::{FrameError, FrameReader, FrameWriter};
use super::identity::{Fingerprint, Identity};
use super::quic::{self, CLOSE_DONE};
use super::token::{Secret, Token};
use crate::id::FileSystemId;
use crate::time::Timestamp;
use crate::wire;

/// The most bytes of an enrolment message: it comes from a stranger.
pub const MESSAGE_MAX: usize = 16 << 10;
/// How long a destination waits for a stranger's request, and either side for
/// the other to take the last message.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a source waits for the answer: the destination may have to look at
/// a whole directory, and to sync.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// From the source: who wants to be replicated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// The token's secret.
    pub secret: Secret,
    /// The file system to replicate.
    pub source: FileSystemId,
    /// The source's region, as `describe` shows it.
    pub source_region: String,
    /// When the configuration was created, by the source's clock.
    pub creation_time: Timestamp,
    /// Device nodes are to be replicated too.
    pub devices: bool,
}

/// From the destination.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum EnrolAnswer {
    /// The source's certificate is pinned, the configuration exists.
    Accepted(Enrolled),
    /// Nothing was changed.
    Refused {
        /// Why.
        reason: EnrolRefusal,
    },
}

/// What a destination says of itself when it accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// The replica's file system.
    pub destination: FileSystemId,
    /// The destination's region.
    pub region: String,
    /// The replica's directory on the destination, for people to read.
    pub path: String,
    /// The replica was not empty and is to be reconciled.
    pub reconcile: bool,
}

/// Why an enrolment was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum EnrolRefusal {
    /// No token with that secret was issued here.
    #[error("the destination never issued this token")]
    WrongSecret,
    /// The token's time is over.
    #[error("the token has expired: print a new one at the destination")]
    Expired,
    /// Another source redeemed the token.
    #[error("the token has been used by another source")]
    Used,
    /// The token is good, but the destination cannot take the source.
    #[error("the destination cannot: {0}")]
    Unable(String),
}

/// Why an enrolment did not come about.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The destination could not be reached or did not prove to be the one.
    #[error(transparent)]
    Net(NetError),
    /// The destination turns away all strangers: no token waits there.
    #[error("{address} takes no enrolment now: the token has expired or has been used")]
    NotOpen {
        /// The token's address.
        address: String,
    },
    /// The destination gave its reason.
    #[error(transparent)]
    Refused(#[from] EnrolRefusal),
    /// A message could not be exchanged.
    #[error("enrolment: {0}")]
    Frame(#[from] FrameError),
    /// The peer went silent, or away.
    #[error("enrolment: {0}")]
    NoMessage(&'static str),
}

// ---------------------------------------------------------------- source

/// Enrols with the destination that issued `token`. After `Ok`, both sides have
/// agreed; the caller pins [`Token::fingerprint`].
///
/// # Errors
/// [`EnrolError::Refused`] and [`EnrolError::NotOpen`] are final for this token;
/// others may be tried again with the same one.
pub async fn enrol(
    identity: &Identity,
    token: &Token,
    request: &EnrolRequest,
) -> Result<Enrolled, EnrolError> {
    let connection = quic::dial(identity, &token.address, token.fingerprint, wire::ALPN_ENROL)
        .await
        .map_err(EnrolError::Net)?;
    let answer = quic::answer_of(&connection, exchange(&connection, request));
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or(Ok(Err(EnrolError::NoMessage("no answer from the destination"))))
        .unwrap_or_else(|error| match error {
            NetError::Refused { .. } => Err(EnrolError::NotOpen { address: token.address.clone() }),
            other => Err(EnrolError::Net(other)),
        });
    connection.close(CLOSE_DONE, b"");
    match answer? {
        EnrolAnswer::Accepted(enrolled) => Ok(enrolled),
        EnrolAnswer::Refused { reason } => Err(reason.into()),
    }
}

async fn exchange(
    connection: &Connection,
    request: &EnrolRequest,
) -> Result<EnrolAnswer, EnrolError> {
    let explain = |error| EnrolError::Net(quic::explain(connection.remote_address(), error));
    let (send, receive) = connection.open_bi().await.map_err(explain)?;
    let mut writer = FrameWriter::new(send);
    writer.write(request).await?;
    // An error here means that the connection is gone, which the read tells.
    let _ = writer.get_mut().finish();
    let mut reader = FrameReader::with_limit(receive, MESSAGE_MAX);
    reader.read().await?.ok_or(EnrolError::NoMessage("the destination closed without an answer"))
}

// ---------------------------------------------------------------- destination

/// Waits for the request of a peer that was admitted to enrol (see
/// [`quic::accept`]). The caller redeems the secret with the certificate that
/// the handshake proved, makes the outcome durable, and answers.
///
/// # Errors
/// When no valid request arrives within ten seconds; the connection should then
/// be dropped.
pub async fn receive(connection: &Connection) -> Result<(EnrolRequest, Responder), EnrolError> {
    let wait = async {
        let (send, receive) = connection
            .accept_bi()
            .await
            .map_err(|error| EnrolError::Net(quic::explain(connection.remote_address(), error)))?;
        let mut reader = FrameReader::with_limit(receive, MESSAGE_MAX);
        let request = reader.read().await?;
        let request = request.ok_or(EnrolError::NoMessage("the source sent no request"))?;
        Ok((request, Responder { stream: send }))
    };
    tokio::time::timeout(REQUEST_TIMEOUT, wait)
        .await
        .unwrap_or(Err(EnrolError::NoMessage("no request from the source")))
}

/// The way back to a source that waits for its answer.
#[derive(Debug)]
pub struct Responder {
    stream: SendStream,
}

impl Responder {
    /// Answers, and waits until the source has the answer, so that the caller
    /// may close the connection.
    ///
    /// # Errors
    /// When the answer cannot be written. That it did not arrive is no error:
    /// the source asks again.
    pub async fn answer(self, answer: &EnrolAnswer) -> Result<(), EnrolError> {
        let mut writer = FrameWriter::new(self.stream);
        writer.write(answer).await?;
        let mut stream = writer.into_inner();
        if stream.finish().is_ok() {
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, stream.stopped()).await;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------- book-keeping

/// How long a token that was used or has expired is remembered, so that whoever
/// comes late is told why.
const REMEMBER: Duration = Duration::from_secs(7 * 24 * 3600);

/// The tokens a destination has issued. Pure: the caller keeps it durable (it
/// serialises) and tells the time.
///
/// Only the SHA-256 of a secret is kept: who reads the state directory cannot
/// enrol with it. Secrets are 256 random bits, so that a plain hash is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    issued: Vec<Issued>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Issued {
    /// SHA-256 of the secret, in the form of a fingerprint for its hex form.
    hash: Fingerprint,
    /// From this moment on it is worthless.
    expires: Timestamp,
    /// Whose it became.
    used_by: Option<Fingerprint>,
}

/// A token was good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redemption {
    /// For the first time: pin the certificate, make it durable, answer.
    First,
    /// The same peer presents it again, because our answer was lost: give the
    /// same answer again, change nothing.
    Again,
}

impl Tokens {
    /// Enters a secret that may be redeemed before `expires`, and forgets
    /// tokens that ended long before `now`.
    pub fn issue(&mut self, secret: &Secret, expires: Timestamp, now: Timestamp) {
        self.issued.retain(|token| now.since(token.expires) < REMEMBER);
        self.issued.push(Issued { hash: hash(secret), expires, used_by: None });
    }

    /// Redeems a secret for the peer with that certificate. The caller makes
    /// the change durable before it answers.
    ///
    /// # Errors
    /// [`EnrolRefusal`], and nothing is changed.
    pub fn redeem(
        &mut self,
        secret: &Secret,
        peer: Fingerprint,
        now: Timestamp,
    ) -> Result<Redemption, EnrolRefusal> {
        let wanted = hash(secret);
        let mut found = None;
        // All are compared, each in constant time: how long it takes says
        // nothing about what is stored.
        for token in &mut self.issued {
            if equal(&token.hash, &wanted) {
                found = Some(token);
            }
        }
        let token = found.ok_or(EnrolRefusal::WrongSecret)?;
        match token.used_by {
            // Also after its end: the enrolment happened in time.
            Some(user) if user == peer => Ok(Redemption::Again),
            Some(_) => Err(EnrolRefusal::Used),
            None if now >= token.expires => Err(EnrolRefusal::Expired),
            None => {
                token.used_by = Some(peer);
                Ok(Redemption::First)
            }
        }
    }

    /// Whether a token waits to be redeemed: the answer for
    /// [`Trust::enrolment_open`](super::tls::Trust::enrolment_open).
    pub fn open(&self, now: Timestamp) -> bool {
        self.issued.iter().any(|token| token.used_by.is_none() && now < token.expires)
    }

    /// Withdraws every token that was not used.
    pub fn revoke_unused(&mut self) {
        self.issued.retain(|token| token.used_by.is_some());
    }
}

fn hash(secret: &Secret) -> Fingerprint {
    Fingerprint(Sha256::digest(secret.0).into())
}

/// Compares without stopping at the first difference.
fn equal(a: &Fingerprint, b: &Fingerprint) -> bool {
    let difference = a.0.iter().zip(&b.0).fold(0, |all, (x, y)| all | (x ^ y));
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Fingerprint = Fingerprint([1; 32]);
    const OTHER: Fingerprint = Fingerprint([2; 32]);

    fn at(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1_000_000_000)
    }

    #[test]
    fn a_token_is_good_once_and_until_it_expires() {
        let (one, two) = (Secret::random(), Secret::random());
        let mut tokens = Tokens::default();
        assert!(!tokens.open(at(0)));
        tokens.issue(&one, at(100), at(0));
        tokens.issue(&two, at(50), at(0));
        assert!(tokens.open(at(99)) && !tokens.open(at(100)));
        assert_eq!(tokens.redeem(&Secret::random(), PEER, at(1)), Err(EnrolRefusal::WrongSecret));
        assert_eq!(tokens.redeem(&two, PEER, at(50)), Err(EnrolRefusal::Expired));
        assert_eq!(tokens.redeem(&one, PEER, at(99)), Ok(Redemption::First));
        assert!(!tokens.open(at(99)));
        assert_eq!(tokens.redeem(&one, OTHER, at(99)), Err(EnrolRefusal::Used));
    }

    #[test]
    fn a_lost_answer_is_given_again_to_the_same_peer_only() {
        let secret = Secret::random();
        let mut tokens = Tokens::default();
        tokens.issue(&secret, at(100), at(0));
        tokens.redeem(&secret, PEER, at(1)).unwrap();
        let before = tokens.clone();
        assert_eq!(tokens.redeem(&secret, PEER, at(200)), Ok(Redemption::Again));
        assert_eq!(tokens.redeem(&secret, OTHER, at(2)), Err(EnrolRefusal::Used));
        assert_eq!(tokens, before);
    }

    #[test]
    fn survives_a_restart_and_keeps_no_secret() {
        let secret = Secret([0x5a; 32]);
        let mut tokens = Tokens::default();
        tokens.issue(&secret, at(100), at(0));
        let stored = serde_json::to_string(&tokens).unwrap();
        assert!(!stored.contains(&hex::encode(secret.0)));
        let mut read: Tokens = serde_json::from_str(&stored).unwrap();
        assert_eq!(read, tokens);
        assert_eq!(read.redeem(&secret, PEER, at(1)), Ok(Redemption::First));
    }

    #[test]
    fn old_tokens_are_forgotten_and_unused_ones_can_be_revoked() {
        let mut tokens = Tokens::default();
        for i in 0..1000 {
            tokens.issue(&Secret::random(), at(i + 60), at(i));
        }
        let week = 7 * 24 * 3600;
        tokens.issue(&Secret::random(), at(2 * week), at(1059 + week));
        assert_eq!(tokens.issued.len(), 1);
        tokens.revoke_unused();
        assert!(!tokens.open(at(0)));
    }
}
