//! A destination that is pinned, and lies. Whatever it says ends at most its own
//! session, with the reason in status; nothing is forgotten because of it, and
//! an honest destination is served afterwards.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connection, RecvStream, SendStream};
use replicator_common::chunk::Chunk;
use replicator_common::control::{Control, CreateRequest, Patience, WatcherChoice};
use replicator_common::id::{
    BatchId, BatchNonce, Edition, FileSystemId, Incarnation, ObjectId, SessionId, TransferId,
};
use replicator_common::name::Name;
use replicator_common::net::enrol::{self, EnrolAnswer, Enrolled};
use replicator_common::net::frame::{Compression, FrameReader, FrameWriter, encode_frame};
use replicator_common::net::identity::{Fingerprint, Identity};
use replicator_common::net::quic::{self, Admission};
use replicator_common::net::tls::Trust;
use replicator_common::net::token::{Secret, Token};
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::status::{Abilities, Status};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    DestinationHello, DestinationMessage, FRAME_MAX, Hash, InventoryContent, InventoryItem,
    Refusal, SourceHello, SourceMessage,
};
use replicator_src::read::sink::Wired;
use replicator_src::service::{SourceOptions, SourceService};
use replicator_src::session::{self, Link, LinkEvent, Remote};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(60);

struct Anybody;

impl Trust for Anybody {
    fn is_pinned(&self, _: &Fingerprint) -> bool {
        true
    }

    fn enrolment_open(&self) -> bool {
        true
    }
}

/// A session with the source, which has said its hello.
struct Called {
    connection: Connection,
    reader: FrameReader<RecvStream>,
    writer: FrameWriter<SendStream>,
    hello: SourceHello,
}

impl Called {
    async fn say(&mut self, message: &DestinationMessage) -> bool {
        self.writer.write(message).await.is_ok()
    }

    /// The answer to its hello.
    async fn greet(&mut self, reconcile: bool, committed: u64) -> bool {
        let abilities = Abilities {
            chown: true,
            xattrs: true,
            privileged_xattrs: true,
            devices: true,
            handles: true,
            links_max: None,
            name_max: None,
        };
        let hello = DestinationHello {
            destination: FileSystemId::random(),
            session: SessionId::random(),
            incarnation: Incarnation([9; 16]),
            committed: Edition { batch: BatchId(committed), nonce: BatchNonce(0) },
            watermark: Timestamp::NEVER,
            reconcile,
            time: Timestamp(i64::MAX),
            echo: self.hello.time,
            received: Timestamp(i64::MIN),
            abilities,
        };
        let kept =
            DestinationMessage::Kept { packed: Vec::new(), transfers: Vec::new(), last: true };
        self.say(&DestinationMessage::Hello(hello)).await && self.say(&kept).await
    }

    /// Takes all batches, and says so.
    async fn behave(mut self) {
        let connection = self.connection.clone();
        tokio::spawn(async move {
            while let Ok(mut stream) = connection.accept_uni().await {
                tokio::spawn(async move {
                    let mut bytes = vec![0; 1 << 16];
                    while let Ok(Some(_)) = stream.read(&mut bytes).await {}
                });
            }
        });
        while let Ok(Some(message)) = self.reader.read::<SourceMessage>().await {
            if let SourceMessage::Commit { batch, .. } = message {
                self.say(&DestinationMessage::Durable { batch }).await;
                let time = Timestamp::now();
                self.say(&DestinationMessage::Applied { batch, time }).await;
            }
        }
    }
}

/// A destination without a replica.
struct Liar {
    runtime: Runtime,
    address: SocketAddr,
    identity: Identity,
    sessions: mpsc::UnboundedReceiver<Called>,
}

