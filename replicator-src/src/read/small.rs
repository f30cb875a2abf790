//! Small files, and everything that has no content of its own.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::stat::{self, Stat};
use replicator_common::sys::xattr;
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Extent, Hash, PACK_MAX, PackedAgain, PackedObject};
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::extents;
use super::kept::KeptObjects;
use crate::index::{Content, Known};
use crate::plan::{Need, Outcome};
use crate::source::{Opened, Opener, told};

/// How often a file that changes while it is read is read again at once. After
/// that what was read is taken; the event of the change makes it dirty again.
const READ_AGAIN: usize = 2;

/// One object to read.
#[derive(Clone, Debug)]
pub struct Item {
    /// Which.
    pub object: ObjectId,
    /// What of it.
    pub need: Need,
    /// As the replica holds it.
    pub known: Option<Known>,
    /// It is new, and so is the directory that its need's hint names: the destination
    /// is told, see [`DataFrame::PackPlaced`](replicator_common::wire::DataFrame::PackPlaced).
    pub nested: bool,
}

impl Item {
    /// The place that the destination is told of.
    pub fn spot(&self) -> Option<&(ObjectId, Name)> {
        self.need.hint.as_ref().filter(|_| self.nested)
    }
}

/// What reading gave, and what must travel for it.
pub struct Reading {
    /// For planning.
    pub outcome: Outcome,
    /// The packed content, when it must travel.
    pub packed: Option<Packed>,
    /// Content bytes in it.
    pub bytes: u64,
}

/// How a small file's content gets to the destination's staging.
pub enum Packed {
    /// It travels: the content was added to what is read for its frame.
    Whole(PackedObject),
    /// It is there already.
    Again(PackedAgain),
}

impl From<Outcome> for Reading {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, packed: None, bytes: 0 }
    }
}

/// Opens an object that is to be read.
pub fn open(opener: &Opener, item: &Item) -> Result<Opened, Errno> {
    let hint = item.need.hint.as_ref();
    if item.need.kind == Kind::File && item.need.content {
        opener.open_content(&item.object, hint)
    } else {
        opener.open(&item.object, hint, OFlags::PATH | OFlags::CLOEXEC)
    }
}

/// The disk begins to read a file that is to be read a little later. What cannot be
/// told in advance is not told: the reading itself will wait.
pub fn announce(item: &Item, opened: &Result<Opened, Errno>) {
    if let (Kind::File, true, Ok(Opened::Here(fd))) = (item.need.kind, item.need.content, opened) {
        let _ = rustix::fs::fadvise(fd, 0, NonZeroU64::new(PACK_MAX), Advice::WillNeed);
    }
}

/// Reads one object that was [opened](open). Never fails as a whole: what cannot be
/// read becomes [`Outcome::Unreadable`].
///
/// INVARIANT: `data` grows by the content of what becomes [`Packed::Whole`], and by
/// nothing else.
pub fn read(
    opener: &Opener,
    kept: &KeptObjects,
    (item, opened): (&Item, Result<Opened, Errno>),
    (batch, version): (BatchId, u32),
    data: &mut Vec<u8>,
) -> Reading {
    let from = data.len();
    let read = opened.and_then(|opened| try_read(opener, item, opened, (batch, version), data));
    let reading = match read {
        Ok(reading) => unless_kept(kept, reading),
        Err(Errno::STALE | Errno::NOENT) => Outcome::Gone.into(),
        Err(error) => Outcome::Unreadable { error: told(error) }.into(),
    };
    if !matches!(reading.packed, Some(Packed::Whole(_))) {
        data.truncate(from);
    }
    reading
}

/// Content that the destination has in staging does not travel.
fn unless_kept(kept: &KeptObjects, reading: Reading) -> Reading {
    match reading {
        // Without holes: only then is the hash of its data that of all of its content.
        Reading { outcome, packed: Some(Packed::Whole(packed)), bytes }
            if bytes == packed.state.size && kept.take(&packed.object, &packed.hash) =>
        {
            let PackedObject { object, version, state, hash, .. } = packed;
            let packed = Some(Packed::Again(PackedAgain { object, version, state, hash }));
            Reading { outcome, packed, bytes: 0 }
        }
        other => other,
    }
}

