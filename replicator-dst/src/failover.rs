//! Failover: the replica becomes an ordinary writable directory, and what had
//! arrived without having been committed is set aside with a manifest.
//!
//! It needs nothing of the source, takes as long as the rest in staging needs,
//! and may be interrupted anywhere: what is to be done is decided once, written
//! down, and carried out by steps that look first.
//!
//! 1. Redo the last logged batch; sync.
//! 2. Decide what goes to lost+found and which orphans go back; write it down.
//! 3. Put orphans back, move the rest, write `manifest.json`; sync.
//! 4. End the read-only mount. From here on the replica is the user's.
//! 5. Remove our hidden directory, the configuration, the state.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use replicator_common::codec;
use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{FileSystemId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::status::FailoverReport;
use replicator_common::sys::{place, stat};
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Op};
use serde::{Deserialize, Serialize};

use crate::applier::set_aside_item;
use crate::apply::execute;
use crate::apply::{Outcome, Place, ReplicaTree, Within};
use crate::area::{Area, AreaError, MANIFEST, SHARDS, hidden_name, remove_tree};
use crate::hints::place_chain;
use crate::nest;
use crate::objects::{Entry, Objects, Position, path_of};
use crate::readonly::{self, ReadOnlyError};
use crate::replica::{
    Config, Point, Replica, ReplicaError, ReplicaOptions, disclaim, last_replicated,
    time_since_last_sync,
};
use crate::reserve;
use crate::seal::{join, needed_by};
use crate::stage::Stager;
use crate::store::{SetAsideItem, StoreError};
use crate::tree::Tree;

const RECORD: Format = Format { name: "failover", version: 1 };
const RECORD_FILE: &str = "failover.json";
/// Longest chain of new directories followed for a path in the manifest.
const PATH_DEPTH: usize = 4096;

/// Why failover did not come to its end. It can be asked for again.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FailoverError {
    #[error(transparent)]
    Area(#[from] AreaError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    State(#[from] StateFileError),
    #[error(transparent)]
    ReadOnly(#[from] ReadOnlyError),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error(transparent)]
    StateDirectory(#[from] crate::state::StateError),
    #[error("the applier has ended: start the daemon again, or fail over with --state-dir")]
    NoApplier,
    #[error("there is no replication configuration{}", .0.as_ref().map(|id| format!(" for {id}")).unwrap_or_default())]
    NotFound(Option<FileSystemId>),
    #[error("there are several replication configurations: name one of {}", .0.join(", "))]
    Several(Vec<String>),
    #[error("interrupted")]
    Interrupted,
}

/// Something in lost+found, as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Its name in lost+found.
    pub file: String,
    /// The source's object, hexadecimal.
    pub object: String,
    /// `file`, `partial file`, `patch list`, `directory`, `orphan`, `foreign`.
    pub kind: String,
    /// Bytes of a file.
    pub size: Option<u64>,
    /// What it was to be called, relative to the replica, as far as known.
    pub paths: Vec<String>,
    /// Why it is not in its place.
    pub reason: String,
}

/// What `manifest.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this file's form.
    pub version: u32,
    /// The source's file system.
    pub source_file_system_id: FileSystemId,
    /// The replica's file system.
    pub destination_file_system_id: FileSystemId,
    /// When failover began.
    pub time: Timestamp,
    /// Every change before this moment is in the replica.
    pub last_replicated: Option<Timestamp>,
    /// What is here.
    pub items: Vec<Item>,
}

/// What was decided, durable before any of it is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    time: Timestamp,
    config: Config,
    moves: Vec<(Place, Item)>,
    already: Vec<Item>,
    /// Lost+found, if anything goes there or is there: decided here, since with
    /// its manifest in it, it looks like one of an earlier failover.
    #[serde(default)]
    lost: Option<Name>,
    put_back: Vec<(Place, Place)>,
    /// Where the directories of `put_back` stand, for going by path.
    hints: Vec<(ReplicaHandle, Place)>,
    /// All is in its place and on disk: the replica is the user's, and nothing
    /// may be opened for replication any more.
    released: bool,
    report: FailoverReport,
}

