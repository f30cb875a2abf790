//! Tells a source what the replica holds, so that it can verify it, or send it no more
//! of a changed file than it lacks: what the file system shows, not what the objects map
//! believes.
//!
//! A thread of its own looks, of low priority, so that applying does not wait
//! for it. It may look while a batch is applied; which answers that spoils, the
//! source knows, for it knows what its batches touch. Where objects are found by
//! path, a batch can also hide what it does not touch; then the answer is
//! [`Description::Busy`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use replicator_common::describe::{
    ASKED_MAX, Describe, Described, Description, EXTRA_MAX, EntriesSeen, EntrySeen, Expected,
    ExtraSeen, QUESTIONS_MAX, RANGE_MAX, RangeSeen, block_hash, blocks,
};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::sys::{handle, place, quiet, stat};
use replicator_common::wire::{Hash, PACK_MAX};
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use crate::access;
use crate::area::AreaError;
use crate::locate::Locator;
use crate::objects::Objects;
use crate::reconcile::{is_file_systems_own, state};
use crate::replica::Replica;
use crate::store::{Snapshot, StoreError};

/// About how many bytes of objects go into one answer: one alone may hold 64 KiB
/// of xattrs, and a frame has a limit.
const ANSWER_BYTES: usize = 1 << 20;
/// What is read at a time.
const READ: usize = 1 << 20;

/// The thread that looks, seen from its session.
pub struct Describer {
    questions: SyncSender<Describe>,
}

impl Describer {
    /// Starts it; answers go to `answers`, in order. It ends with either end.
    pub fn start(
        replica: Arc<Replica>,
        answers: mpsc::UnboundedSender<Description>,
    ) -> std::io::Result<Self> {
        let (questions, inbox) = sync_channel(QUESTIONS_MAX);
        std::thread::Builder::new().name(format!("describe-{}", replica.config.source)).spawn(
            move || {
                quiet::background_thread();
                let mut look = Look::new(replica);
                for question in inbox {
                    if answers.send(look.answer(&question)).is_err() {
                        return;
                    }
                }
            },
        )?;
        Ok(Self { questions })
    }

    /// Passes a question on.
    ///
    /// # Errors
    /// In words, when the source asks too much, or too many questions at a time.
    pub fn ask(&self, question: Describe) -> Result<(), String> {
        check(&question)?;
        self.questions.try_send(question).map_err(|error| match error {
            TrySendError::Full(_) => format!("more than {QUESTIONS_MAX} questions wait"),
            TrySendError::Disconnected(_) => "nobody looks at the replica".to_owned(),
        })
    }
}

fn check(question: &Describe) -> Result<(), String> {
    let count = match question {
        Describe::Objects(objects) => objects.len(),
        Describe::Entries { expected, .. } => expected.len(),
        Describe::Range { length, .. } if *length > RANGE_MAX => {
            return Err(format!("{length} bytes asked for, the limit is {RANGE_MAX}"));
        }
        Describe::Range { .. } => 0,
        Describe::Blocks { runs, .. } => {
            let bytes = runs.iter().map(|(_, length)| u64::from(*length)).sum::<u64>();
            if bytes > RANGE_MAX {
                return Err(format!("{bytes} bytes asked for, the limit is {RANGE_MAX}"));
            }
            runs.len()
        }
    };
    if count > ASKED_MAX {
        return Err(format!("{count} objects asked for, the limit is {ASKED_MAX}"));
    }
    Ok(())
}

/// Looks at a replica.
struct Look {
    replica: Arc<Replica>,
    locator: Locator,
    /// The directory listed last, and its names in order: a large one is asked
    /// for in many parts. What changes in it meanwhile is looked at again before
    /// it is told.
    listed: Option<(ObjectId, Vec<Name>)>,
    buffer: Vec<u8>,
}

