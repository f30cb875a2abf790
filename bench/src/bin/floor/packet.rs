//! What travels from a reader to a writer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, ensure};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use replicator_common::codec;
use serde::{Deserialize, Serialize};

/// What the body begins at a multiple of in memory, for writes past the page cache.
const PAGE: usize = 4096;
/// Lengths of header and body, which stand before the sealed part.
const FRAMING: usize = 8;
/// Bytes of a tag.
const TAG: usize = 16;

/// Mode, owner, group, and time of the last change.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct State {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
}

/// An entry of a directory.
#[derive(Serialize, Deserialize)]
pub struct Item {
    pub name: Vec<u8>,
    pub state: State,
    pub what: What,
    pub hash: [u8; 32],
}

#[derive(Serialize, Deserialize)]
pub enum What {
    /// All of a file: so many bytes of the body.
    File(u32),
    /// A part of a file, which is all of the body.
    Part { offset: u64, last: bool },
    /// A link to what the body says, so many bytes of it.
    Symlink(u32),
}

/// Things in one directory; their bytes are in the body.
#[derive(Serialize, Deserialize)]
pub struct Header {
    pub directory: Vec<u8>,
    pub state: State,
    pub items: Vec<Item>,
}

/// A packet in memory: framing, header, padding, body, tag.
pub struct Packet {
    memory: Vec<u8>,
    from: usize,
    header: usize,
    body: usize,
}

impl Packet {
    /// Room for a packet whose body has at most so many bytes.
    pub fn with_room(bytes: usize) -> Self {
        let memory = vec![0; bytes + 64 * PAGE];
        let from = memory.as_ptr().align_offset(PAGE);
        Self { memory, from, header: 0, body: 0 }
    }

    /// Where the body begins: behind room for the header, which comes last.
    const fn start(header: usize) -> usize {
        (FRAMING + header).next_multiple_of(PAGE)
    }

    /// Puts the header before the body, seals both, and writes them.
    pub fn send(
        &mut self,
        (header, body): (&Header, &[u8]),
        key: &Key,
        to: &mut UnixStream,
    ) -> Result<()> {
        let header = codec::encode(header)?;
        let start = self.from + Self::start(header.len());
        let end = start + body.len();
        self.memory.resize(self.memory.len().max(end + TAG), 0);
        let lengths = [header.len() as u32, body.len() as u32];
        self.memory[self.from..self.from + 4].copy_from_slice(&lengths[0].to_le_bytes());
        self.memory[self.from + 4..self.from + 8].copy_from_slice(&lengths[1].to_le_bytes());
        let head = self.from + FRAMING;
        self.memory[head..head + header.len()].copy_from_slice(&header);
        self.memory[start..end].copy_from_slice(body);
        let tag = key.seal(&mut self.memory[head..end])?;
        self.memory[end..end + TAG].copy_from_slice(&tag);
        Ok(to.write_all(&self.memory[self.from..end + TAG])?)
    }

    /// Reads and opens the next; `None` at the end.
    pub fn receive(&mut self, key: &Key, from: &mut UnixStream) -> Result<Option<Header>> {
        let head = self.from + FRAMING;
        let framing = &mut self.memory[self.from..head];
        match from.read(&mut framing[..1])? {
            0 => return Ok(None),
            _ => from.read_exact(&mut framing[1..])?,
        }
        let length = |at: usize| {
            framing[at..at + 4].try_into().map(u32::from_le_bytes).unwrap_or_default() as usize
        };
        (self.header, self.body) = (length(0), length(4));
        let end = self.from + Self::start(self.header) + self.body + TAG;
        ensure!(end <= self.memory.len(), "a packet that is too long");
        from.read_exact(&mut self.memory[head..end])?;
        key.open(&mut self.memory[head..end])?;
        codec::decode(&self.memory[head..head + self.header]).map(Some).context("a header")
    }

    /// The body of what was received: its address is a multiple of a page's size.
    pub fn body(&self) -> &[u8] {
        let start = self.from + Self::start(self.header);
        &self.memory[start..start + self.body]
    }
}

/// Seals on one side what the other opens. (Both sides are this process, so a number
/// used twice tells nobody anything.)
pub struct Key(LessSafeKey);

impl Key {
    pub fn new() -> Result<Self> {
        let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(|_| anyhow!("no key"))?;
        Ok(Self(LessSafeKey::new(key)))
    }

    fn seal(&self, bytes: &mut [u8]) -> Result<[u8; TAG]> {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::empty(), bytes);
        let tag = tag.map_err(|_| anyhow!("cannot be sealed"))?;
        Ok(tag.as_ref().try_into()?)
    }

    fn open(&self, bytes: &mut [u8]) -> Result<()> {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let opened = self.0.open_in_place(nonce, Aad::empty(), bytes);
        opened.map(drop).map_err(|_| anyhow!("cannot be opened"))
    }
}