/// Fails over. The applier's thread calls this, or [`offline`]; nobody else
/// writes to the replica meanwhile.
pub fn run(replica: &Replica, tree: &mut Tree) -> Result<FailoverReport, FailoverError> {
    // What follows writes, and the disks may be full.
    reserve::give_back(&replica.directory);
    reserve::give_back(&replica.area.hidden_path());
    replica.slack.spend();
    let path = replica.directory.join(RECORD_FILE);
    let mut record: Record = match crashsafe::read(&path, &RECORD)? {
        Some(record) => record,
        None => {
            let warnings = redo(replica, tree)?;
            die(replica, 1)?;
            nest::dissolve(&replica.area)?;
            let mut record = decide(replica)?;
            record.report.warnings = warnings;
            crashsafe::write(&path, &RECORD, &record)?;
            record
        }
    };
    die(replica, 2)?;
    if let Some(lost) = &record.lost {
        replica.area.use_lost(lost)?;
    }
    let mut warnings = Vec::new();
    put_back(tree, &record, &mut warnings)?;
    record.report.warnings.extend(warnings);
    die(replica, 3)?;
    record.report.lost_and_found = set_aside(replica, tree, &record)?;
    die(replica, 4)?;
    // Before anybody may write: what is handed over is on disk.
    place::sync_file_system(replica.protection.root()).map_err(AreaError::system("sync", "."))?;
    record.released = true;
    crashsafe::write(&path, &RECORD, &record)?;
    die(replica, 5)?;
    replica.protection.release()?;
    die(replica, 6)?;
    finish(&replica.directory, &record)?;
    Ok(record.report)
}

/// What is left when the replica is the user's: removing what is ours.
fn finish(directory: &Path, record: &Record) -> Result<(), FailoverError> {
    readonly::release_path(&record.config.path)?;
    let path = &record.config.path;
    let root =
        place::open_directory_path(path).map_err(AreaError::system("open", path.display()))?;
    // Removing our directory must not show in the replica's own times. (After
    // an interruption in between it does.)
    let before = stat::of_fd(&root).map_err(AreaError::system("stat", path.display()))?;
    remove_tree(root.as_fd(), &hidden_name(&record.config.source))?;
    place::set_mtime(root.as_fd(), before.mtime)
        .map_err(AreaError::system("set time of", path.display()))?;
    forget(directory)
}

fn die(replica: &Replica, step: u8) -> Result<(), FailoverError> {
    if replica.dies_at(Point::Failover(step)) { Err(FailoverError::Interrupted) } else { Ok(()) }
}

/// Redoes the last batch; what was not as it must be, in words.
fn redo(replica: &Replica, tree: &mut Tree) -> Result<Vec<String>, FailoverError> {
    let mut steps = Vec::new();
    replica.store.each_logged(|_, part| steps.extend(part))?;
    let mut findings = Vec::new();
    tree.learn(&steps);
    tree.redoing(true);
    execute::run(tree, &steps, &mut findings)?;
    let warnings: Vec<_> = findings.iter().map(ToString::to_string).collect();
    for warning in &warnings {
        tracing::error!(warning, "found at failover");
    }
    let items: Vec<_> = findings.iter().filter_map(set_aside_item).collect();
    replica.store.note_set_aside(&items)?;
    // Before the steps are forgotten, and the staged files that they need.
    place::sync_file_system(replica.protection.root()).map_err(AreaError::system("sync", "."))?;
    let mut standing = replica.store.standing()?;
    standing.applied = standing.committed;
    if findings.iter().any(|finding| matches!(finding, execute::Finding::Lost { .. })) {
        disclaim(&mut standing);
    }
    replica.store.forget(standing.applied, None)?;
    replica.store.set_standing(&standing)?;
    let needed: Vec<_> = steps.iter().flat_map(needed_by).collect();
    Stager::discard(&replica.area, &needed);
    Ok(warnings)
}

