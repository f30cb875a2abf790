//! The connection to the destination: opened, kept up and opened again, with
//! backoff, by one asynchronous task. It moves frames and knows nothing of
//! what they mean beyond the two hellos.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use replicator_common::net::clock::Exchange;
use replicator_common::net::frame::{Compression, FrameReader, FrameWriter, encode_frame};
use replicator_common::net::identity::{Fingerprint, Identity};
use replicator_common::net::{NetError, quic};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ALPN, DATA_STREAMS, DestinationHello, DestinationMessage, Refusal, SourceHello, SourceMessage,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::read::sink::{Sink, SinkError, Wired};

/// First and longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
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
    },
    /// A message of session `number` and its answer, by both clocks.
    Clocks {
        /// The session.
        number: u64,
        /// The moments.
        exchange: Exchange,
    },
    /// Session `number` ended, or could not be opened (then it never began).
    Lost {
        /// The session.
        number: u64,
        /// Why, in words.
        reason: String,
        /// The destination's own word, when it gave one.
        refusal: Option<Refusal>,
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
    control: mpsc::Sender<Vec<u8>>,
    wired: Arc<Wired>,
}

impl Session {
    /// Queues a control message; blocks while the network is slower than we are.
    pub fn send(&self, message: &SourceMessage) -> Result<(), SinkError> {
        let frame = encode_frame(message, Compression::Auto)?;
        self.wired.frame(frame.len());
        self.control.blocking_send(frame).map_err(|_| SinkError::Closed)
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

/// Runs the link until `hello` or the engine's inbox is gone: opens sessions
/// one after the other. `hello` makes the greeting of a new session.
pub async fn run(
    identity: Identity,
    remote: Remote,
    hello: impl Fn() -> Option<SourceHello> + Send + 'static,
    wired: Arc<Wired>,
    compression: Compression,
    events: Sender<LinkEvent>,
) {
    let mut pause = BACKOFF.0;
    for number in 1.. {
        let Some(greeting) = hello() else { return };
        let attempt = Attempt { identity: &identity, remote: &remote, number, compression };
        let (reason, refusal) = match attempt.open(greeting, &wired).await {
            Ok((session, task)) => {
                pause = BACKOFF.0;
                if events.send(LinkEvent::Connected(session)).is_err() {
                    return;
                }
                task.pump(&events).await
            }
            Err(failure) => failure,
        };
        if events.send(LinkEvent::Lost { number, reason, refusal }).is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

type Failure = (String, Option<Refusal>);

struct Attempt<'a> {
    identity: &'a Identity,
    remote: &'a Remote,
    number: u64,
    compression: Compression,
}

impl Attempt<'_> {
    async fn open(
        &self,
        greeting: SourceHello,
        wired: &Arc<Wired>,
    ) -> Result<(Session, Pump), Failure> {
        let plain = |error: &dyn std::fmt::Display| (error.to_string(), None);
        let connection =
            quic::dial(self.identity, &self.remote.address, self.remote.fingerprint, ALPN)
                .await
                .map_err(|error| match error {
                    // It was pinned when the configuration was made: the
                    // destination has none any more.
                    NetError::Refused { .. } => {
                        let source_id = greeting.source.clone();
                        (error.to_string(), Some(Refusal::NoConfiguration { source_id }))
                    }
                    other => plain(&other),
                })?;
        let (send, receive) = connection.open_bi().await.map_err(|error| plain(&error))?;
        prefer(&send, 2);
        let mut writer = FrameWriter::new(send);
        let mut reader = FrameReader::new(receive);
        let greeting = SourceHello { time: Timestamp::now(), ..greeting };
        writer.write(&SourceMessage::Hello(greeting)).await.map_err(|error| plain(&error))?;
        let answer = tokio::time::timeout(HELLO_TIMEOUT, reader.read::<DestinationMessage>())
            .await
            .map_err(|_| ("the destination does not answer".to_owned(), None))?;
        let heard = Timestamp::now();
        let hello = match answer.map_err(|error| plain(&error))? {
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
        writers.spawn(write_frames(writer, frames));
        let mut queues = Vec::new();
        for number in 0..DATA_STREAMS {
            let stream = connection.open_uni().await.map_err(|error| plain(&error))?;
            // The first half carries packs (see `Sink`): small objects never
            // queue behind large ones.
            prefer(&stream, if number < DATA_STREAMS / 2 { 1 } else { 0 });
            let (queue, frames) = mpsc::channel(DATA_QUEUE);
            writers.spawn(write_frames(FrameWriter::new(stream), frames));
            queues.push(queue);
        }
        let session = Session {
            number: self.number,
            hello,
            sink: Sink::new(queues, wired.clone(), self.compression),
            clocks,
            connection: connection.clone(),
            control,
            wired: wired.clone(),
        };
        Ok((session, Pump { number: self.number, connection, reader, writers }))
    }
}

/// What is written to a stream of higher priority is sent first. An error says
/// that the stream is gone, which its next use tells too.
fn prefer(stream: &quinn::SendStream, priority: i32) {
    let _ = stream.set_priority(priority);
}

async fn write_frames(
    mut writer: FrameWriter<quinn::SendStream>,
    mut frames: mpsc::Receiver<Vec<u8>>,
) -> Result<(), String> {
    while let Some(frame) = frames.recv().await {
        writer.write_encoded(&frame).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Moves what comes from the destination to the engine until the session ends.
struct Pump {
    number: u64,
    connection: quinn::Connection,
    reader: FrameReader<quinn::RecvStream>,
    writers: JoinSet<Result<(), String>>,
}

impl Pump {
    async fn pump(mut self, events: &Sender<LinkEvent>) -> Failure {
        loop {
            let message = tokio::select! {
                message = self.reader.read::<DestinationMessage>() => message,
                Some(ended) = self.writers.join_next() => match ended {
                    Ok(Err(reason)) => return self.close(reason),
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
                    let event = self.event(message);
                    if events.send(event).is_err() {
                        return self.close("the source stops".to_owned());
                    }
                }
                Ok(None) => return self.close("the destination closed the session".to_owned()),
                Err(error) => return self.close(error.to_string()),
            }
        }
    }

    fn event(&self, message: DestinationMessage) -> LinkEvent {
        let number = self.number;
        match message {
            // Read here, before the message waits for the engine.
            DestinationMessage::Clock { sent, received, answered } => {
                let heard = Timestamp::now();
                LinkEvent::Clocks { number, exchange: Exchange { sent, received, answered, heard } }
            }
            message => LinkEvent::Message { number, message: Box::new(message) },
        }
    }

    fn close(&self, reason: String) -> Failure {
        self.connection.close(quinn::VarInt::from_u32(0), b"session over");
        (reason, None)
    }
}
