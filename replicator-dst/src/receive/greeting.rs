//! How a session comes about: who calls, whether there may be a session, and the
//! answer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use replicator_common::net::frame::{FrameReader, FrameWriter};
use replicator_common::status::DesiredState;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    DestinationHello, DestinationMessage, Refusal, SourceHello, SourceMessage,
};
use tokio::sync::oneshot;

use super::{SessionContext, SessionError};
use crate::applier::Job;
use crate::store::Standing;

/// How long a source may take to say who it is, and a session before to end.
const HELLO: Duration = Duration::from_secs(10);
/// How long the applier may take to settle a session before the source is told
/// to come back.
const BEGIN: Duration = Duration::from_secs(60);
/// How long a source may take to hear that it is refused.
const REFUSED: Duration = Duration::from_millis(500);

/// A connection whose source has said who it is.
pub struct Greeting {
    /// What it said.
    pub hello: SourceHello,
    /// When that arrived.
    pub(super) received: Timestamp,
    pub(super) connection: Connection,
    pub(super) reader: FrameReader<RecvStream>,
    pub(super) writer: FrameWriter<SendStream>,
}

/// Waits for the source's first words.
pub async fn hear(connection: Connection) -> Result<Greeting, SessionError> {
    let (send, receive) = tokio::time::timeout(HELLO, connection.accept_bi())
        .await
        .map_err(|_| SessionError::Silent)??;
    let mut reader = FrameReader::new(receive);
    let mut writer = FrameWriter::new(send);
    let first =
        tokio::time::timeout(HELLO, reader.read()).await.map_err(|_| SessionError::Silent)?;
    let received = Timestamp::now();
    let first = match first.map_err(SessionError::unread) {
        Ok(first) => first,
        Err(SessionError::Refused(refusal)) => return Err(refuse(&mut writer, refusal).await),
        Err(error) => return Err(error),
    };
    match first {
        Some(SourceMessage::Hello(hello)) => {
            Ok(Greeting { hello, received, connection, reader, writer })
        }
        Some(_) => {
            let refusal = Refusal::Protocol("the first message is not a hello".to_owned());
            Err(refuse(&mut writer, refusal).await)
        }
        None => Err(SessionError::Closed),
    }
}

impl Greeting {
    /// Says why there will be no session.
    pub async fn refuse(mut self, refusal: Refusal) -> SessionError {
        refuse(&mut self.writer, refusal).await
    }
}

/// Says why there is no session.
pub(super) async fn refuse(writer: &mut FrameWriter<SendStream>, refusal: Refusal) -> SessionError {
    if let Err(error) = writer.write(&DestinationMessage::Refused(refusal.clone())).await {
        return error.into();
    }
    let _ = writer.get_mut().finish();
    let _ = tokio::time::timeout(REFUSED, writer.get_mut().stopped()).await;
    SessionError::Refused(refusal)
}

/// Asks the applier for where the replica stands; a refusal where there may be no session.
pub(super) async fn begin(
    context: &SessionContext,
    hello: &SourceHello,
) -> Result<Result<Standing, Refusal>, SessionError> {
    let replica = &context.replica;
    if replica.shared().desired == DesiredState::Paused {
        return Ok(Err(Refusal::Unable("paused at the destination".to_owned())));
    }
    // Of the session before: they end with its connection.
    let until = tokio::time::Instant::now() + HELLO;
    while replica.stagers.load(Ordering::Acquire) > 0 {
        if tokio::time::Instant::now() > until {
            let reason = "the session before this one is still being staged".to_owned();
            return Ok(Err(Refusal::Unable(reason)));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (reply, answer) = oneshot::channel();
    // The queue may be full of what a session before this one left.
    let (jobs, job) = (context.jobs.clone(), Job::Begin { hello: Box::new(hello.clone()), reply });
    match tokio::task::spawn_blocking(move || jobs.send(job)).await {
        Ok(Ok(())) => {}
        _ => return Err(SessionError::NoApplier),
    }
    match tokio::time::timeout(BEGIN, answer).await {
        Ok(Ok(Ok(standing))) => Ok(Ok(standing)),
        Ok(Ok(Err(reason))) => Ok(Err(Refusal::Unable(reason))),
        Ok(Err(_)) => Err(SessionError::NoApplier),
        Err(_) => {
            let reason = replica.shared().stalled.clone();
            let reason =
                reason.unwrap_or_else(|| "the last batch is still being applied".to_owned());
            Ok(Err(Refusal::Unable(reason)))
        }
    }
}

/// Says where the replica stands.
pub(super) async fn greet(
    writer: &mut FrameWriter<SendStream>,
    context: &SessionContext,
    connection: &Connection,
    (echo, received): (Timestamp, Timestamp),
    standing: &Standing,
) -> Result<(), SessionError> {
    let replica = &context.replica;
    {
        let mut shared = replica.shared();
        shared.link.connected = true;
        shared.link.since = Timestamp::now();
        shared.link.peer = connection.remote_address().to_string();
        shared.link.last_error = None;
    }
    let message = DestinationMessage::Hello(DestinationHello {
        destination: replica.config.destination.clone(),
        session: context.session,
        incarnation: standing.incarnation,
        committed: standing.edition(),
        watermark: standing.watermark,
        reconcile: standing.reconcile,
        time: Timestamp::now(),
        echo,
        received,
        abilities: replica.abilities.clone(),
    });
    writer.write(&message).await?;
    Ok(())
}
