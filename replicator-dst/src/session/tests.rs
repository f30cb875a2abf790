use super::*;
use crate::apply::Within;
use replicator_common::id::Seq;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind};
use replicator_common::time::Timestamp;

fn header(ops: u64, packed: u64) -> BatchHeader {
    BatchHeader {
        nonce: replicator_common::id::BatchNonce(1),
        seq: Seq(1),
        watermark: Timestamp(0),
        exact: None,
        packed,
        ops,
        complete: false,
        bytes_changed: 0,
        bytes_shipped: 0,
    }
}

fn state() -> ObjectState {
    let attributes =
        Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: vec![] };
    ObjectState { kind: Kind::File, attributes, size: 1, rdev: 0 }
}

fn id(n: u8) -> ObjectId {
    ObjectId::new(1, &[n]).unwrap()
}

fn file(name: &[u8]) -> StagedFile {
    let place = Place { within: Within::Staging(0), name: Name::new(name).unwrap() };
    StagedFile { place, handle: id(9), state: state(), bytes: 1 }
}

fn put(n: u8, content: ContentSource) -> Op {
    Op::Put { object: id(n), state: state(), content, new: true, links: 1 }
}

#[test]
fn a_batch_waits_for_all_that_its_plan_names() {
    let mut session = Session::new(BatchId(4));
    let (batch, transfer) = (BatchId(5), TransferId(7));
    session.packed(batch, id(1), 1, file(b"old")).unwrap();
    let ops = vec![
        put(1, ContentSource::Packed { version: 2 }),
        put(2, ContentSource::Transferred { transfer }),
    ];
    session.plan(batch, ops).unwrap();
    session.commit(batch, header(2, 2)).unwrap();
    assert!(session.next_whole().unwrap().is_none());
    session.packed(batch, id(1), 2, file(b"new")).unwrap();
    assert!(session.next_whole().unwrap().is_none());
    session.transferred(transfer, id(2), StagedTransfer::Whole(file(b"big"))).unwrap();
    let whole = session.next_whole().unwrap().unwrap();
    assert_eq!((whole.content.len(), whole.superseded.len()), (2, 1));
    assert!(session.next_whole().unwrap().is_none());
    // Too late: to be deleted.
    assert!(session.packed(batch, id(1), 3, file(b"late")).unwrap().is_some());
}

#[test]
fn breaches_are_found() {
    let mut session = Session::new(BatchId(0));
    assert!(matches!(session.plan(BatchId(2), vec![]), Err(Breach::Order { .. })));
    assert!(matches!(session.commit(BatchId(1), header(1, 0)), Err(Breach::Count { .. })));
    assert!(matches!(
        session.packed(BatchId(100), id(1), 1, file(b"x")),
        Err(Breach::Ahead { .. })
    ));
    session.plan(BatchId(1), vec![put(1, ContentSource::Packed { version: 1 })]).unwrap();
    assert!(matches!(session.commit(BatchId(1), header(1, 0)), Err(Breach::Packed { .. })));
    let too_many = vec![Op::Drop { object: id(1) }; PLAN_OPS_MAX + 1];
    assert!(matches!(session.plan(BatchId(1), too_many), Err(Breach::Frame { .. })));
}

/// Else the batch would be acknowledged without the content.
#[test]
fn content_that_was_given_up_is_missed() {
    let mut session = Session::new(BatchId(0));
    let transfer = TransferId(7);
    let big = || StagedTransfer::Whole(file(b"big"));
    session.transferred(transfer, id(2), big()).unwrap();
    let put = |content| vec![put(2, content)];
    for batch in [BatchId(1), BatchId(2)] {
        session.plan(batch, put(ContentSource::Transferred { transfer })).unwrap();
        session.commit(batch, header(1, 0)).unwrap();
    }
    assert_eq!(session.next_whole().unwrap().unwrap().content.len(), 1);
    // Named by two batches.
    assert!(matches!(session.next_whole(), Err(Breach::Gone { .. })));

    let mut session = Session::new(BatchId(0));
    session.transferred(transfer, id(2), big()).unwrap();
    session.plan(BatchId(1), put(ContentSource::Transferred { transfer })).unwrap();
    session.commit(BatchId(1), header(1, 0)).unwrap();
    assert_eq!(session.aborted(transfer).len(), 1);
    assert!(matches!(session.next_whole(), Err(Breach::Gone { .. })));
}

/// Else one of the two would stay in staging.
#[test]
fn an_object_has_one_content_in_a_batch() {
    let mut session = Session::new(BatchId(0));
    for version in [1, 2] {
        session.packed(BatchId(1), id(1), version, file(b"x")).unwrap();
        session.plan(BatchId(1), vec![put(1, ContentSource::Packed { version })]).unwrap();
    }
    session.commit(BatchId(1), header(2, 2)).unwrap();
    assert!(matches!(session.next_whole(), Err(Breach::NamedTwice { .. })));
}

/// Of a batch that was given back, what still comes is passed over.
#[test]
fn plans_are_awaited_in_order_and_not_of_what_was_given_back() {
    let mut session = Session::new(BatchId(0));
    assert!(session.awaits(BatchId(1)) && !session.awaits(BatchId(2)));
    session.commit(BatchId(1), header(0, 0)).unwrap();
    assert!(session.next_whole().unwrap().is_some());
    session.give_back(BatchId(1), Vec::new());
    assert!(!session.awaits(BatchId(1)) && !session.awaits(BatchId(2)));
    session.abandon(BatchId(1)).unwrap();
    assert!(session.awaits(BatchId(1)));
}

