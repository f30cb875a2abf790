//! A scripted source that speaks the wire format over loopback.

#![allow(clippy::unwrap_used, dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use replicator_common::control::Control;
use replicator_common::id::{
    BatchId, BatchNonce, Edition, FileSystemId, Incarnation, ObjectId, Seq, SessionId, TransferId,
};
use replicator_common::name::Name;
use replicator_common::net::enrol::{self, EnrolRequest, Enrolled};
use replicator_common::net::frame::{FrameReader, FrameWriter};
use replicator_common::net::identity::Identity;
use replicator_common::net::quic;
use replicator_common::net::token::Token;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::status::{ReplicationStatus, Status};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ALPN, BatchHeader, ContentSource, DataFrame, DestinationHello, DestinationMessage, Extent,
    Hash, KeptObject, Op, PackRun, PackedObject, Piece, Refusal, SourceHello, SourceMessage,
};
use replicator_dst::replica::{Hook, ReplicaOptions};
use replicator_dst::service::{DestinationOptions, DestinationService};

pub fn id(n: u8) -> ObjectId {
    ObjectId::new(1, &[n, 0, 0, 0]).unwrap()
}

pub const ROOT: u8 = 0;

/// A piece of a transfer, with its bytes if it is data.
pub type Part = (Piece, Vec<u8>);

pub fn data(bytes: impl Into<Vec<u8>>) -> Part {
    let bytes = bytes.into();
    (Piece::Data { hash: Hash::of(&bytes), length: bytes.len() as u32 }, bytes)
}

pub fn plain(piece: Piece) -> Part {
    (piece, Vec::new())
}

pub fn pieces(transfer: TransferId, parts: Vec<Part>) -> DataFrame<'static> {
    let (pieces, bytes): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    DataFrame::TransferPieces { transfer, pieces, data: bytes.concat().into() }
}

pub fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

pub fn state(kind: Kind, mode: u32, size: u64) -> ObjectState {
    let attributes = Attributes {
        mode,
        uid: 1234,
        gid: 4321,
        mtime: Timestamp(1_600_000_000_123_456_789),
        xattrs: Vec::new(),
    };
    ObjectState { kind, attributes, size, rdev: 0 }
}

/// A small file as it travels.
#[derive(Clone)]
pub struct Pack {
    pub packed: PackedObject,
    pub bytes: Vec<u8>,
}

impl Pack {
    pub fn new(object: ObjectId, version: u32, state: ObjectState, bytes: Vec<u8>) -> Self {
        let extents = vec![Extent { offset: 0, length: bytes.len() as u64 }];
        let hash = Hash::of(&bytes);
        Self { packed: PackedObject { object, version, state, extents, hash }, bytes }
    }
}

/// A frame of such files, the first of them with places.
pub fn frame_of(batch: BatchId, runs: Vec<PackRun>, packs: &[Pack]) -> DataFrame<'static> {
    let objects = packs.iter().map(|pack| pack.packed.clone()).collect();
    let data = packs.iter().map(|pack| &pack.bytes[..]).collect::<Vec<_>>().concat().into();
    match runs.is_empty() {
        true => DataFrame::Pack { batch, objects, data },
        false => DataFrame::PackPlaced { batch, runs, objects, data },
    }
}

/// A batch in the making.
#[derive(Clone, Default)]
pub struct Batch {
    pub ops: Vec<Op>,
    pub packs: Vec<Pack>,
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn root(mut self) -> Self {
        self.ops.push(Op::Root { object: id(ROOT) });
        self.directory(ROOT)
    }

    /// Restates a directory's attributes.
    pub fn directory(mut self, n: u8) -> Self {
        self.ops.push(Op::Put {
            object: id(n),
            state: state(Kind::Directory, 0o755, 0),
            content: ContentSource::Unchanged,
            new: false,
            links: 1,
        });
        self
    }

    pub fn mkdir(mut self, n: u8, parent: u8, text: &str) -> Self {
        self.ops.push(Op::Put {
            object: id(n),
            state: state(Kind::Directory, 0o750, 0),
            content: ContentSource::Unchanged,
            new: true,
            links: 1,
        });
        self.entry(parent, text, None, Some(n))
    }

    pub fn entry(mut self, parent: u8, text: &str, old: Option<u8>, new: Option<u8>) -> Self {
        self.ops.push(Op::Entry {
            directory: id(parent),
            name: name(text),
            old: old.map(id),
            new: new.map(id),
        });
        self
    }

