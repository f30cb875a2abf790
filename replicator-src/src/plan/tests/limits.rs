//! A replica whose file system takes fewer names, or shorter ones.

use super::traps::{ENOUGH, link, make, rename, replicated, unlink};
use super::*;

fn names_of(run: &Run, object: u32) -> usize {
    run.replica.entries.values().filter(|o| **o == id(object)).count()
}

fn held(run: &Run) -> Vec<(u32, String, Vec<String>)> {
    let one = |(object, hold): &(ObjectId, Hold)| {
        let HoldReason::Refused { error } = &hold.reason else { panic!("{hold:?}") };
        let names = hold.entries.iter().map(|(_, name)| name.to_string()).collect();
        (inode(object), error.clone(), names)
    };
    run.held.iter().map(one).collect()
}

fn links(most: u32) -> Limits {
    Limits { links: Some(most), name: None }
}

#[test]
fn a_file_with_too_many_names_has_as_many_as_fit() {
    let mut world = World::new();
    let f = make(&mut world, ROOT, "a", Kind::File);
    let mut run = replicated(world);
    run.limits = links(3);
    for name in ["b", "c", "d", "e"] {
        link(&mut run.world, f, (ROOT, name));
    }
    let other = make(&mut run.world, ROOT, "other", Kind::File);
    run.step(ENOUGH, 0, true);
    assert_eq!(names_of(&run, f), 3);
    let [(object, error, names)] = &held(&run)[..] else { panic!("{:?}", run.held) };
    assert_eq!((*object, names.len()), (f, 2));
    assert!(error.contains("3 names of one file"), "{error}");
    assert_eq!(run.entry(ROOT, "other"), Some(other), "the others go on");
    // A name that goes makes room for another; so does a rename, which needs none.
    unlink(&mut run.world, ROOT, "a");
    rename(&mut run.world, (ROOT, "b"), (ROOT, "z"));
    run.step(ENOUGH, 0, true);
    assert_eq!((names_of(&run, f), run.entry(ROOT, "a"), run.entry(ROOT, "b")), (3, None, None));
    unlink(&mut run.world, ROOT, "e");
    run.finish();
}

/// A new file over another that is to stay while its name is held.
#[test]
fn what_a_held_name_would_replace_stays() {
    let mut world = World::new();
    let (f, victim) =
        (make(&mut world, ROOT, "f", Kind::File), make(&mut world, ROOT, "victim", Kind::File));
    let mut run = replicated(world);
    run.limits = links(1);
    unlink(&mut run.world, ROOT, "victim");
    link(&mut run.world, f, (ROOT, "victim"));
    run.step(ENOUGH, 0, true);
    assert_eq!(run.entry(ROOT, "victim"), Some(victim));
    assert_eq!(names_of(&run, f), 1);
    unlink(&mut run.world, ROOT, "f");
    run.finish();
}

#[test]
fn a_name_that_is_too_long_waits_with_all_below_it() {
    let mut run = replicated(World::new());
    run.limits = Limits { links: None, name: Some(5) };
    let d = make(&mut run.world, ROOT, "too long", Kind::Directory);
    make(&mut run.world, d, "below", Kind::File);
    let f = make(&mut run.world, ROOT, "short", Kind::File);
    link(&mut run.world, f, (ROOT, "a longer one"));
    let moved = make(&mut run.world, ROOT, "moved", Kind::File);
    run.step(ENOUGH, 0, true);
    assert_eq!((run.entry(ROOT, "short"), run.entry(ROOT, "moved")), (Some(f), Some(moved)));
    assert_eq!(held(&run).iter().map(|(object, ..)| *object).collect::<Vec<_>>(), [d, f]);
    assert!(!run.replica.objects.contains_key(&id(d)));
    rename(&mut run.world, (ROOT, "moved"), (ROOT, "moved on"));
    run.step(ENOUGH, 0, true);
    assert!(run.replica.orphans.contains(&id(moved)), "it lives, and has no name that fits");
    for (long, short) in [("too long", "d"), ("a longer one", "g"), ("moved on", "on")] {
        assert!(run.entry(ROOT, long).is_none());
        rename(&mut run.world, (ROOT, long), (ROOT, short));
    }
    run.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// However names come and go, no file of the replica ever has more than fit;
    /// and when all fit, it becomes the source.
    #[test]
    fn no_file_has_more_names_than_fit(
        before in prop::collection::vec(any::<Action>(), 0..30),
        steps in prop::collection::vec(step(), 0..8),
        most in 1..4u32,
    ) {
        let mut world = World::new();
        before.iter().for_each(|action| world.act(*action));
        let mut run = Run { limits: links(most), ..Run::new(world) };
        run.world.records.clear();
        run.dirty.listings.push_back(Listing::new(id(ROOT), true));
        for step in &steps {
            step.actions.iter().for_each(|action| run.world.act(*action));
            run.absorb(step.absorb);
            run.batch(&step.between, step.budget, step.large, false, step.follow);
            for object in run.replica.objects.keys() {
                let names = names_of(&run, inode(object));
                prop_assert!(names <= most as usize, "{object} has {names} names");
            }
        }
        run.limits = Limits::default();
        run.finish();
    }
}
