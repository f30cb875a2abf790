//! One test a trap of the design, each as small as the trap allows. What the
//! random test above them finds by chance is spelt out here.

use super::*;

/// A world that is in the replica already.
pub(super) fn replicated(world: World) -> Run {
    let mut run = Run::new(world);
    run.world.records.clear();
    run.dirty.listings.push_back(Listing::new(id(ROOT), true));
    run.finish();
    run
}

pub(super) fn called(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

pub(super) fn make(world: &mut World, directory: u32, text: &str, kind: Kind) -> u32 {
    let new = world.make(kind);
    world.inodes.get_mut(&directory).unwrap().entries.insert(called(text), new);
    world.entry_event(directory, &called(text));
    new
}

/// Renames; the records come in the order old name, new name, object.
pub(super) fn rename(world: &mut World, from: (u32, &str), to: (u32, &str)) {
    let moved = world.inodes.get_mut(&from.0).unwrap().entries.remove(&called(from.1)).unwrap();
    world.inodes.get_mut(&to.0).unwrap().entries.insert(called(to.1), moved);
    world.touch(moved);
    world.entry_event(from.0, &called(from.1));
    world.entry_event(to.0, &called(to.1));
    world.object_event(moved, false);
    world.collect();
}

pub(super) fn unlink(world: &mut World, directory: u32, text: &str) {
    let gone = world.inodes.get_mut(&directory).unwrap().entries.remove(&called(text)).unwrap();
    world.touch(gone);
    world.entry_event(directory, &called(text));
    world.object_event(gone, false);
    world.collect();
}

/// One more name; the record of the object comes first, as the kernel's does.
pub(super) fn link(world: &mut World, file: u32, (directory, text): (u32, &str)) {
    world.inodes.get_mut(&directory).unwrap().entries.insert(called(text), file);
    world.touch(file);
    world.object_event(file, false);
    world.entry_event(directory, &called(text));
}

/// Changes content; says nothing of it when events are lost.
fn write(world: &mut World, file: u32, seen: bool) {
    world.touch(file);
    world.inodes.get_mut(&file).unwrap().content = world.clock as u32;
    if seen {
        world.object_event(file, true);
    }
}

const OUTSIDE: u32 = 2;
pub(super) const ENOUGH: usize = 1000;

impl Run {
    pub(super) fn entry(&self, directory: u32, text: &str) -> Option<u32> {
        self.replica.entries.get(&(id(directory), called(text))).map(inode)
    }

    fn has(&self, object: u32) -> bool {
        self.replica.objects.contains_key(&id(object))
    }

    fn is_orphan(&self, object: u32) -> bool {
        self.replica.orphans.contains(&id(object))
    }

    /// Takes in `records` of what happened, and builds a batch.
    pub(super) fn step(&mut self, records: usize, large: u32, settled: bool) {
        self.absorb(records);
        self.batch(&[], ENOUGH, large, settled, false);
    }

    fn absorb_all(&mut self) {
        self.absorb(self.world.records.len() - self.cursor);
    }

    /// Events were lost: the records so far never come, and a walk follows.
    fn lose_records(&mut self) {
        self.cursor = self.world.records.len();
        self.dirty = Dirty::default();
        self.walking = true;
        self.dirty.listings.push_back(Listing::new(id(ROOT), true));
    }
}

/// f moves a → b, and the batch ends between the two records: it is neither
/// deleted nor sent again, but waits as an orphan for its attachment.
#[test]
fn trap_1_a_batch_that_is_torn_by_time_keeps_what_moves() {
    let mut world = World::new();
    let (a, b) = (
        make(&mut world, ROOT, "a", Kind::Directory),
        make(&mut world, ROOT, "b", Kind::Directory),
    );
    let f = make(&mut world, a, "f", Kind::File);
    let mut run = replicated(world);
    rename(&mut run.world, (a, "f"), (b, "f"));
    run.step(1, 0, true);
    assert_eq!((run.entry(a, "f"), run.entry(b, "f")), (None, None));
    assert!(run.has(f) && run.is_orphan(f), "it lives and is on its way");
    run.step(1, 0, true);
    assert_eq!(run.entry(b, "f"), Some(f));
    assert!(!run.is_orphan(f));
    run.finish();
}

/// The same with a new object: what a new entry leads to comes with the batch
/// or not at all, also when it is gone before it could be read.
#[test]
fn trap_1_an_entry_never_comes_without_its_object() {
    let mut run = replicated(World::new());
    let d = make(&mut run.world, ROOT, "d", Kind::Directory);
    let f = make(&mut run.world, d, "f", Kind::File);
    // Only the file's record: its directory is not known yet.
    run.cursor += 1;
    run.step(1, 0, true);
    assert!(!run.has(f) && !run.has(d));
    // And the directory's, whose file is too large to come at once.
    run.cursor -= 2;
    run.step(1, f, true);
    assert_eq!((run.has(d), run.has(f), run.entry(d, "f")), (true, false, None));
    run.step(1, 0, true);
    assert_eq!(run.entry(d, "f"), Some(f));
    run.finish();
}

/// The large `t` is renamed over `l` while its content is on its way: `l` stays
/// as it is until `t` is whole, and so does what it holds.
#[test]
fn trap_10_a_large_file_on_its_way_is_renamed_over_another() {
    let mut world = World::new();
    let d = make(&mut world, ROOT, "d", Kind::Directory);
    let l = make(&mut world, d, "l", Kind::File);
    let mut run = replicated(world);
    let t = make(&mut run.world, d, "t", Kind::File);
    run.absorb_all();
    run.step(0, t, true);
    assert_eq!((run.entry(d, "t"), run.entry(d, "l")), (None, Some(l)));
    rename(&mut run.world, (d, "t"), (d, "l"));
    run.absorb_all();
    for _ in 0..3 {
        run.step(0, t, true);
        assert_eq!(run.entry(d, "l"), Some(l), "the victim goes only when the new one is there");
        assert!(run.has(l) && !run.has(t));
    }
    run.step(0, 0, true);
    assert_eq!(run.entry(d, "l"), Some(t));
    assert!(!run.has(l));
    run.finish();
}

/// The same of one that the replica has from when it was small: its beginning does not
/// take the place of what is whole.
#[test]
fn trap_10_a_file_seen_small_and_grown_is_renamed_over_another() {
    let mut world = World::new();
    let d = make(&mut world, ROOT, "d", Kind::Directory);
    let l = make(&mut world, d, "l", Kind::File);
    let t = make(&mut world, d, "t", Kind::File);
    let mut run = replicated(world);
    write(&mut run.world, t, true);
    rename(&mut run.world, (d, "t"), (d, "l"));
    // Content and names, one after the other and together.
    for absorbed in [1, 1, 10] {
        run.step(absorbed, t, true);
        assert_eq!((run.entry(d, "t"), run.entry(d, "l")), (Some(t), Some(l)));
        assert!(run.has(l) && run.has(t));
    }
    run.step(0, 0, true);
    assert_eq!((run.entry(d, "t"), run.entry(d, "l")), (None, Some(t)));
    assert!(!run.has(l));
    run.finish();
}

/// A log that is still written to is renamed over an older one, and another takes
/// its name: it has nowhere to wait.
#[test]
fn trap_10_what_has_no_name_to_wait_under_is_renamed_at_once() {
    let mut world = World::new();
    let log = make(&mut world, ROOT, "log", Kind::File);
    let old = make(&mut world, ROOT, "log.1", Kind::File);
    let mut run = replicated(world);
    write(&mut run.world, log, true);
    rename(&mut run.world, (ROOT, "log"), (ROOT, "log.1"));
    let new = make(&mut run.world, ROOT, "log", Kind::File);
    run.step(100, log, true);
    assert_eq!((run.entry(ROOT, "log"), run.entry(ROOT, "log.1")), (Some(new), Some(log)));
    assert!(!run.has(old));
    run.finish();
}

/// Its directory waits with it: one that is made meanwhile and takes the large
/// file in comes without it.
#[test]
fn trap_10_a_directory_comes_before_the_large_file_in_it() {
    let mut run = replicated(World::new());
    let t = make(&mut run.world, ROOT, "t", Kind::File);
    run.absorb_all();
    run.step(0, t, true);
    let d = make(&mut run.world, ROOT, "d", Kind::Directory);
    rename(&mut run.world, (ROOT, "t"), (d, "t"));
    run.absorb_all();
    run.step(0, t, true);
    assert_eq!((run.entry(ROOT, "d"), run.entry(d, "t"), run.has(t)), (Some(d), None, false));
    run.step(0, 0, true);
    assert_eq!(run.entry(d, "t"), Some(t));
    run.finish();
}

/// While a walk is under way, a directory moves from the part that is still to
/// be walked to the part that was: it is not taken for deleted, and what had
/// changed in it unseen is found all the same.
#[test]
fn trap_11_a_directory_that_moves_behind_the_walk_is_walked() {
    let mut world = World::new();
    let a = make(&mut world, ROOT, "a", Kind::Directory);
    for n in 0..6 {
        make(&mut world, a, &format!("filler-{n}"), Kind::File);
    }
    let z = make(&mut world, ROOT, "z", Kind::Directory);
    let d = make(&mut world, z, "d", Kind::Directory);
    let f = make(&mut world, d, "f", Kind::File);
    let mut run = replicated(world);
    write(&mut run.world, f, false);
    run.lose_records();
    let mut moved = false;
    for _ in 0..40 {
        run.batch(&[], 1, 0, false, false);
        assert!(run.has(d) && run.has(f), "deleted by a walk");
        let walked = |directory: u32, run: &Run| {
            !run.dirty.listings.iter().any(|listing| listing.directory == id(directory))
        };
        if !moved && walked(a, &run) && run.walking {
            rename(&mut run.world, (z, "d"), (a, "d"));
            run.absorb_all();
            moved = true;
        }
    }
    assert!(moved);
    assert_eq!(run.replica.objects[&id(f)].1, run.world.inodes[&f].content, "changed unseen");
    run.finish();
}

/// A directory that the replica does not know yet is listed when it is first
/// bound, whatever records of its content were dropped before.
#[test]
fn trap_11_a_directory_is_listed_when_it_is_first_bound() {
    let mut run = replicated(World::new());
    let d = make(&mut run.world, OUTSIDE, "d", Kind::Directory);
    let e = make(&mut run.world, d, "e", Kind::Directory);
    let f = make(&mut run.world, e, "f", Kind::File);
    // Of what lies outside, no record comes.
    run.world.records.clear();
    run.cursor = 0;
    rename(&mut run.world, (OUTSIDE, "d"), (ROOT, "d"));
    run.absorb_all();
    run.step(0, 0, true);
    assert_eq!(
        (run.entry(ROOT, "d"), run.entry(d, "e"), run.entry(e, "f")),
        (Some(d), Some(e), Some(f))
    );
    run.finish();
}

/// Unlinked in the tree but linked outside: neither dead nor ours. It waits
/// while it may still come back, and goes when every event has been seen.
#[test]
fn trap_12_what_is_linked_outside_is_neither_dead_nor_ours() {
    let mut world = World::new();
    let f = make(&mut world, ROOT, "f", Kind::File);
    world.inodes.get_mut(&OUTSIDE).unwrap().entries.insert(called("link"), f);
    let mut run = replicated(world);
    unlink(&mut run.world, ROOT, "f");
    assert!(run.world.inodes.contains_key(&f), "it lives");
    run.absorb_all();
    run.step(0, 0, false);
    assert!(run.has(f) && run.is_orphan(f), "not dead: its handle opens");
    run.step(0, 0, false);
    assert!(run.is_orphan(f), "not outside before all events were seen");
    run.step(0, 0, true);
    assert!(!run.has(f), "outside");
    run.finish();
}

/// A subtree leaves the source after one of its children had moved elsewhere in
/// it, and the child's new name comes to light first by a walk: the child stays.
#[test]
fn trap_12_a_subtree_that_moved_out_does_not_take_what_had_left_it() {
    let mut world = World::new();
    let d = make(&mut world, ROOT, "d", Kind::Directory);
    let c = make(&mut world, d, "c", Kind::Directory);
    let f = make(&mut world, c, "f", Kind::File);
    let g = make(&mut world, d, "g", Kind::File);
    let h = make(&mut world, d, "h", Kind::File);
    let mut run = replicated(world);
    rename(&mut run.world, (d, "h"), (ROOT, "h"));
    // Of these renames only the part about the old name is lost.
    run.cursor += 1;
    run.absorb_all();
    rename(&mut run.world, (d, "c"), (ROOT, "c"));
    rename(&mut run.world, (ROOT, "d"), (OUTSIDE, "d"));
    run.cursor += 1;
    run.absorb_all();
    for settled in [false, true, true] {
        run.step(0, 0, settled);
        assert!(run.has(c) && run.has(f) && run.has(h), "taken along");
    }
    assert_eq!((run.entry(ROOT, "c"), run.entry(c, "f")), (Some(c), Some(f)));
    assert_eq!(run.entry(ROOT, "h"), Some(h));
    assert!(!run.has(d) && !run.has(g), "what moved out goes");
    run.finish();
}