fn try_read(
    opener: &Opener,
    item: &Item,
    opened: Opened,
    (batch, version): (BatchId, u32),
    data: &mut Vec<u8>,
) -> Result<Reading, Errno> {
    let fd = match opened {
        Opened::Here(fd) => fd,
        Opened::Gone => return Ok(Outcome::Gone.into()),
        Opened::Away => return Ok(Outcome::Away.into()),
    };
    if let (Kind::File, false, Some(known)) = (item.need.kind, item.need.content, &item.known) {
        let now = stat::of_fd(&fd)?;
        if now.size != known.state.size || now.mtime != known.state.attributes.mtime {
            // Content changed, whatever events told: the one that says so may
            // have come under a name that leads elsewhere by now.
            let need = Need { content: true, ..item.need.clone() };
            let item = Item { need, ..item.clone() };
            let opened = open(opener, &item)?;
            return try_read(opener, &item, opened, (batch, version), data);
        }
    }
    let (mut attempt, from) = (0, data.len());
    loop {
        data.truncate(from);
        let read_at = Timestamp::now();
        let before = stat::of_fd(&fd)?;
        if before.nlink == 0 {
            return Ok(Outcome::Gone.into());
        }
        let reading = read_open(&fd, item, (&before, read_at), (batch, version), data)?;
        let after = stat::of_fd(&fd)?;
        attempt += 1;
        if (before.ctime, before.size) == (after.ctime, after.size) || attempt > READ_AGAIN {
            return Ok(reading);
        }
    }
}

fn read_open(
    fd: &OwnedFd,
    item: &Item,
    (stat, read_at): (&Stat, Timestamp),
    (batch, version): (BatchId, u32),
    data: &mut Vec<u8>,
) -> Result<Reading, Errno> {
    let state = state_of(fd.as_fd(), stat)?;
    let known = item.known.as_ref();
    let basic = |content, version| Known {
        state: state.clone(),
        ctime: stat.ctime,
        read_at,
        version,
        content,
        entry: None,
        links: 0,
        nlink: stat.nlink,
    };
    match (stat.kind, item.need.content) {
        (Kind::File, true) => {
            if stat.size > PACK_MAX {
                return Ok(Outcome::Large { size: stat.size }.into());
            }
            let from = data.len();
            let extents = content(fd.as_fd(), stat, data)?;
            let bytes = &data[from..];
            let hash = Hash::of(bytes);
            let content = Content::Whole(whole(stat.size, &extents, bytes, &hash));
            match known {
                Some(known) if known.content == content => {
                    Ok(compare(known, basic(content, known.version)))
                }
                _ => {
                    let known = basic(content, batch);
                    let size = bytes.len() as u64;
                    let object = item.object.clone();
                    let packed = PackedObject { object, version, state, extents, hash };
                    let content = ContentSource::Packed { version };
                    let outcome = Outcome::Ship { known, content };
                    let packed = Some(Packed::Whole(packed));
                    Ok(Reading { outcome, packed, bytes: size })
                }
            }
        }
        (Kind::File, false) => match known {
            // The size says that content changed after all; an event of it is
            // on its way, and so is this reading if none comes.
            Some(known) if known.state.size != stat.size => {
                let mut state = state;
                state.size = known.state.size;
                let taken = Known { state, ctime: known.ctime, ..known.clone() };
                Ok(compare(known, taken))
            }
            Some(known) => {
                let mut taken = basic(known.content.clone(), known.version);
                // Content was not looked at: its change time proves nothing
                // to a rescan.
                taken.read_at = taken.ctime;
                Ok(compare(known, taken))
            }
            None => Ok(Outcome::Gone.into()),
        },
        (Kind::Symlink, _) => {
            let target = rustix::fs::readlinkat(fd, "", Vec::new())?.into_bytes();
            let content = Content::Symlink(target.clone());
            match known {
                Some(known) => Ok(compare(known, basic(content, known.version))),
                None => Ok(Outcome::Ship {
                    known: basic(content, batch),
                    content: ContentSource::Symlink { target },
                }
                .into()),
            }
        }
        _ => match known {
            Some(known) => Ok(compare(known, basic(Content::None, known.version))),
            None => Ok(ship_attributes(basic(Content::None, batch))),
        },
    }
}

/// Content is the same: only attributes travel, when they differ.
fn compare(old: &Known, new: Known) -> Reading {
    if old.state == new.state { Outcome::Same { known: new }.into() } else { ship_attributes(new) }
}