fn place(transfer: u64, batch: u64, session: &mut Session) {
    let content = ContentSource::Transferred { transfer: TransferId(transfer) };
    session.plan(BatchId(batch), vec![put(2, content)]).unwrap();
    session.commit(BatchId(batch), header(1, 0)).unwrap();
}

/// What is named before it is known to have arrived, and then cannot be staged, would
/// keep its batch waiting for ever.
#[test]
fn a_batch_is_given_back_when_what_it_names_fails() {
    for fails_first in [true, false] {
        let mut session = Session::new(BatchId(0));
        let fail = |session: &mut Session| {
            session.transfer_failed(TransferId(7), "no room".to_owned());
        };
        if fails_first {
            fail(&mut session);
        }
        place(7, 1, &mut session);
        if !fails_first {
            assert!(session.next_returned(BatchId(0)).is_none(), "it may still come");
            fail(&mut session);
        }
        // However many others fail until it is its turn.
        for other in 1000..2000 {
            session.transfer_failed(TransferId(other), "no room".to_owned());
        }
        assert!(session.next_whole().unwrap().is_none());
        let returned = session.next_returned(BatchId(0)).unwrap();
        assert_eq!(returned.objects, [(id(2), "no room".to_owned())]);
    }
}

/// Else what arrives after its batch was given back would stay in staging.
#[test]
fn what_arrives_of_a_batch_that_was_given_back_is_deleted() {
    let mut session = Session::new(BatchId(0));
    let staged = |name: &[u8]| StagedTransfer::Whole(file(name));
    place(7, 1, &mut session);
    assert!(session.give_back(BatchId(1), Vec::new()).places.is_empty());
    // Its successor was sent before the source heard of it; one is there, one is not.
    assert_eq!(session.transferred(TransferId(8), id(2), staged(b"8")), Ok(Arrival::Early));
    let named = [8, 9].map(|n| put(2, ContentSource::Transferred { transfer: TransferId(n) }));
    let places = session.plan(BatchId(2), named.to_vec()).unwrap();
    assert_eq!(places, staged(b"8").places());
    for transfer in [7, 9] {
        let late = session.transferred(TransferId(transfer), id(2), staged(b"late"));
        assert_eq!(late, Ok(Arrival::Unwanted(staged(b"late").places())));
    }
    assert_eq!(session.staged(), 0);
    session.abandon(BatchId(1)).unwrap();
    place(10, 1, &mut session);
    assert_eq!(session.transferred(TransferId(10), id(2), staged(b"10")), Ok(Arrival::Awaited));
    assert!(session.next_whole().unwrap().is_some());
}

/// Of what is counted as held, nothing is left when all of it is gone.
#[test]
fn plans_are_bounded_by_their_bytes_too() {
    let link = |n| Op::Put {
        object: id(n),
        state: state(),
        content: ContentSource::Symlink { target: vec![b'x'; 1 << 20] },
        new: true,
        links: 1,
    };
    let mut session = Session::new(BatchId(0));
    let room = HELD_BYTES_MAX >> 20;
    for _ in 1..room {
        session.plan(BatchId(1), vec![link(1)]).unwrap();
    }
    assert!(matches!(session.plan(BatchId(1), vec![link(1)]), Err(Breach::TooLong)));

    let mut session = Session::new(BatchId(0));
    let heavy = |name: &[u8]| {
        let xattr = replicator_common::object::Xattr { name: vec![1], value: vec![0; 9999] };
        let mut file = file(name);
        file.state.attributes.xattrs.push(xattr);
        file
    };
    for batch in [BatchId(1), BatchId(2)] {
        session.packed(batch, id(1), 1, heavy(b"a")).unwrap();
        session.packed(batch, id(1), 1, heavy(b"again")).unwrap();
        let named = ContentSource::Transferred { transfer: TransferId(7) };
        session.plan(batch, vec![put(1, ContentSource::Packed { version: 1 })]).unwrap();
        session.plan(batch, vec![put(2, named)]).unwrap();
        let whole = || StagedTransfer::Whole(heavy(b"big"));
        session.transferred(TransferId(7), id(2), whole()).unwrap();
        let twice = session.transferred(TransferId(7), id(2), whole());
        assert!(matches!(twice, Err(Breach::EndedTwice { .. })));
        assert!(session.held > 20_000);
        if batch == BatchId(1) {
            session.commit(batch, header(2, 1)).unwrap();
            assert!(session.next_whole().unwrap().is_some());
        } else {
            session.abandon(batch).unwrap();
            session.aborted(TransferId(7));
        }
        assert_eq!(session.held, 0, "{batch}");
    }
}

#[test]
fn an_abandoned_batch_begins_anew() {
    let mut session = Session::new(BatchId(0));
    session.packed(BatchId(1), id(1), 1, file(b"a")).unwrap();
    session.plan(BatchId(1), vec![Op::Drop { object: id(1) }]).unwrap();
    assert_eq!(session.abandon(BatchId(1)).unwrap().len(), 1);
    session.commit(BatchId(1), header(0, 0)).unwrap();
    assert!(session.next_whole().unwrap().unwrap().ops.is_empty());
}