    pub fn file(self, n: u8, parent: u8, text: &str, content: &[u8]) -> Self {
        self.content(n, content, true, 1).entry(parent, text, None, Some(n))
    }

    pub fn content(mut self, n: u8, content: &[u8], new: bool, links: u32) -> Self {
        let state = state(Kind::File, 0o640, content.len() as u64);
        self.ops.push(Op::Put {
            object: id(n),
            state: state.clone(),
            content: ContentSource::Packed { version: 1 },
            new,
            links,
        });
        self.packs.push(Pack::new(id(n), 1, state, content.to_vec()));
        self
    }

    /// Its packs, with places for those that are new in directories that are.
    pub fn frame(&self, batch: BatchId) -> DataFrame<'static> {
        let new = |of: &ObjectId| {
            let puts = |op: &Op| matches!(op, Op::Put { object, new: true, .. } if object == of);
            self.ops.iter().any(puts)
        };
        let spot = |of: &ObjectId| {
            self.ops.iter().find_map(|op| match op {
                Op::Entry { directory, name, new: Some(object), .. }
                    if object == of && new(of) && new(directory) =>
                {
                    Some(PackRun { directory: directory.clone(), names: vec![name.clone()] })
                }
                _ => None,
            })
        };
        let (placed, others): (Vec<_>, Vec<_>) =
            self.packs.iter().cloned().partition(|pack| spot(&pack.packed.object).is_some());
        let runs: Vec<_> = placed.iter().filter_map(|pack| spot(&pack.packed.object)).collect();
        let all: Vec<Pack> = placed.into_iter().chain(others).collect();
        frame_of(batch, runs, &all)
    }

    /// The same content, read once more: under new version numbers.
    pub fn reread(mut self) -> Self {
        let mut next = std::collections::HashMap::new();
        for pack in &mut self.packs {
            pack.packed.version += 1;
            next.insert(pack.packed.object.clone(), pack.packed.version);
        }
        for op in &mut self.ops {
            if let Op::Put { object, content: ContentSource::Packed { version }, .. } = op {
                *version = next[object];
            }
        }
        self
    }

    pub fn op(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }
}

/// Where a destination's directories are.
pub struct Base(tempfile::TempDir);

impl Base {
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Replicas stay read-only when their destination stops: by mounts that nobody else
/// would take away.
impl Drop for Base {
    fn drop(&mut self) {
        while replicator_common::sys::mount::detach(&self.path().join("replica")).is_ok() {}
    }
}

/// A destination and its directories.
pub struct World {
    pub base: Base,
    pub replica: PathBuf,
    pub state: PathBuf,
    pub source: FileSystemId,
    pub identity: Identity,
    pub token: Option<Token>,
    pub enrolled: Option<Enrolled>,
    /// Objects are to be found by path.
    pub by_path: bool,
    /// The last session: the next one is the same source's.
    pub last: Mutex<Option<SessionId>>,
    /// The source remembers other batches by the numbers of those that it sent:
    /// added to their nonces.
    pub rebuilt: u64,
}

impl World {
    pub fn new() -> Self {
        let base = Base(tempfile::tempdir_in("/var/tmp").unwrap());
        let replica = base.path().join("replica");
        let state = base.path().join("state");
        Self {
            base,
            replica,
            state,
            source: FileSystemId::random(),
            identity: Identity::ephemeral().unwrap(),
            token: None,
            enrolled: None,
            by_path: false,
            last: Mutex::default(),
            rebuilt: 0,
        }
    }