/// Why an answer cannot be given.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Area(#[from] AreaError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Look {
    fn new(replica: Arc<Replica>) -> Self {
        let locator = replica.locator();
        Self { replica, locator, listed: None, buffer: vec![0; READ] }
    }

    fn answer(&mut self, question: &Describe) -> Description {
        let before = self.moment();
        let answer = match question {
            Describe::Objects(objects) => self.objects(objects),
            Describe::Range { object, offset, length } => {
                Ok(Description::Range(self.range(object, *offset, *length)))
            }
            Describe::Blocks { object, version, runs } => {
                Ok(Description::Blocks(self.blocks(object, *version, runs)))
            }
            Describe::Entries { directory, after, until, expected, list } => {
                let span = list.then_some((after.as_ref(), until.as_ref()));
                Ok(Description::Entries(self.entries(directory, span, expected)))
            }
        };
        let moved = !self.replica.abilities.handles && (before != self.moment() || before.0);
        match answer {
            Ok(answer) if !moved => answer,
            Ok(_) => Description::Busy,
            Err(error) => {
                tracing::warn!(%error, "cannot describe the replica");
                Description::Busy
            }
        }
    }

    /// Whether a batch is being applied, and the last that was.
    fn moment(&self) -> (bool, u64) {
        let applied = self.replica.applied.load(Ordering::Acquire);
        (self.replica.shared().durable > BatchId(applied), applied)
    }

    fn objects(&mut self, asked: &[(ObjectId, bool)]) -> Result<Description, Failure> {
        let replica = self.replica.clone();
        let snapshot = replica.store.snapshot()?;
        let (mut all, mut bytes) = (Vec::with_capacity(asked.len()), 0);
        for (object, hash) in asked {
            let described = self
                .object(&snapshot, object, *hash)
                .unwrap_or_else(|error| Described::Unreadable(error.to_string()));
            bytes += size_of(&described);
            all.push(described);
            if bytes >= ANSWER_BYTES {
                break;
            }
        }
        Ok(Description::Objects(all))
    }

    fn object(
        &mut self,
        snapshot: &Snapshot<'_>,
        object: &ObjectId,
        hash: bool,
    ) -> Result<Described, Failure> {
        let Some(known) = snapshot.get(object)? else { return Ok(Described::Unknown) };
        if known.handle.is_none() {
            return Ok(Described::Unmade);
        }
        let opened = self.locator.open(snapshot, object, &known, OFlags::PATH);
        let fd = match opened.map_err(unreadable) {
            Ok(Some(fd)) => fd,
            Ok(None) => return Ok(Described::Missing),
            Err(error) => return Ok(Described::Unreadable(error)),
        };
        Ok(self.found(&fd, hash).unwrap_or_else(|error| match error {
            Errno::NOENT | Errno::STALE => Described::Missing,
            error => Described::Unreadable(error.to_string()),
        }))
    }

    fn found(&mut self, fd: &OwnedFd, hash: bool) -> Result<Described, Errno> {
        let (state, links) = state(fd.as_fd())?;
        if links == 0 {
            return Ok(Described::Missing);
        }
        let hash = match state.kind {
            Kind::File if hash && state.size <= PACK_MAX => {
                let file = open_content(fd.as_fd())?;
                let length = quiet::read_at(&file, &mut self.buffer, 0)?;
                Some(Hash::of(&self.buffer[..length]))
            }
            _ => None,
        };
        let target = match state.kind {
            Kind::Symlink => {
                let target = rustix::fs::readlinkat(fd, "", Vec::new())?;
                Some(ByteBuf::from(target.into_bytes()))
            }
            _ => None,
        };
        Ok(Described::Found { state, hash, target })
    }

    fn range(&mut self, object: &ObjectId, offset: u64, length: u64) -> RangeSeen {
        let file = match self.open(object, OFlags::PATH) {
            Ok(Some(fd)) => match stat::of_fd(&fd) {
                Ok(stat) if stat.kind == Kind::File => open_content(fd.as_fd()),
                // Opening a device would do something.
                Ok(_) => return RangeSeen::Missing,
                Err(error) => Err(error),
            }
            .map_err(|error| error.to_string()),
            Ok(None) => return RangeSeen::Missing,
            Err(error) => Err(error),
        };
        let read = file
            .and_then(|file| self.hash(&file, offset, length).map_err(|error| error.to_string()));
        match read {
            Ok((length, hash)) => RangeSeen::Read { length, hash },
            Err(error) => RangeSeen::Unreadable(error),
        }
    }

    fn hash(&mut self, file: &OwnedFd, offset: u64, length: u64) -> Result<(u64, Hash), Errno> {
        let (mut hasher, mut done) = (blake3::Hasher::new(), 0);
        while done < length {
            let want = usize::try_from(length - done).unwrap_or(READ).min(READ);
            let at = offset.checked_add(done).ok_or(Errno::OVERFLOW)?;
            let read = quiet::read_at(file, &mut self.buffer[..want], at)?;
            hasher.update(&self.buffer[..read]);
            done += read as u64;
            if read < want {
                break;
            }
        }
        Ok((done, Hash(*hasher.finalize().as_bytes())))
    }

    /// Hashes of the blocks of a file, if its content is of that `version`.
    ///
    /// INVARIANT (trap 5): the map runs ahead of the replica while a batch is being
    /// applied, so a version counts once its batch is applied. It stays until the
    /// source sends another, which it does not while it waits for this.
    fn blocks(
        &mut self,
        object: &ObjectId,
        version: BatchId,
        runs: &[(u64, u32)],
    ) -> Option<ByteBuf> {
        let applied = self.replica.applied.load(Ordering::Acquire);
        let known = self.replica.store.snapshot().ok()?.get(object).ok()??;
        if known.content != version || version.0 > applied {
            return None;
        }
        let fd = self.open(object, OFlags::PATH).ok()??;
        if stat::of_fd(&fd).ok()?.kind != Kind::File {
            return None;
        }
        let file = open_content(fd.as_fd()).ok()?;
        let mut hashes = Vec::new();
        for (from, length) in runs {
            for block in blocks(*from, u64::from(*length)) {
                let want = usize::try_from(block.end - block.start).ok()?;
                let bytes = self.buffer.get_mut(..want)?;
                if quiet::read_at(&file, bytes, block.start).ok()? < want {
                    return None;
                }
                hashes.extend(block_hash(bytes));
            }
        }
        Some(ByteBuf::from(hashes))
    }

    /// An object of the map; the error in words.
    fn open(&self, object: &ObjectId, flags: OFlags) -> Result<Option<OwnedFd>, String> {
        let snapshot = self.replica.store.snapshot().map_err(|error| error.to_string())?;
        let known = snapshot.get(object).map_err(|error| error.to_string())?;
        let Some(known) = known else { return Ok(None) };
        let opened = self.locator.open(&snapshot, object, &known, flags);
        opened.map_err(unreadable)
    }

    fn entries(
        &mut self,
        directory: &ObjectId,
        span: Option<Span<'_>>,
        expected: &[(Name, Expected)],
    ) -> EntriesSeen {
        let found = self.open(directory, OFlags::PATH);
        let fd = match found {
            Ok(Some(fd)) => fd,
            Ok(None) => return EntriesSeen::Missing,
            Err(error) => return EntriesSeen::Unreadable(error),
        };
        let extra = match span {
            Some(span) => self.extra(&fd, directory, span, expected),
            None => Ok(Vec::new()),
        };
        match extra.and_then(|extra| Ok((self.wrong(&fd, expected)?, extra))) {
            Ok((wrong, extra)) => EntriesSeen::Read { wrong, extra },
            Err(error) => EntriesSeen::Unreadable(error),
        }
    }

    fn wrong(
        &self,
        directory: &OwnedFd,
        expected: &[(Name, Expected)],
    ) -> Result<Vec<(u32, EntrySeen)>, String> {
        let snapshot = self.replica.store.snapshot().map_err(|error| error.to_string())?;
        let mut wrong = Vec::new();
        for (at, (name, expected)) in expected.iter().enumerate() {
            let wanted = match expected {
                Expected::Anything => continue,
                Expected::Nothing => None,
                Expected::Object(object) => {
                    let known = snapshot.get(object).map_err(|error| error.to_string())?;
                    match known.map(|known| known.handle) {
                        // It could not be made; status says so.
                        Some(None) => continue,
                        Some(Some(handle)) => Some(handle),
                        None => None,
                    }
                }
            };
            let found = match seen(directory, name) {
                Ok(found) if wanted.is_some() && Some(&found.handle) == wanted.as_ref() => continue,
                Ok(found) => EntrySeen::Other(found),
                Err(Errno::NOENT | Errno::STALE) if *expected == Expected::Nothing => continue,
                Err(Errno::NOENT | Errno::STALE) => EntrySeen::Nothing,
                Err(error) => EntrySeen::Unreadable(error.to_string()),
            };
            wrong.push((u32::try_from(at).unwrap_or(u32::MAX), found));
        }
        Ok(wrong)
    }

    fn extra(
        &mut self,
        directory: &OwnedFd,
        id: &ObjectId,
        (after, until): Span<'_>,
        expected: &[(Name, Expected)],
    ) -> Result<Vec<ExtraSeen>, String> {
        let area = self.replica.area.clone();
        let root = handle::identify(directory.as_fd()).ok().as_ref() == Some(area.root_handle());
        let names = self.names(directory, id, after.is_none())?;
        let mut extra = Vec::new();
        for name in names {
            let within = after.is_none_or(|after| name > after)
                && until.is_none_or(|until| name <= until)
                && expected.binary_search_by(|(known, _)| known.cmp(name)).is_err();
            let own = root && (area.is_ours(name) || is_file_systems_own(area.root(), name));
            if !within || own {
                continue;
            }
            // It may have gone since the directory was listed.
            let Ok(found) = seen(directory, name) else { continue };
            extra.push(found);
            if extra.len() == EXTRA_MAX {
                break;
            }
        }
        Ok(extra)
    }

    /// The names of a directory, in order.
    fn names(&mut self, fd: &OwnedFd, id: &ObjectId, anew: bool) -> Result<&[Name], String> {
        let fresh = !anew && self.listed.as_ref().is_some_and(|(listed, _)| listed == id);
        if !fresh {
            let names = access::with(&[fd.as_fd()], || {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                place::list(place::reopen(fd.as_fd(), flags)?.as_fd())
            });
            let names = names.map_err(|error| error.to_string())?;
            let mut names: Vec<Name> = names.into_iter().map(|(name, _)| name).collect();
            names.sort();
            self.listed = Some((id.clone(), names));
        }
        Ok(self.listed.as_ref().map_or(&[], |(_, names)| names.as_slice()))
    }
}