/// Looks at what is left and decides. Changes nothing.
fn decide(replica: &Replica) -> Result<Record, FailoverError> {
    let standing = replica.store.standing()?;
    let time = Timestamp::now();
    let plans = Plans::read(replica)?;
    plans.stage_appended(replica);
    let mut moves = Vec::new();
    for shard in 0..SHARDS {
        let directory = replica.area.staging(shard);
        let names = place::list(directory).map_err(AreaError::system("list", "staging"))?;
        for (name, _) in names {
            let size = stat::of_entry(directory, &name).ok().filter(is_file).map(|stat| stat.size);
            if let Some(item) = describe(&name, size, &plans, replica)? {
                moves.push((Place { within: Within::Staging(shard), name }, item));
            }
        }
    }
    let (mut put_back, mut hints, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    for (object, known) in replica.store.orphans()? {
        let from = Place::orphan(&object);
        match home(replica, &known.position)? {
            Some((to, directory)) => {
                hints.extend(place_chain(&*replica.store, &directory, &mut seen)?);
                put_back.push((from, to));
            }
            None => moves.push((from, orphan_item(&object, &known.position))),
        }
    }
    let mut already: Vec<_> = replica.store.set_aside()?.into_iter().map(foreign_item).collect();
    unnoted(replica, &mut already)?;
    let report = FailoverReport {
        source_file_system_id: replica.config.source.clone(),
        destination_file_system_id: replica.config.destination.clone(),
        path: replica.config.path.display().to_string(),
        last_replicated: last_replicated(&standing),
        last_consistent: standing.last_consistent,
        time_since_last_sync: time_since_last_sync(&standing, time),
        lost_and_found: None,
        set_aside: 0,
        put_back: 0,
        not_replicated_records: None,
        not_replicated_paths: plans.paths(replica),
        warnings: Vec::new(),
    };
    let config = replica.config.clone();
    let mut record = Record {
        time,
        config,
        moves,
        already,
        lost: None,
        put_back,
        hints,
        released: false,
        report,
    };
    // An orphan whose old name is taken, or wanted by another one too, stays out.
    let mut taken = HashSet::new();
    let mut tree = Tree::new(replica.area.clone(), replica.abilities.handles);
    record.hints.iter().for_each(|(object, place)| tree.hint(object, place));
    let all = std::mem::take(&mut record.put_back);
    for (from, to) in all {
        if tree.lookup(&to)?.is_none() && taken.insert(to.clone()) {
            record.put_back.push((from, to));
        } else {
            let item = orphan_item_named(&from.name, NOT_FREE);
            record.moves.push((from, item));
        }
    }
    if !(record.moves.is_empty() && record.already.is_empty()) {
        record.lost = Some(replica.area.lost_name()?);
    }
    record.report.set_aside = (record.moves.len() + record.already.len()) as u64;
    record.report.put_back = record.put_back.len() as u64;
    Ok(record)
}

/// Whether bytes can be counted of it.
fn is_file(stat: &stat::Stat) -> bool {
    stat.kind == Kind::File
}

/// Adds what is in lost+found and was not noted: a crash came in between.
fn unnoted(replica: &Replica, already: &mut Vec<Item>) -> Result<(), FailoverError> {
    let Some(lost) = replica.area.find_lost()? else { return Ok(()) };
    let directory = place::open_directory(replica.area.root(), &lost)
        .map_err(AreaError::system("open", &lost))?;
    let names = place::list(directory.as_fd()).map_err(AreaError::system("list", &lost))?;
    for (name, _) in names {
        let file = name.to_string();
        if already.iter().any(|item| item.file == file) {
            continue;
        }
        let reason = "was set aside while it was replicated; why was not noted before a crash";
        already.push(foreign_item(SetAsideItem {
            object: file.clone(),
            file,
            path: None,
            reason: reason.to_owned(),
        }));
    }
    Ok(())
}

/// Where an orphan stood, if its directory is still in the replica.
fn home(
    replica: &Replica,
    position: &Position,
) -> Result<Option<(Place, ObjectId)>, FailoverError> {
    let Position::Orphan { was: Some(was) } = position else { return Ok(None) };
    if path_of(&*replica.store, &was.directory)?.is_none() {
        return Ok(None);
    }
    let directory = replica.store.get(&was.directory)?.and_then(|known| known.handle);
    let place = |handle| Place { within: Within::Replica(handle), name: was.name.clone() };
    Ok(directory.map(|handle| (place(handle), was.directory.clone())))
}

const NOT_FREE: &str = "it was being moved, where to had not arrived, and its old name is not free";
const LEFT: &str = "it had left the source; this is what had not been dropped yet";

fn orphan_item(object: &ObjectId, position: &Position) -> Item {
    let reason = match position {
        Position::Orphan { was: None } => LEFT,
        _ => NOT_FREE,
    };
    orphan_item_named(&Place::orphan(object).name, reason)
}

fn orphan_item_named(name: &Name, reason: &str) -> Item {
    Item {
        file: name.to_string(),
        object: name.to_string(),
        kind: "orphan".to_owned(),
        size: None,
        paths: Vec::new(),
        reason: reason.to_owned(),
    }
}

fn foreign_item(item: SetAsideItem) -> Item {
    Item {
        file: item.file,
        object: item.object,
        kind: "foreign".to_owned(),
        size: None,
        paths: item.path.into_iter().collect(),
        reason: item.reason,
    }
}

/// What a staged file was to become. `None` for what holds nothing of the
/// source's: plans, records of transfers, and names that the applier had prepared.
fn describe(
    name: &Name,
    size: Option<u64>,
    plans: &Plans,
    replica: &Replica,
) -> Result<Option<Item>, FailoverError> {
    let text = name.to_string();
    let (kind, reason) = match text.as_bytes().first() {
        Some(b'p') if !text.starts_with("plan.") => {
            ("file", "its batch had not arrived as a whole")
        }
        Some(b't') => (
            "partial file",
            "a large file, or the bytes of a patch of one, whose batch had not arrived as a whole",
        ),
        Some(b'a') => (
            "appended bytes",
            "the end of a large file that grew, whose batch had not arrived as a whole",
        ),
        Some(b'l') => ("patch list", "says where the bytes of the transfer of that number go"),
        Some(b'n') => {
            ("directory", "files of a new directory whose batch had not arrived as a whole")
        }
        _ => return Ok(None),
    };
    let object = text.rsplit('.').next().unwrap_or_default().to_owned();
    let id = decode_hex(&object).and_then(|bytes| ObjectId::from_bytes(&bytes));
    let paths = match id {
        Some(id) => plans.paths_of(&id, replica)?,
        None => Vec::new(),
    };
    Ok(Some(Item {
        file: text,
        object,
        kind: kind.to_owned(),
        size,
        paths,
        reason: reason.to_owned(),
    }))
}

/// The bytes that hexadecimal digits stand for, as in the names of staged files.
pub(crate) fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// The plans of batches that were not committed, as far as they arrived.
struct Plans {
    entries: HashMap<ObjectId, Vec<Entry>>,
    /// What they carry of files that grew.
    appended: Vec<(u64, ObjectId, Vec<u8>)>,
}

impl Plans {
    fn read(replica: &Replica) -> Result<Self, FailoverError> {
        let committed = replica.store.standing()?.committed;
        let directory = replica.area.staging(crate::replica::APPLIER_SHARD);
        let names = place::list(directory).map_err(AreaError::system("list", "staging"))?;
        let mut entries: HashMap<ObjectId, Vec<Entry>> = HashMap::new();
        let mut appended = Vec::new();
        for (name, _) in names {
            let text = name.to_string();
            let Some(rest) = text.strip_prefix("plan.") else { continue };
            let batch = rest.split('.').next().and_then(|batch| batch.parse::<u64>().ok());
            let Some(batch) = batch.filter(|batch| *batch > committed.0) else { continue };
            // A plan that a crash has cut short names nothing.
            let Some(ops) = read_plan(&replica.area, &name) else { continue };
            for op in ops {
                match op {
                    Op::Entry { directory, name, new: Some(new), .. } => {
                        entries.entry(new).or_default().push(Entry { directory, name });
                    }
                    Op::Put { object, content: ContentSource::Appended(bytes), .. } => {
                        appended.push((batch, object, bytes.bytes));
                    }
                    _ => {}
                }
            }
        }
        Ok(Self { entries, appended })
    }

    /// Makes staged files of what plans carry, to be set aside as others are. What finds no
    /// place is lost, and is no reason not to fail over.
    fn stage_appended(&self, replica: &Replica) {
        let directory = replica.area.staging(crate::replica::APPLIER_SHARD);
        for (batch, object, bytes) in &self.appended {
            let digits = object.to_file_name();
            let digits = &digits[..digits.len().min(Stager::OBJECT_DIGITS)];
            let name = Name::new(format!("a{batch}.0.{digits}").as_bytes())
                .unwrap_or_else(|_| unreachable!("under 255 bytes, no slash"));
            // Of an attempt before this one.
            let _ = place::unlink(directory, &name);
            let written = place::create_file(directory, &name)
                .and_then(|file| place::write_at(&file, bytes, 0));
            if let Err(error) = written {
                tracing::warn!(%object, %error, "what was appended cannot be set aside");
                let _ = place::unlink(directory, &name);
            }
        }
    }

    /// The paths an object was to have, or has.
    fn paths_of(&self, object: &ObjectId, replica: &Replica) -> Result<Vec<String>, FailoverError> {
        let mut paths = Vec::new();
        for entry in self.entries.get(object).into_iter().flatten() {
            paths.extend(self.path(entry, replica)?);
        }
        if paths.is_empty() {
            paths.extend(path_of(&*replica.store, object)?.map(|names| join(&names)));
        }
        Ok(paths)
    }

    fn path(&self, entry: &Entry, replica: &Replica) -> Result<Option<String>, FailoverError> {
        let mut names = vec![entry.name.clone()];
        let mut at = &entry.directory;
        for _ in 0..PATH_DEPTH {
            match self.entries.get(at).and_then(|entries| entries.first()) {
                Some(above) => {
                    names.push(above.name.clone());
                    at = &above.directory;
                }
                None => {
                    let above = path_of(&*replica.store, at)?;
                    return Ok(above.map(|mut path| {
                        path.extend(names.into_iter().rev());
                        join(&path)
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Up to 1000 paths that were about to change.
    fn paths(&self, replica: &Replica) -> Vec<String> {
        let entries = self.entries.values().flatten();
        entries.filter_map(|entry| self.path(entry, replica).ok().flatten()).take(1000).collect()
    }
}

fn read_plan(area: &Area, name: &Name) -> Option<Vec<Op>> {
    let directory = area.staging(crate::replica::APPLIER_SHARD);
    let file = place::open_file(directory, name, rustix::fs::OFlags::RDONLY).ok()?;
    let size = usize::try_from(stat::of_fd(&file).ok()?.size).ok()?;
    let mut record = vec![0; size.min(codec::DECODE_LIMIT)];
    let read = place::read_at(&file, &mut record, 0).ok()?;
    codec::decode_record(&record[..read]).ok()
}

fn put_back(
    tree: &mut Tree,
    record: &Record,
    warnings: &mut Vec<String>,
) -> Result<(), FailoverError> {
    tree.learn(&[]);
    record.hints.iter().for_each(|(object, place)| tree.hint(object, place));
    for (from, to) in &record.put_back {
        match tree.rename(from, to, false)? {
            Outcome::Done | Outcome::Missing => {}
            // Cannot be: nobody else writes. It is kept all the same.
            Outcome::Occupied | Outcome::NotEmpty => {
                let lost = Place { within: Within::LostAndFound, name: from.name.clone() };
                tree.rename(from, &lost, false)?;
                warnings.push(format!("{} could not be put back", to.name));
            }
        }
    }
    Ok(())
}

/// Moves what is to be moved and writes the manifest; the directory's name, if
/// there is one.
fn set_aside(
    replica: &Replica,
    tree: &mut Tree,
    record: &Record,
) -> Result<Option<String>, FailoverError> {
    if record.moves.is_empty() && record.already.is_empty() {
        return Ok(None);
    }
    let (name, directory) = replica.area.lost_and_found()?;
    for (from, item) in &record.moves {
        let file = Name::new(item.file.as_bytes()).unwrap_or_else(|_| from.name.clone());
        let to = Place { within: Within::LostAndFound, name: file };
        // Missing: moved by an earlier attempt.
        tree.rename(from, &to, false)?;
    }
    let manifest = Manifest {
        version: 1,
        source_file_system_id: record.config.source.clone(),
        destination_file_system_id: record.config.destination.clone(),
        time: record.time,
        last_replicated: record.report.last_replicated,
        items: record
            .already
            .iter()
            .chain(record.moves.iter().map(|(_, item)| item))
            .cloned()
            .collect(),
    };
    let path = PathBuf::from(replicator_common::sys::proc_path((*directory).as_fd()));
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| StateFileError::io("write", &path)(error.into()))?;
    crashsafe::replace(&path.join(MANIFEST), &text)?;
    Ok(Some(name.to_string()))
}

/// Removes the configuration first: without it the rest is only litter. The
/// record goes last: it says that the litter is ours to remove.
fn forget(directory: &Path) -> Result<(), FailoverError> {
    Config::remove(directory)?;
    Ok(clear(directory)?)
}

fn clear(directory: &Path) -> Result<(), StateFileError> {
    // What ends in .new was being written when somebody died.
    for name in ["store.redb", "config.new", "failover.new"] {
        crashsafe::remove(&directory.join(name))?;
    }
    reserve::give_back(directory);
    crashsafe::remove(&directory.join(RECORD_FILE))?;
    // What else stands there is not ours to delete.
    let _ = std::fs::remove_dir(directory);
    Ok(())
}

/// Removes what a failover that was interrupted at its very end has left of a
/// directory without a configuration.
pub(crate) fn sweep(directory: &Path) -> Result<(), StateFileError> {
    if begun(directory) {
        return clear(directory);
    }
    // Only when it is empty.
    let _ = std::fs::remove_dir(directory);
    Ok(())
}

/// Whether a failover of this replica was begun.
pub fn begun(directory: &Path) -> bool {
    directory.join(RECORD_FILE).exists()
}

/// Fails over without a daemon: the configuration of `source`, or the only one.
pub fn offline(
    state_directory: &Path,
    source: Option<&FileSystemId>,
) -> Result<FailoverReport, FailoverError> {
    let _lock = crate::state::take(state_directory)?;
    let mut found: Vec<_> = crate::state::replicas(state_directory)?
        .into_iter()
        .filter(|(_, config)| source.is_none_or(|id| *id == config.source))
        .collect();
    if found.len() > 1 {
        let ids = found.iter().map(|(_, config)| config.source.to_string()).collect();
        return Err(FailoverError::Several(ids));
    }
    let (directory, config) =
        found.pop().ok_or_else(|| FailoverError::NotFound(source.cloned()))?;
    open_and_run(&directory, config)
}

/// Opens a replica only to fail over; also ends a failover that was interrupted.
pub fn open_and_run(directory: &Path, config: Config) -> Result<FailoverReport, FailoverError> {
    // Even opening the store writes.
    reserve::give_back(directory);
    if let Some(record) = crashsafe::read::<Record>(&directory.join(RECORD_FILE), &RECORD)?
        && record.released
    {
        finish(directory, &record)?;
        return Ok(record.report);
    }
    let replica = Replica::open(directory, config, ReplicaOptions::default())?;
    let mut tree = Tree::new(replica.area.clone(), replica.abilities.handles);
    run(&replica, &mut tree)
}