    /// Opens the service; waits for an earlier one of this process to be gone.
    pub async fn open(&self, hook: Option<Hook>) -> DestinationService {
        for _ in 0..200 {
            let service = self.open_once(hook.clone()).await;
            // The one before may still hold a store.
            let broken = |status: &Status| status.status == ReplicationStatus::Error;
            if !service.list().iter().any(broken) {
                return service;
            }
            service.shutdown().await;
            drop(service);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("a replica cannot be opened")
    }

    /// The same, whatever becomes of its replicas.
    pub async fn open_once(&self, hook: Option<Hook>) -> DestinationService {
        let options = DestinationOptions {
            state_dir: self.state.clone(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            region: "here".to_owned(),
            hook: None,
            registry: None,
        };
        let replicas = ReplicaOptions { by_path: self.by_path, hook };
        for attempt in 0.. {
            match DestinationService::open_with(options.clone(), replicas.clone()) {
                Ok(service) => return service,
                Err(error) if attempt > 200 => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        unreachable!()
    }

    pub async fn enrol(&mut self, service: &DestinationService, reconcile: bool) {
        let token = service.token(&self.replica, Duration::from_secs(60), reconcile).unwrap();
        let request = EnrolRequest {
            secret: token.secret,
            source: self.source.clone(),
            source_region: "xx-there-2".to_owned(),
            creation_time: Timestamp::now(),
            devices: false,
        };
        let enrolled = enrol::enrol(&self.identity, &token, &request).await.unwrap();
        self.enrolled = Some(enrolled);
        self.token = Some(token);
    }

    pub async fn connect(&self, service: &DestinationService, last: u64) -> FakeSource {
        self.try_connect(service, last).await.unwrap_or_else(|refusal| panic!("{refusal}"))
    }

    pub async fn try_connect(
        &self,
        service: &DestinationService,
        last: u64,
    ) -> Result<FakeSource, Refusal> {
        let address = service.local_address().unwrap();
        match self.dial(address, last).await {
            Ok(source) => Ok(source),
            Err(Some(refusal)) => Err(refusal),
            Err(None) => panic!("the destination ended the session"),
        }
    }

    /// A destination's service on this state directory.
    pub fn serve(state: &Path) -> Result<DestinationService, String> {
        let options = DestinationOptions {
            state_dir: state.to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            region: "here".to_owned(),
            hook: None,
            registry: None,
        };
        let replicas = ReplicaOptions::default();
        DestinationService::open_with(options, replicas).map_err(|error| error.to_string())
    }

    /// Opens a session. An error: the refusal, or none when the other side is gone.
    pub async fn dial(
        &self,
        address: std::net::SocketAddr,
        last: u64,
    ) -> Result<FakeSource, Option<Refusal>> {
        let fingerprint = self.token.as_ref().unwrap().fingerprint;
        let dialled = quic::dial(&self.identity, &address.to_string(), fingerprint, ALPN).await;
        let connection = dialled.map_err(|_| None)?;
        let (send, receive) = connection.open_bi().await.map_err(|_| None)?;
        let data = FrameWriter::new(connection.open_uni().await.map_err(|_| None)?);
        let mut source = FakeSource {
            connection,
            writer: FrameWriter::new(send),
            reader: FrameReader::new(receive),
            data,
            hello: None,
            kept: Default::default(),
            told: false,
        };
        let edition =
            |batch| Edition { batch: BatchId(batch), nonce: BatchNonce(batch + self.rebuilt) };
        let hello = SourceHello {
            source: self.source.clone(),
            incarnation: Incarnation([7; 16]),
            destination_incarnation: None,
            acknowledged: edition(last),
            pending: vec![edition(last + 1)],
            previous: *self.last.lock().unwrap(),
            time: Timestamp::now(),
        };
        source.writer.write(&SourceMessage::Hello(hello)).await.map_err(|_| None)?;
        match source.heard().await {
            Some(DestinationMessage::Hello(hello)) => {
                *self.last.lock().unwrap() = Some(hello.session);
                source.hello = Some(hello);
            }
            Some(DestinationMessage::Refused(refusal)) => return Err(Some(refusal)),
            Some(other) => panic!("{other:?}"),
            None => return Err(None),
        }
        Ok(source)
    }

    /// The replica as text: path → kind, mode, links, content.
    pub fn tree(&self) -> BTreeMap<String, String> {
        let mut tree = BTreeMap::new();
        walk(&self.replica, &self.replica, &mut tree);
        tree
    }
}

fn walk(root: &Path, at: &Path, tree: &mut BTreeMap<String, String>) {
    use std::os::unix::fs::MetadataExt;
    for entry in std::fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        let text = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if text.starts_with(".replicator-") {
            continue;
        }
        let meta = path.symlink_metadata().unwrap();
        let what = if meta.is_dir() {
            format!("dir {:o} {}", meta.mode() & 0o7777, meta.uid())
        } else if meta.is_symlink() {
            format!("link {}", std::fs::read_link(&path).unwrap().display())
        } else {
            let content = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            format!("file {:o} {} {} {content}", meta.mode() & 0o7777, meta.uid(), meta.nlink())
        };
        tree.insert(text, what);
        if meta.is_dir() {
            walk(root, &path, tree);
        }
    }
}

pub struct FakeSource {
    pub connection: Connection,
    pub writer: FrameWriter<SendStream>,
    pub reader: FrameReader<RecvStream>,
    pub data: FrameWriter<SendStream>,
    pub hello: Option<DestinationHello>,
    /// What the destination said that it has of a session before.
    pub kept: (Vec<KeptObject>, Vec<ObjectId>),
    /// It has said all.
    pub told: bool,
}

impl FakeSource {
    /// The next message that is no report, nor says what was kept.
    pub async fn next(&mut self) -> DestinationMessage {
        loop {
            match self.try_next().await {
                Some(DestinationMessage::Report(_)) => {}
                Some(DestinationMessage::Kept { packed, transfers, last }) => {
                    self.kept.0.extend(packed);
                    self.kept.1.extend(transfers);
                    self.told |= last;
                }
                Some(message) => return message,
                None => panic!("the destination ended the session"),
            }
        }
    }

    /// The next message, reports included; `None` when the session has ended.
    pub async fn heard(&mut self) -> Option<DestinationMessage> {
        self.try_next().await
    }

    /// Waits until the destination has said what was kept.
    pub async fn told(&mut self) -> (Vec<KeptObject>, Vec<ObjectId>) {
        while !self.told {
            match self.try_next().await {
                Some(DestinationMessage::Report(_)) => {}
                Some(DestinationMessage::Kept { packed, transfers, last }) => {
                    self.kept.0.extend(packed);
                    self.kept.1.extend(transfers);
                    self.told = last;
                }
                other => panic!("{other:?}"),
            }
        }
        self.kept.clone()
    }

    async fn try_next(&mut self) -> Option<DestinationMessage> {
        let read = self.reader.read::<DestinationMessage>();
        tokio::time::timeout(Duration::from_secs(20), read).await.expect("in time").ok().flatten()
    }

    pub async fn packs(&mut self, number: u64, packs: &[Pack]) {
        let frame = frame_of(BatchId(number), Vec::new(), packs);
        self.data.write(&frame).await.unwrap();
    }

    pub async fn plan(&mut self, number: u64, ops: &[Op]) {
        let message = SourceMessage::Plan { batch: BatchId(number), ops: ops.to_vec() };
        self.writer.write(&message).await.unwrap();
    }

    fn header(&self, number: u64, batch: &Batch) -> BatchHeader {
        BatchHeader {
            nonce: BatchNonce(number),
            seq: Seq(number),
            watermark: Timestamp(1_700_000_000_000_000_000 + number as i64),
            exact: None,
            packed: batch.packs.len() as u64,
            ops: batch.ops.len() as u64,
            complete: true,
            bytes_changed: 1,
            bytes_shipped: 1,
        }
    }

    pub async fn commit(&mut self, number: u64, batch: &Batch) {
        let header = self.header(number, batch);
        let message = SourceMessage::Commit { batch: BatchId(number), header };
        self.writer.write(&message).await.unwrap();
    }

    pub async fn send(&mut self, number: u64, batch: &Batch) {
        self.try_send(number, batch).await.unwrap();
    }

    /// The same; `None` when the other side is gone.
    pub async fn try_send(&mut self, number: u64, batch: &Batch) -> Option<()> {
        let (number, header) = (BatchId(number), self.header(number, batch));
        if !batch.packs.is_empty() {
            self.data.write(&batch.frame(number)).await.ok()?;
        }
        let plan = SourceMessage::Plan { batch: number, ops: batch.ops.clone() };
        self.writer.write(&plan).await.ok()?;
        self.writer.write(&SourceMessage::Commit { batch: number, header }).await.ok()?;
        Some(())
    }

    /// Sends a batch and waits until it is applied.
    pub async fn apply(&mut self, number: u64, batch: &Batch) {
        self.send(number, batch).await;
        loop {
            match self.next().await {
                DestinationMessage::Applied { batch, .. } if batch.0 == number => return,
                DestinationMessage::Durable { .. } | DestinationMessage::Transferred { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Dies at a point, once.
pub fn once(point: replicator_dst::replica::Point) -> Hook {
    let armed = std::sync::atomic::AtomicBool::new(true);
    Arc::new(move |at| at == point && armed.swap(false, std::sync::atomic::Ordering::SeqCst))
}