/// Names after one and up to another.
type Span<'a> = (Option<&'a Name>, Option<&'a Name>);

/// What stands under a name.
fn seen(directory: &OwnedFd, name: &Name) -> Result<ExtraSeen, Errno> {
    access::with(&[directory.as_fd()], || {
        let handle = handle::identify_entry(directory.as_fd(), name)?;
        let stat = stat::of_entry(directory.as_fd(), name)?;
        Ok(ExtraSeen { name: name.clone(), handle, kind: stat.kind, size: stat.size })
    })
}

fn unreadable(error: Failure) -> String {
    match error {
        Failure::Area(AreaError::System { source, .. }) => source.to_string(),
        error => error.to_string(),
    }
}

/// Opens a file to be read, without a trace in its access time where that is
/// allowed.
fn open_content(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let file = access::with(&[fd], || match place::reopen(fd, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => place::reopen(fd, flags),
        result => result,
    })?;
    quiet::no_reuse(&file);
    Ok(file)
}

fn size_of(described: &Described) -> usize {
    let Described::Found { state, target, .. } = described else { return 100 };
    let xattrs = state.attributes.xattrs.iter();
    let xattrs: usize = xattrs.map(|one| one.name.len() + one.value.len() + 32).sum();
    200 + xattrs + target.as_ref().map_or(0, |target| target.len())
}