fn ship_attributes(known: Known) -> Reading {
    Outcome::Ship { known, content: ContentSource::Unchanged }.into()
}

/// The replicated state of an open object.
pub fn state_of(fd: BorrowedFd<'_>, stat: &Stat) -> Result<ObjectState, Errno> {
    let size = match stat.kind {
        Kind::File | Kind::Symlink => stat.size,
        _ => 0,
    };
    let attributes = Attributes {
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        mtime: stat.mtime,
        xattrs: xattr::read(fd)?,
    };
    Ok(ObjectState { kind: stat.kind, attributes, size, rdev: stat.rdev })
}

/// Adds the data of a small file to `data`, extent by extent.
fn content(fd: BorrowedFd<'_>, stat: &Stat, data: &mut Vec<u8>) -> Result<Vec<Extent>, Errno> {
    let mut extents = extents::of(fd, stat)?;
    let total: u64 = extents.iter().map(|extent| extent.length).sum();
    let from = data.len();
    data.resize(from + total as usize, 0);
    let bytes = &mut data[from..];
    let mut filled = 0;
    for extent in &mut extents {
        let part = &mut bytes[filled..filled + extent.length as usize];
        let read = read_full(fd, part, extent.offset)?;
        filled += read;
        if (read as u64) < extent.length {
            // It shrank while it was read; the stat after reading tells.
            extent.length = read as u64;
            break;
        }
    }
    data.truncate(from + filled);
    let mut end = 0;
    extents.retain(|extent| {
        end += extent.length;
        extent.length > 0 && end <= filled as u64
    });
    Ok(extents)
}

/// Reads until the buffer is full or the file ends; returns the bytes read.
pub fn read_full(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// What tells whether a small file's content is the same: its bytes as a reader
/// sees them, holes read as zeros. `data` is the hash of `bytes`.
///
/// Where holes lie is not part of it: the kernel's answer to that changes when
/// dirty pages are written back, so it would tell of changes that nobody made.
fn whole(size: u64, extents: &[Extent], bytes: &[u8], data: &Hash) -> Hash {
    let dense = extents.iter().map(|extent| extent.length).sum::<u64>() == size;
    if dense {
        return whole_hash(size, data);
    }
    let mut hasher = blake3::Hasher::new();
    let (mut at, mut rest) = (0, bytes);
    for extent in extents {
        zeros(&mut hasher, extent.offset - at);
        let (part, after) = rest.split_at(extent.length as usize);
        hasher.update(part);
        (at, rest) = (extent.offset + extent.length, after);
    }
    zeros(&mut hasher, size.saturating_sub(at));
    whole_hash(size, &Hash(*hasher.finalize().as_bytes()))
}

/// Hashes so many zeros.
fn zeros(hasher: &mut blake3::Hasher, mut count: u64) {
    const ZEROS: [u8; 4096] = [0; 4096];
    while count > 0 {
        let part = count.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..part as usize]);
        count -= part;
    }
}