impl Liar {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let identity = Identity::ephemeral().unwrap();
        let (called, sessions) = mpsc::unbounded_channel();
        let address = runtime.block_on(async {
            let any = "127.0.0.1:0".parse().unwrap();
            let endpoint = quic::listen(any, &identity, Arc::new(Anybody)).unwrap();
            let address = endpoint.local_addr().unwrap();
            tokio::spawn(async move {
                while let Some(incoming) = endpoint.accept().await {
                    tokio::spawn(answer(incoming, called.clone()));
                }
            });
            address
        });
        Self { runtime, address, identity, sessions }
    }

    fn token(&self) -> Token {
        Token {
            address: self.address.to_string(),
            fingerprint: self.identity.fingerprint(),
            secret: Secret([7; 32]),
        }
    }

    /// The next session that the source opens.
    fn next(&mut self) -> Called {
        let next = async { tokio::time::timeout(PATIENCE, self.sessions.recv()).await };
        self.runtime.block_on(next).expect("the source calls again").unwrap()
    }
}

async fn answer(incoming: quinn::Incoming, called: mpsc::UnboundedSender<Called>) {
    let Ok((connection, admission)) = quic::accept(incoming, &Anybody).await else { return };
    if let Admission::Enrolment(_) = admission {
        let (_, responder) = enrol::receive(&connection).await.unwrap();
        let enrolled = Enrolled {
            destination: FileSystemId::random(),
            region: "xx-there-1".to_owned(),
            path: "/nowhere".to_owned(),
            reconcile: false,
        };
        return responder.answer(&EnrolAnswer::Accepted(enrolled)).await.unwrap();
    }
    let Ok((send, receive)) = connection.accept_bi().await else { return };
    let mut reader = FrameReader::new(receive);
    if let Ok(Some(SourceMessage::Hello(hello))) = reader.read().await {
        let writer = FrameWriter::new(send);
        let _ = called.send(Called { connection, reader, writer, hello });
    }
}

/// Memory is the process's: who measures it, and who uses much, runs alone.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of this process's memory that are in use.
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn start(base: &Path, liar: &Liar) -> Arc<SourceService> {
    let source = base.join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "content").unwrap();
    let service = SourceService::open(SourceOptions::new(base.join("state"))).unwrap();
    let request = CreateRequest {
        source,
        token: liar.token().to_string(),
        devices: false,
        watcher: WatcherChoice::Auto,
    };
    service.create(&request).unwrap();
    service
}

fn status(service: &SourceService) -> Status {
    service.list().remove(0)
}

