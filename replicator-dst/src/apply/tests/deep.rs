//! Planning a branch of many levels costs by the level, not by the level times
//! the levels above it.

use std::time::{Duration, Instant};

use super::*;

/// Plans a new branch of `levels` directories, and then its end.
fn plan_branch(levels: u32) -> Duration {
    let mut replica = Replica::new();
    let directory = |n: u32| ObjectId::new(1, &n.to_be_bytes()).unwrap();
    let text = Name::new(b"n").unwrap();
    let put = |n, new| Op::Put {
        object: directory(n),
        state: state(Kind::Directory, 0o755, 0),
        content: ContentSource::Unchanged,
        new,
        links: 1,
    };
    let mut ops = vec![Op::Root { object: directory(0) }, put(0, false)];
    for n in 1..=levels {
        ops.push(put(n, true));
        let (old, new) = (None, Some(directory(n)));
        ops.push(Op::Entry { directory: directory(n - 1), name: text.clone(), old, new });
    }
    let source = Source::default();
    let start = Instant::now();
    let made = replica.plan(ops, &source);
    replica.commit(&made);
    assert_eq!(replica.map.len(), levels as usize + 1);
    let mut ops = vec![put(0, false)];
    for n in 1..=levels {
        ops.push(Op::Drop { object: directory(n) });
        let (old, new) = (Some(directory(n)), None);
        ops.push(Op::Entry { directory: directory(n - 1), name: text.clone(), old, new });
    }
    let gone = replica.plan(ops, &source);
    let took = start.elapsed();
    let removed = |step: &Step| match step {
        Step::RemoveDirectory { object, .. } => Some(object.clone()),
        _ => None,
    };
    let order: Vec<_> = gone.steps.iter().filter_map(removed).collect();
    let deepest_first: Vec<_> =
        (1..=levels).rev().map(|n| replica.map[&directory(n)].handle.clone().unwrap()).collect();
    assert_eq!(order, deepest_first);
    took
}

#[test]
fn a_branch_of_many_levels_is_planned_level_by_level() {
    // The quickest of several: other work on the machine only slows down.
    let quickest = |levels| (0..3).map(|_| plan_branch(levels)).min().unwrap();
    let (few, many) = (quickest(500), quickest(4000));
    let ratio = many.as_secs_f64() / few.as_secs_f64();
    // Eight times the levels; by the square it would be 64 times the time.
    assert!(ratio < 24.0, "500 levels take {few:?}, 4000 take {many:?}");
}