/// The same of a file whose whole content has the hash `content`, holes read as
/// zeros.
pub fn whole_hash(size: u64, content: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    if size > 0 {
        // One extent over all of it: so the index has known dense files from
        // the beginning, and they need not be sent again.
        hasher.update(&0u64.to_le_bytes());
        hasher.update(&size.to_le_bytes());
    }
    hasher.update(&content.0);
    Hash(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};
    use std::sync::Arc;

    use replicator_common::wire::{KeptObject, contents};

    use super::*;
    use crate::source::Root;

    /// What there is of files, and what reading them is to give.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Case {
        Whole,
        Sparse,
        Empty,
        Kept,
        Unchanged,
        Attributes,
        Large,
        Gone,
        Failed,
    }

    #[test]
    fn what_is_read_for_a_frame_is_what_its_objects_tell() {
        let base = tempfile::tempdir().unwrap();
        let opener = Opener::new(Arc::new(Root::open(base.path()).unwrap()), Arc::default());
        let kept = KeptObjects::default();
        let mut data = Vec::new();
        let all = [
            Case::Whole,
            Case::Kept,
            Case::Unchanged,
            Case::Sparse,
            Case::Attributes,
            Case::Empty,
            Case::Large,
            Case::Failed,
            Case::Gone,
        ];
        let (mut objects, mut wanted) = (Vec::new(), Vec::new());
        // Each case follows each other one, and itself.
        let pairs = all.iter().flat_map(|one| all.iter().flat_map(move |next| [*one, *next]));
        for (number, case) in pairs.enumerate() {
            let path = base.path().join(number.to_string());
            let mut file = std::fs::File::create_new(&path).unwrap();
            let text = format!("{number} {case:?} ").repeat(100 + number).into_bytes();
            match case {
                Case::Empty => {}
                Case::Large => file.set_len(PACK_MAX + 1).unwrap(),
                Case::Sparse => {
                    file.seek(SeekFrom::Start(1 << 16)).unwrap();
                    file.write_all(&text).unwrap();
                    file.set_len(1 << 17).unwrap();
                }
                _ => file.write_all(&text).unwrap(),
            }
            let object = ObjectId::new(1, &(number as u32).to_be_bytes()).unwrap();
            let content = case != Case::Attributes;
            let need = Need { kind: Kind::File, new: false, content, hint: None };
            let mut item = Item { object: object.clone(), need, known: None, nested: false };
            let hash = Hash::of(&text);
            if case == Case::Kept {
                kept.extend(vec![KeptObject { object: object.clone(), hash }], 1);
            }
            if matches!(case, Case::Unchanged | Case::Attributes) {
                let stat = stat::of_fd(&file).unwrap();
                item.known = Some(Known {
                    state: state_of(file.as_fd(), &stat).unwrap(),
                    ctime: stat.ctime,
                    read_at: stat.ctime,
                    version: BatchId(1),
                    content: Content::Whole(whole_hash(stat.size, &hash)),
                    entry: None,
                    links: 1,
                    nlink: 1,
                });
            }
            let opened = std::fs::File::open(&path).map(|file| Opened::Here(file.into())).unwrap();
            let opened = if case == Case::Failed { Err(Errno::IO) } else { Ok(opened) };
            if case == Case::Gone {
                std::fs::remove_file(&path).unwrap();
            }
            let reading = read(&opener, &kept, (&item, opened), (BatchId(2), 3), &mut data);
            match (case, reading.packed) {
                (Case::Whole | Case::Sparse | Case::Empty, Some(Packed::Whole(packed))) => {
                    assert_eq!(packed.length(), Some(reading.bytes as usize), "{case:?}");
                    objects.push(packed);
                    wanted.push((case, text));
                }
                (Case::Kept, Some(Packed::Again(again))) => assert_eq!(again.hash, hash),
                (Case::Whole | Case::Sparse | Case::Empty | Case::Kept, _) => {
                    panic!("{case:?} does not travel")
                }
                (_, packed) => assert!(packed.is_none(), "{case:?} travels"),
            }
        }
        assert_eq!(objects.len(), 3 * 2 * all.len());
        let each = contents(&objects, &data).expect("as many bytes as the objects tell of");
        for ((packed, bytes), (case, text)) in each.zip(wanted) {
            assert_eq!(Hash::of(bytes), packed.hash);
            match case {
                Case::Empty => assert!(bytes.is_empty()),
                // A file system that knows no holes gives them as zeros.
                Case::Sparse => assert!(bytes.windows(text.len()).any(|part| part == text)),
                _ => assert_eq!(bytes, text),
            }
        }
    }

    #[test]
    fn content_is_the_same_wherever_its_holes_lie() {
        let extent = |offset, length| Extent { offset, length };
        let content = [vec![0; 5000], vec![7; 100], vec![0; 4900]].concat();
        let whole_of = |extents: &[Extent]| {
            let part = |e: &Extent| &content[e.offset as usize..(e.offset + e.length) as usize];
            let bytes: Vec<u8> = extents.iter().flat_map(part).copied().collect();
            whole(10_000, extents, &bytes, &Hash::of(&bytes))
        };
        let dense = whole_of(&[extent(0, 10_000)]);
        assert_eq!(dense, whole_hash(10_000, &Hash::of(&content)));
        for sparse in [
            &[extent(4096, 4096)][..],
            &[extent(0, 5050), extent(5050, 50)],
            &[extent(5000, 100), extent(9000, 1000)],
        ] {
            assert_eq!(whole_of(sparse), dense, "{sparse:?}");
        }
        assert_ne!(whole_of(&[extent(0, 5000)]), dense);
        let empty = Hash::of(&[]);
        assert_eq!(whole(0, &[], &[], &empty), whole_hash(0, &empty));
    }
}
