//! What a session says, and when.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Batch, ROOT, World, data, id, pieces, state};
use quinn::ConnectionError;
use replicator_common::id::{BatchId, TransferId};
use replicator_common::object::Kind;
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, Layout, Op, Piece, SourceMessage, TransferBegin,
};
use replicator_dst::receive::{self, SessionError};

fn patch(number: u64, version: u64) -> TransferBegin {
    TransferBegin {
        transfer: TransferId(number),
        object: id(2),
        state: state(Kind::File, 0o600, 8),
        layout: Layout::Patch,
        basis: Some(id(2)),
        basis_version: BatchId(version),
    }
}

fn placed(number: u64) -> Batch {
    Batch::new().op(Op::Put {
        object: id(2),
        state: state(Kind::File, 0o600, 8),
        content: ContentSource::Transferred { transfer: TransferId(number) },
        new: false,
        links: 1,
    })
}

/// Who has to hear of an end is asked of the connection afterwards: a session that the other
/// side ended must not look as if it was ended here.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_the_other_side_ended_stays_so() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let source = world.connect(&service, 0).await;
    service.shutdown().await;
    source.connection.closed().await;
    receive::close(&source.connection, &SessionError::Closed);
    let reason = source.connection.close_reason();
    assert!(matches!(reason, Some(ConnectionError::ApplicationClosed(_))), "{reason:?}");
}

/// Four bytes behind the four that are there.
async fn append(source: &mut common::FakeSource, number: u64, version: u64) {
    let transfer = TransferId(number);
    source.data.write(&DataFrame::TransferBegin(patch(number, version))).await.unwrap();
    let parts = vec![common::plain(Piece::Copy { from: 0, length: 4 }), data(*b" two")];
    source.data.write(&pieces(transfer, parts)).await.unwrap();
    let end = DataFrame::TransferEnd { transfer, state: state(Kind::File, 0o600, 8) };
    source.data.write(&end).await.unwrap();
}

/// A batch may name what the destination has not said to have come. If that cannot be
/// staged, the batch is given back, and nothing waits for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_may_name_a_transfer_that_has_not_come() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let first = Batch::new().root().file(2, ROOT, "log", b"one,");
    source.apply(1, &first).await;
    let log = world.replica.join("log");
    let content = || std::fs::read_to_string(&log).unwrap();

    // On a basis that the replica does not have.
    source.send(2, &placed(7)).await;
    append(&mut source, 7, 99).await;
    let refused = source.next().await;
    assert!(
        matches!(refused, DestinationMessage::TransferRefused { transfer: TransferId(7), .. }),
        "{refused:?}"
    );
    let returned = source.next().await;
    let DestinationMessage::Returned { batch: BatchId(2), objects, last: true } = returned else {
        panic!("{returned:?}")
    };
    assert_eq!(objects.into_iter().map(|(object, _)| object).collect::<Vec<_>>(), [id(2)]);
    assert_eq!(content(), "one,");
    source.writer.write(&SourceMessage::Abandon { batch: BatchId(2) }).await.unwrap();

    // The same as it should be. Nobody need say that it has come: it is applied.
    source.send(2, &placed(8)).await;
    append(&mut source, 8, 1).await;
    loop {
        match source.next().await {
            DestinationMessage::Applied { batch: BatchId(2), .. } => break,
            DestinationMessage::Durable { .. } => {}
            // They are two streams: the content may be there before the plan.
            DestinationMessage::Transferred { transfer: TransferId(8) } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(content(), "one, two");
    service.shutdown().await;
}

/// Whoever waits for the end of the initial sync need not wait for the next report: it
/// follows the first watermark at once.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_watermark_is_reported_at_once() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.send(1, &Batch::new().root().file(2, ROOT, "file", b"x")).await;
    // What would be said next otherwise.
    source.send(2, &Batch::new()).await;
    loop {
        match source.heard().await.unwrap() {
            DestinationMessage::Applied { batch: BatchId(1), .. } => break,
            DestinationMessage::Applied { .. } => panic!("not in order"),
            _ => {}
        }
    }
    match source.heard().await.unwrap() {
        DestinationMessage::Report(report) => assert!(report.last_replicated.is_some()),
        other => panic!("{other:?}"),
    }
    service.shutdown().await;
}
