//! What one batch makes of the standing, and whether two sides are of one
//! history. Pure.

use replicator_common::id::BatchId;
use replicator_common::wire::{BatchHeader, SourceHello};

use crate::store::Standing;

/// The standing after a batch. Watermarks never move back, whatever the source
/// says.
///
/// INVARIANT: batches commit without holes. One that was given back may have
/// others behind it in the queue; `None` says that the batch is such a one. (Else
/// the next greeting would take the one that was given back for committed.)
pub fn advance(standing: &Standing, batch: BatchId, header: &BatchHeader) -> Option<Standing> {
    if batch != standing.committed.next() {
        return None;
    }
    let mut next = standing.clone();
    (next.committed, next.nonce) = (batch, header.nonce);
    next.watermark = standing.watermark.max(header.watermark);
    next.last_consistent = standing.last_consistent.max(header.exact);
    next.complete |= header.complete;
    // Not before: a source that restarts in between has to ask again.
    next.reconcile &= !header.complete;
    next.batches.0 += 1;
    next.batches.1 += u64::from(header.exact.is_some());
    next.bytes.0 = next.bytes.0.saturating_add(header.bytes_changed);
    next.bytes.1 = next.bytes.1.saturating_add(header.bytes_shipped);
    Some(next)
}

/// Why source and destination are not of one history (trap 14), if so.
pub fn mismatch(standing: &Standing, hello: &SourceHello) -> Option<&'static str> {
    let fresh = standing.committed == BatchId(0)
        && standing.source_incarnation.is_none_or(|known| known == hello.incarnation);
    if fresh && hello.acknowledged.batch == BatchId(0) {
        return None;
    }
    if standing.source_incarnation != Some(hello.incarnation) {
        return Some("the source's state is not the one that was replicated from");
    }
    if hello.destination_incarnation.is_some_and(|known| known != standing.incarnation) {
        return Some("the source knows another life of this destination");
    }
    // Several batches may be under way, and any number of them may have come.
    let known = std::iter::once(&hello.acknowledged).chain(&hello.pending);
    match known.into_iter().find(|known| known.batch == standing.committed) {
        None => Some("source and destination disagree on the last batch"),
        // Lost and built anew after the source's state was saved.
        Some(known) if !known.is(&standing.edition()) => {
            Some("the source means another batch by the number of the last one")
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::id::{BatchNonce, Edition, Incarnation};
    use replicator_common::time::Timestamp;

    fn edition(batch: u64, nonce: u64) -> Edition {
        Edition { batch: BatchId(batch), nonce: BatchNonce(nonce) }
    }

    fn hello(acknowledged: u64, pending: Option<u64>) -> SourceHello {
        SourceHello {
            source: replicator_common::id::FileSystemId::random(),
            incarnation: Incarnation([1; 16]),
            destination_incarnation: Some(Incarnation([2; 16])),
            acknowledged: edition(acknowledged, acknowledged),
            pending: pending.into_iter().map(|batch| edition(batch, batch)).collect(),
            previous: None,
            time: Timestamp(0),
        }
    }

    #[test]
    fn trap_14_a_side_that_went_back_is_noticed() {
        let mut standing = Standing::new(Incarnation([2; 16]), false);
        assert_eq!(mismatch(&standing, &hello(0, None)), None);
        assert!(mismatch(&standing, &hello(3, None)).is_some(), "destination wiped");
        standing.source_incarnation = Some(Incarnation([1; 16]));
        (standing.committed, standing.nonce) = (BatchId(3), BatchNonce(3));
        assert_eq!(mismatch(&standing, &hello(3, None)), None);
        assert_eq!(mismatch(&standing, &hello(2, Some(3))), None);
        assert_eq!(mismatch(&standing, &hello(3, Some(4))), None);
        assert!(mismatch(&standing, &hello(2, None)).is_some(), "source rolled back");
        assert!(mismatch(&standing, &hello(5, None)).is_some(), "destination rolled back");
        let other = SourceHello { incarnation: Incarnation([9; 16]), ..hello(3, None) };
        assert!(mismatch(&standing, &other).is_some(), "another source");
        let rebuilt = SourceHello { pending: vec![edition(3, 4)], ..hello(2, None) };
        assert!(mismatch(&standing, &rebuilt).is_some(), "another batch of that number");
        let rebuilt = SourceHello { acknowledged: edition(3, 4), ..hello(3, None) };
        assert!(mismatch(&standing, &rebuilt).is_some(), "another batch of that number");
        let old = SourceHello { acknowledged: edition(3, 0), ..hello(3, None) };
        assert_eq!(mismatch(&standing, &old), None, "of a program without nonces");
    }

    #[test]
    fn watermarks_never_move_back() {
        let mut standing = Standing::new(Incarnation([2; 16]), false);
        standing.watermark = Timestamp(100);
        standing.last_consistent = Some(Timestamp(90));
        let header = BatchHeader {
            nonce: BatchNonce(7),
            seq: replicator_common::id::Seq(1),
            watermark: Timestamp(50),
            exact: None,
            packed: 0,
            ops: 0,
            complete: false,
            bytes_changed: 0,
            bytes_shipped: 0,
        };
        let next = advance(&standing, BatchId(1), &header).unwrap();
        assert_eq!((next.watermark, next.last_consistent), (Timestamp(100), Some(Timestamp(90))));
        assert_eq!(advance(&standing, BatchId(2), &header), None, "a hole");
    }
}
