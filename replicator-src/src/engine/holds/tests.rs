//! Whose turn it is.

use super::*;

fn held(due: Instant, reason: HoldReason, transfer: Transfer) -> Held {
    let hold = Hold { reason, entries: BTreeSet::new() };
    let (floor, since) = (Timestamp::NEVER, Timestamp::NEVER);
    Held {
        hold,
        floor,
        since,
        due,
        transfer,
        touched: false,
        whole: false,
        reuses: false,
        tail: None,
        known: true,
    }
}

/// More files than can be sent, all of which change all the time: each has its
/// turn before any has its third.
#[test]
fn the_file_that_has_been_due_for_longest_comes_first() {
    const FILES: u8 = 20;
    let start = Instant::now();
    let id = |number: u8| ObjectId::new(1, &[number]).unwrap();
    let large = || HoldReason::Large { size: 1 };
    let mut holds: BTreeMap<ObjectId, Held> =
        (0..FILES).map(|n| (id(n), held(start, large(), Transfer::Waiting))).collect();
    let unreadable = HoldReason::Unreadable { error: String::new() };
    holds.insert(id(FILES), held(start, unreadable, Transfer::Waiting));
    let running = Transfer::Running { number: TransferId(1), basis: None };
    holds.insert(id(FILES + 1), held(start, large(), running));
    let later = start + Duration::from_secs(3600);
    holds.insert(id(FILES + 2), held(later, large(), Transfer::Waiting));

    let may = |held: &Held| {
        matches!(held.hold.reason, HoldReason::Large { .. })
            && matches!(held.transfer, Transfer::Waiting)
    };
    let mut turns = [0; FILES as usize];
    for second in 1..=2 * u64::from(FILES) {
        let now = start + Duration::from_secs(second);
        let object = next_due(&holds, now, |_, held| may(held)).unwrap();
        let number = (0..FILES).find(|n| id(*n) == object).expect("none that must wait");
        turns[usize::from(number)] += 1;
        // It changed while it was read, and is due again at once.
        holds.get_mut(&object).unwrap().due = now;
    }
    assert_eq!(turns, [2; FILES as usize]);
}
