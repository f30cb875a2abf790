//! The connection to the destination: opened, kept up and opened again, with
//! backoff, by one asynchronous task. It moves frames and knows nothing of
//! what they mean beyond the two hellos.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use replicator_common::net::NetError;
use replicator_common::net::clock::Exchange;
use replicator_common::net::frame::{Compression, FrameReader, FrameWriter, encode_frame};
use replicator_common::net::identity::{Fingerprint, Identity};
use replicator_common::net::quic::{self, CLOSE_PROTOCOL};
use replicator_common::pulse;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ALPN, DATA_STREAMS, DestinationHello, DestinationMessage, Refusal, SourceHello, SourceMessage,
};
use tokio::sync::{AcquireError, Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::read::sink::{Frame, Sink, SinkError, Wired};

/// First and longest pause between attempts to connect. An attempt that began
/// while the network was cut is of use if the network is back by its last
/// packet, after 7 of the 10 seconds that it has; else the next one is. So it
/// takes 7 s at most from the end of a cut to the next try, however long the
/// cut was.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(4));
/// After a session that lasted this long, the pauses begin anew with the first.
/// After a shorter one they go on to grow: else a destination that takes every
/// session and ends it at once would be called without pause.
const LASTING: Duration = Duration::from_secs(10);
/// Attempts that are under way at once, however many are in a hurry.
const DIALS: usize = 3;
/// The destination reports once a second or so. One that answers at the level of
/// QUIC and has said nothing for this long hangs.
pub const SILENCE: Duration = Duration::from_secs(60);
/// Messages of the destination that wait in memory for the engine; a large one
/// counts once for each [`MESSAGE_BYTES`]. An honest one has a handful under way.
const MESSAGES: usize = 64;
/// Bytes of memory that one message may take.
const MESSAGE_BYTES: usize = 1 << 20;
/// How long the destination may take to answer a hello: it redoes logged
/// batches first.
const HELLO_TIMEOUT: Duration = Duration::from_secs(120);
/// Frames that wait in memory for one data stream; a frame is about half a
/// mebibyte, so this bounds a session's memory to some 16 MiB.
const DATA_QUEUE: usize = 8;
/// Control frames that wait in memory.
const CONTROL_QUEUE: usize = 64;

/// Whom to connect to.
#[derive(Clone, Debug)]
pub struct Remote {
    /// `host:port`.
    pub address: String,
    /// The destination's certificate.
    pub fingerprint: Fingerprint,
}

/// What the link tells the engine.
pub enum LinkEvent {
    /// A session is open.
    Connected(Session),
    /// A message of session `number`.
    Message {
        /// The session.
        number: u64,
        /// The message.
        message: Box<DestinationMessage>,
        /// Given back when the message has been dealt with: the next may come.
        room: OwnedSemaphorePermit,
    },
    /// A message of session `number` and its answer, by both clocks.
    Clocks {
        /// The session.
        number: u64,
        /// The moments.
        exchange: Exchange,
        /// As of a message.
        room: OwnedSemaphorePermit,
    },
    /// Session `number` ended, or could not be opened (then it never began).
    Lost {
        /// The session.
        number: u64,
        /// Why, in words.
        reason: String,
        /// The destination's own word, when it gave one.
        refusal: Option<Refusal>,
        /// When the next attempt begins.
        next: Timestamp,
    },
}

/// One open session, as the engine holds it. Dropping it ends the session.
pub struct Session {
    /// Counts sessions of this process.
    pub number: u64,
    /// What the destination said of itself.
    pub hello: DestinationHello,
    /// Where content goes.
    pub sink: Sink,
    /// The greeting and its answer, by both clocks.
    pub clocks: Exchange,
    connection: quinn::Connection,
    control: mpsc::Sender<Frame>,
    wired: Arc<Wired>,
    verdict: Arc<OnceLock<String>>,
}

impl Session {
    /// Ends the session because the destination broke the protocol. The link
    /// tells of the end, with this reason.
    pub fn reject(&self, reason: String) {
        // The first breach is the one to tell. Set before the link can see the
        // connection's end, which it then takes this for the cause of.
        let _ = self.verdict.set(reason.clone());
        self.connection.close(CLOSE_PROTOCOL, reason.as_bytes());
    }

    /// Whether [`Self::reject`] was called: what arrived before it took effect
    /// means nothing any more.
    pub fn is_rejected(&self) -> bool {
        self.verdict.get().is_some()
    }

    /// Queues a control message; blocks while the network is slower than we are.
    pub fn send(&self, message: &SourceMessage) -> Result<(), SinkError> {
        self.send_together(&[message])
    }

    /// Queues control messages that travel in one packet, if they fit into one.
    pub fn send_together(&self, messages: &[&SourceMessage]) -> Result<(), SinkError> {
        let mut frames = Vec::with_capacity(messages.len());
        for message in messages {
            let frame = encode_frame(message, Compression::Auto)?;
            self.wired.frame(frame.len());
            frames.push(frame.into());
        }
        let sent = pulse::waiting(|| self.control.blocking_send(frames));
        sent.map_err(|_| SinkError::Closed)
    }

    /// The connection's present round trip.
    pub fn round_trip(&self) -> Duration {
        self.connection.rtt()
    }

    /// The destination's address.
    pub fn peer(&self) -> String {
        self.connection.remote_address().to_string()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.close(quinn::VarInt::from_u32(0), b"session dropped");
    }
}

/// What the link runs with.
pub struct Link {
    /// Our certificate.
    pub identity: Identity,
    /// Whom to connect to.
    pub remote: Remote,
    /// Counts what is put on the wire.
    pub wired: Arc<Wired>,
    /// When notified, the link does not wait until the next attempt is due.
    pub hurry: Arc<Notify>,
    /// A destination that has said nothing for this long hangs.
    pub silence: Duration,
}

/// Runs the link until `hello` or the engine's inbox is gone: opens sessions
/// one after the other. `hello` makes the greeting of a new session.
pub async fn run(
    link: Link,
    hello: impl Fn() -> Option<SourceHello> + Send + 'static,
    events: Sender<LinkEvent>,
) {
    let mut pause = BACKOFF.0;
    let mut previous = None;
    for number in 1.. {
        let Some(greeting) = hello() else { return };
        let greeting = SourceHello { previous, ..greeting };
        let began = Instant::now();
        let attempt = Attempt { link: &link, number };
        let (reason, refusal) = match attempt.open(greeting).await {
            Ok((session, task)) => {
                previous = Some(session.hello.session);
                if events.send(LinkEvent::Connected(session)).is_err() {
                    return;
                }
                let failure = task.pump(&events).await;
                if began.elapsed() >= LASTING {
                    pause = BACKOFF.0;
                }
                failure
            }
            Err(failure) => failure,
        };
        let nanos = i64::try_from(pause.as_nanos()).unwrap_or(i64::MAX);
        let next = Timestamp::now().offset(nanos);
        if events.send(LinkEvent::Lost { number, reason, refusal, next }).is_err() {
            return;
        }
        // Either way it is tried again.
        let _ = tokio::time::timeout(pause, link.hurry.notified()).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

type Failure = (String, Option<Refusal>);

struct Attempt<'a> {
    link: &'a Link,
    number: u64,
}

impl Attempt<'_> {
    /// Connects. When somebody is in a hurry, another attempt is made beside the
    /// one that is under way, because the packets of each go out at ever longer
    /// intervals.
    async fn dial(&self) -> Result<quinn::Connection, NetError> {
        let Link { identity, remote, hurry, .. } = self.link;
        let dial = || {
            let (identity, remote) = (identity.clone(), remote.clone());
            async move { quic::dial(&identity, &remote.address, remote.fingerprint, ALPN).await }
        };
        let mut attempts = JoinSet::new();
        attempts.spawn(dial());
        loop {
            tokio::select! {
                () = hurry.notified(), if attempts.len() < DIALS => drop(attempts.spawn(dial())),
                Some(ended) = attempts.join_next() => match ended {
                    Ok(Err(_)) if !attempts.is_empty() => {}
                    Ok(ended) => return ended,
                    Err(panicked) => return Err(NetError::Setup(panicked.to_string())),
                },
            }
        }
    }

    async fn open(&self, greeting: SourceHello) -> Result<(Session, Pump), Failure> {
        let plain = |error: &dyn std::fmt::Display| (error.to_string(), None);
        let connection = self.dial().await.map_err(|error| plain(&error))?;
        let broke = |error: &dyn std::fmt::Display| {
            (quic::ending(&connection).unwrap_or_else(|| error.to_string()), None)
        };
        let source_id = greeting.source.clone();
        // (What breaks before the server has taken our certificate is told by the answer.)
        let exchange = async {
            let (send, receive) = connection.open_bi().await.map_err(|error| broke(&error))?;
            prefer(&send, 2);
            let mut writer = FrameWriter::new(send);
            let mut reader = FrameReader::new(receive);
            let greeting = SourceHello { time: Timestamp::now(), ..greeting };
            writer.write(&SourceMessage::Hello(greeting)).await.map_err(|error| broke(&error))?;
            let answer = tokio::time::timeout(HELLO_TIMEOUT, reader.read::<DestinationMessage>())
                .await
                .map_err(|_| ("the destination does not answer".to_owned(), None))?;
            let heard = Timestamp::now();
            let answer = answer.map_err(|error| broke(&error))?;
            Ok::<_, Failure>((writer, reader, answer, heard))
        };
        let answer = quic::answer_of(&connection, exchange).await.map_err(|error| match error {
            // It was pinned when the configuration was made: the destination
            // has none any more.
            NetError::Refused { .. } => {
                (error.to_string(), Some(Refusal::NoConfiguration { source_id }))
            }
            other => plain(&other),
        })?;
        let (writer, reader, answer, heard) = answer?;
        let hello = match answer {
            Some(DestinationMessage::Hello(hello)) => hello,
            Some(DestinationMessage::Refused(refusal)) => {
                return Err((refusal.to_string(), Some(refusal)));
            }
            Some(_) => return Err(("the destination answered out of turn".to_owned(), None)),
            None => return Err(("the destination closed the session".to_owned(), None)),
        };
        let clocks =
            Exchange { sent: hello.echo, received: hello.received, answered: hello.time, heard };
        let mut writers = JoinSet::new();
        let (control, frames) = mpsc::channel(CONTROL_QUEUE);
        writers.spawn(write_frames(writer.into_inner(), frames));
        let mut queues = Vec::new();
        for number in 0..DATA_STREAMS {
            let stream = connection.open_uni().await.map_err(|error| broke(&error))?;
            // The first half carries packs (see `Sink`): small objects never
            // queue behind large ones.
            prefer(&stream, if number < DATA_STREAMS / 2 { 1 } else { 0 });
            let (queue, frames) = mpsc::channel(DATA_QUEUE);
            writers.spawn(write_frames(stream, frames));
            queues.push(queue);
        }
        let wired = &self.link.wired;
        let verdict = Arc::<OnceLock<String>>::default();
        let session = Session {
            number: self.number,
            hello,
            sink: Sink::new(queues, wired.clone(), compression_to(&connection)),
            clocks,
            connection: connection.clone(),
            control,
            wired: wired.clone(),
            verdict: verdict.clone(),
        };
        let room = Arc::new(Semaphore::new(MESSAGES));
        let number = self.number;
        let silence = self.link.silence;
        Ok((session, Pump { number, connection, reader, writers, room, verdict, silence }))
    }
}

/// What stays on the host is not compressed: the loopback copies memory several
/// times as fast as zstd reads it (see bench/NOTES.md).
fn compression_to(connection: &quinn::Connection) -> Compression {
    match connection.remote_address().ip().to_canonical().is_loopback() {
        true => Compression::Never,
        false => Compression::Auto,
    }
}

/// What is written to a stream of higher priority is sent first. An error says
/// that the stream is gone, which its next use tells too.
fn prefer(stream: &quinn::SendStream, priority: i32) {
    let _ = stream.set_priority(priority);
}

async fn write_frames(
    mut stream: quinn::SendStream,
    mut frames: mpsc::Receiver<Frame>,
) -> Result<(), String> {
    while let Some(mut parts) = frames.recv().await {
        stream.write_all_chunks(&mut parts).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Moves what comes from the destination to the engine until the session ends.
struct Pump {
    number: u64,
    connection: quinn::Connection,
    reader: FrameReader<quinn::RecvStream>,
    writers: JoinSet<Result<(), String>>,
    /// Of messages on their way to the engine.
    room: Arc<Semaphore>,
    /// Why the engine ended the session, if it did.
    verdict: Arc<OnceLock<String>>,
    silence: Duration,
}

impl Pump {
    async fn pump(mut self, events: &Sender<LinkEvent>) -> Failure {
        let failure = self.until_the_end(events).await;
        match self.verdict.get() {
            Some(verdict) => (format!("the destination broke the protocol: {verdict}"), None),
            None => failure,
        }
    }

    /// Why it broke; what the connection itself says of that comes first.
    fn broke(&self, error: &dyn std::fmt::Display) -> Failure {
        let reason = quic::ending(&self.connection).unwrap_or_else(|| error.to_string());
        self.close(reason)
    }

    async fn until_the_end(&mut self, events: &Sender<LinkEvent>) -> Failure {
        loop {
            // INVARIANT (bounded resources): what is read and not dealt with is
            // MESSAGES messages at most, of MESSAGES * MESSAGE_BYTES together, and
            // the one that is being read; a destination that says more is stopped
            // by QUIC's flow control.
            let Ok(mut room) = self.room.clone().acquire_owned().await else {
                return self.close("the source stops".to_owned());
            };
            let message = tokio::select! {
                message = tokio::time::timeout(self.silence, self.reader.read()) => match message {
                    Ok(message) => message,
                    Err(_) => {
                        let silent = format!(
                            "the destination hangs: it has said nothing for {} s",
                            self.silence.as_secs()
                        );
                        return self.close(silent);
                    }
                },
                Some(ended) = self.writers.join_next() => match ended {
                    Ok(Err(reason)) => return self.broke(&reason),
                    Err(panicked) => return self.close(panicked.to_string()),
                    // The engine let the session go.
                    Ok(Ok(())) => continue,
                },
            };
            match message {
                Ok(Some(DestinationMessage::Refused(refusal))) => {
                    let reason = self.close(refusal.to_string()).0;
                    return (reason, Some(refusal));
                }
                Ok(Some(message)) => {
                    let Ok(more) = self.room_for_large().await else {
                        return self.close("the source stops".to_owned());
                    };
                    room.merge(more);
                    let event = self.event(message, room);
                    if events.send(event).is_err() {
                        return self.close("the source stops".to_owned());
                    }
                }
                Ok(None) => return self.close("the destination closed the session".to_owned()),
                Err(error) => return self.broke(&error),
            }
        }
    }

    /// What the message that was just read needs beside the room of a small one.
    async fn room_for_large(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        // One has room already; more than all of it would never be there.
        let more = (self.reader.weight() / MESSAGE_BYTES).min(MESSAGES - 1);
        self.room.clone().acquire_many_owned(more as u32).await
    }

    fn event(&self, message: DestinationMessage, room: OwnedSemaphorePermit) -> LinkEvent {
        let number = self.number;
        match message {
            // Read here, before the message waits for the engine.
            DestinationMessage::Clock { sent, received, answered } => {
                let heard = Timestamp::now();
                let exchange = Exchange { sent, received, answered, heard };
                LinkEvent::Clocks { number, exchange, room }
            }
            message => LinkEvent::Message { number, message: Box::new(message), room },
        }
    }

    fn close(&self, reason: String) -> Failure {
        self.connection.close(quinn::VarInt::from_u32(0), b"session over");
        (reason, None)
    }
}