/// Waits until status says why there is no session.
fn told(service: &SourceService, because: &str) {
    let begin = Instant::now();
    loop {
        let status = status(service);
        let said = status.source.unwrap().link.last_error.unwrap_or_default();
        if said.contains(because) {
            // The next attempt comes at once for somebody who waits.
            let _ =
                service.wait(&status.source_file_system_id, Patience::of(Duration::from_millis(1)));
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{because:?} is not told, but {said:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn item(handle: u8) -> InventoryItem {
    let attributes =
        Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    InventoryItem {
        parent: Some(ObjectId::new(1, &[1]).unwrap()),
        name: Name::new(&[0xa7; 6]).unwrap(),
        handle: ObjectId::new(1, &[handle]).unwrap(),
        state: ObjectState { kind: Kind::File, attributes, size: u64::MAX, rdev: 0 },
        links: u32::MAX,
        content: InventoryContent::None,
    }
}

/// An inventory with a name in it that no [`Name`] can hold.
fn with_name(bad: &[u8; 6]) -> Vec<u8> {
    let message = DestinationMessage::Inventory { items: vec![item(2)], last: false };
    let mut frame = encode_frame(&message, Compression::Never).unwrap();
    let at = frame.windows(bad.len()).position(|window| window == [0xa7; 6]).unwrap();
    frame[at..at + bad.len()].copy_from_slice(bad);
    frame
}

fn frame(message: &DestinationMessage) -> Vec<u8> {
    encode_frame(message, Compression::Never).unwrap()
}

/// What is said after a good hello, and why the session ends for it.
fn lies() -> Vec<(Vec<u8>, &'static str)> {
    let (time, transfer) = (Timestamp(i64::MAX), TransferId(u64::MAX));
    let applied = |batch| frame(&DestinationMessage::Applied { batch: BatchId(batch), time });
    let returned = |batch| {
        let (batch, objects) = (BatchId(batch), Vec::new());
        frame(&DestinationMessage::Returned { batch, objects, last: true })
    };
    let inventory = DestinationMessage::Inventory { items: vec![item(2)], last: true };
    let refusal = Refusal::Protocol("because I say so".to_owned());
    let harmless = [
        DestinationMessage::Transferred { transfer },
        DestinationMessage::TransferRefused { transfer, reason: "no".repeat(1 << 20) },
        DestinationMessage::Clock { sent: time, received: Timestamp(i64::MIN), answered: time },
        DestinationMessage::Clock { sent: Timestamp::NEVER, received: time, answered: time },
        DestinationMessage::Applied { batch: BatchId(0), time },
        DestinationMessage::Refused(refusal),
    ];
    vec![
        ([(FRAME_MAX as u32 + 1).to_le_bytes().as_slice(), &[0]].concat(), "the limit is"),
        ([&[9, 0, 0, 0, 1], u32::MAX.to_le_bytes().as_slice(), &[0; 9]].concat(), "the limit is"),
        ([[7, 0, 0, 0, 0].as_slice(), b"garbage"].concat(), "decode"),
        (vec![1, 0, 0, 0, 0xfe], "unknown flags"),
        (frame(&DestinationMessage::Durable { batch: BatchId(u64::MAX) }), "acknowledges batch"),
        (applied(u64::MAX), "acknowledges batch"),
        (applied(1 << 40), "acknowledges batch"),
        (returned(u64::MAX), "not the oldest"),
        (returned(1 << 40), "not the oldest"),
        (returned(0), "not the oldest"),
        (frame(&inventory), "not asked for"),
        (with_name(b"../../"), "not a valid entry name"),
        (with_name(b"a/b/cd"), "not a valid entry name"),
        (with_name(b"nul\0xx"), "not a valid entry name"),
        (harmless.iter().flat_map(frame).collect(), "because I say so"),
    ]
}

#[test]
fn a_lie_ends_its_session_and_nothing_else() {
    let _alone = alone();
    let base = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut liar = Liar::new();
    let service = start(base.path(), &liar);
    let before = memory();
    for (bytes, because) in lies() {
        let mut session = liar.next();
        let ended = liar.runtime.block_on(async {
            // It learns of the new destination's incarnation, and calls again.
            if session.hello.destination_incarnation.is_none() {
                assert!(session.greet(false, 0).await);
            } else {
                assert!(session.greet(false, session.hello.acknowledged.batch.0).await);
            }
            let _ = session.writer.write_encoded(&bytes).await;
            tokio::time::timeout(PATIENCE, session.connection.closed()).await.is_ok()
        });
        assert!(ended, "{because}: the session goes on");
        told(&service, because);
    }
    // The hello itself.
    let mut session = liar.next();
    liar.runtime.block_on(async {
        session.say(&DestinationMessage::Durable { batch: BatchId(1) }).await;
        session.connection.closed().await;
    });
    told(&service, "out of turn");
    // A past that it cannot have, again and again: it is not believed.
    for committed in [1 << 40, u64::MAX, 7] {
        let mut session = liar.next();
        liar.runtime.block_on(async {
            session.greet(false, committed).await;
            session.connection.closed().await;
        });
    }
    // It says much, of which nothing is kept.
    let mut session = liar.next();
    let reason = "no".repeat(1 << 20);
    let much = DestinationMessage::TransferRefused { transfer: TransferId(9), reason };
    liar.runtime.block_on(async {
        session.greet(false, session.hello.acknowledged.batch.0).await;
        for _ in 0..200 {
            session.say(&much).await;
        }
        session.connection.close(0u32.into(), b"");
    });
    let grown = memory().saturating_sub(before);
    assert!(grown < 300 << 20, "{grown} bytes of memory");

    let mut session = liar.next();
    liar.runtime.spawn(async move {
        session.greet(false, session.hello.acknowledged.batch.0).await;
        session.behave().await;
    });
    let source = status(&service).source_file_system_id;
    service.wait(&source, Patience::of(PATIENCE)).unwrap();
    assert!(status(&service).source.unwrap().counters.batches > 0);
    service.shutdown();
}

/// A list of chunks that has no end, asked for part by part: the source keeps of
/// it what may be of use, and goes on with the list of somebody honest.
#[test]
fn a_list_of_chunks_without_end_costs_no_memory() {
    let _alone = alone();
    const PARTS: usize = 200;
    let base = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut liar = Liar::new();
    let service = start(base.path(), &liar);
    let (mut root, mut file) = (item(1), item(2));
    (root.parent, root.state.kind) = (None, Kind::Directory);
    (file.parent, file.name) = (Some(root.handle.clone()), Name::new(b"file").unwrap());
    let chunk = Chunk { length: 1 << 16, hash: Hash([5; 32]) };
    file.content =
        InventoryContent::Chunks { average: 1 << 16, chunks: vec![chunk; 20_000], more: true };
    let part = |item| frame(&DestinationMessage::Inventory { items: vec![item], last: false });
    let (root, file) = (part(root), part(file));
    let mut session = liar.next();
    let before = memory();
    let taken = liar.runtime.block_on(async {
        session.greet(true, session.hello.acknowledged.batch.0).await;
        let mut taken = 0;
        while taken < PARTS
            && let Ok(Some(message)) = session.reader.read::<SourceMessage>().await
        {
            if !matches!(message, SourceMessage::RequestInventory) {
                continue;
            }
            let part = if taken == 0 { &root } else { &file };
            let _ = session.writer.write_encoded(part).await;
            taken += 1;
        }
        taken
    });
    let grown = memory().saturating_sub(before);
    assert_eq!(taken, PARTS, "{:?}", status(&service).source.unwrap().link.last_error);
    let whole = PARTS * 20_000 * size_of::<Chunk>();
    assert!(grown < whole as u64 / 2, "{grown} bytes of memory for a list of {whole}");
    drop(session);
    service.shutdown();
}

/// The engine is busy: what the destination says waits with the destination.
#[test]
fn what_is_said_and_not_heard_costs_no_memory() {
    let _alone = alone();
    let mut liar = Liar::new();
    let (events, inbox) = crossbeam_channel::unbounded();
    let runtime = Runtime::new().unwrap();
    let link = Link {
        identity: Identity::ephemeral().unwrap(),
        remote: Remote {
            address: liar.address.to_string(),
            fingerprint: liar.identity.fingerprint(),
        },
        wired: Arc::<Wired>::default(),
        hurry: Arc::default(),
        silence: Duration::from_secs(2),
    };
    let hello = || {
        Some(SourceHello {
            source: FileSystemId::random(),
            incarnation: Incarnation([1; 16]),
            destination_incarnation: None,
            acknowledged: Edition::default(),
            pending: Vec::new(),
            previous: None,
            time: Timestamp(0),
        })
    };
    runtime.spawn(session::run(link, hello, events));
    let mut session = liar.next();
    liar.runtime.spawn(async move {
        session.greet(false, 0).await;
        let message = DestinationMessage::Durable { batch: BatchId(0) };
        while session.say(&message).await {}
    });
    let connected = inbox.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(connected, LinkEvent::Connected(_)));
    let begin = Instant::now();
    while inbox.len() < 64 {
        assert!(begin.elapsed() < PATIENCE, "{} messages", inbox.len());
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(inbox.len(), 64);
    // Heard, they make room.
    assert!(inbox.iter().take(1000).all(|event| matches!(event, LinkEvent::Message { .. })));
    drop((connected, inbox));

    // The next one takes the session, and hangs: its host answers, and it does
    // not.
    let (events, inbox) = crossbeam_channel::unbounded();
    let link = Link {
        identity: Identity::ephemeral().unwrap(),
        remote: Remote {
            address: liar.address.to_string(),
            fingerprint: liar.identity.fingerprint(),
        },
        wired: Arc::<Wired>::default(),
        hurry: Arc::default(),
        silence: Duration::from_millis(300),
    };
    runtime.spawn(session::run(link, hello, events));
    let mut session = liar.next();
    liar.runtime.block_on(session.greet(false, 0));
    let connected = inbox.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(connected, LinkEvent::Connected(_)));
    // That nothing was kept belongs to its greeting.
    assert!(matches!(inbox.recv_timeout(PATIENCE).unwrap(), LinkEvent::Message { .. }));
    match inbox.recv_timeout(PATIENCE).unwrap() {
        LinkEvent::Lost { reason, .. } => assert!(reason.contains("hangs"), "{reason}"),
        _ => panic!("it has said nothing"),
    }
}
