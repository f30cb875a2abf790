//! A FUSE file system of one file, as much of the protocol as a loop device over
//! that file needs. (A crate for it would bring a dozen others; libfuse would have
//! to be installed. The messages are plain numbers in native order, see
//! `linux/fuse.h`.)
//!
//! Requests are answered one after the other. The file is opened for direct I/O
//! and the kernel's write-back cache is off: a write is here when it returns.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountFlags;

/// The file's name.
pub const NAME: &str = "file";

/// The protocol's version; the kernel knows how to speak to an older one.
const VERSION: (u32, u32) = (7, 31);
/// Bytes that come with one write at most; more needs to be negotiated.
const MAX_WRITE: usize = 128 << 10;
/// A request has a header, what its kind needs, and data.
const BUFFER: usize = MAX_WRITE + (8 << 10);
const HEADER: usize = 40;
/// What precedes the data of a write.
const WRITE_HEADER: usize = 40;
const ROOT: u64 = 1;
const INODE: u64 = 2;
/// The kernel may believe for this long, in seconds, that the file is there.
const FOREVER: u64 = 1 << 20;
const BIG_WRITES: u32 = 1 << 5;
const DIRECT_IO: u32 = 1;

/// The kinds of request that are answered with more than "no such call".
mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// What the file holds. It is asked for nothing behind its end.
pub trait OneFile {
    /// `size` bytes from `offset`.
    fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>>;
    /// Other bytes from `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// What was written before is to be durable.
    fn flush(&self) -> io::Result<()>;
}

/// The kernel's end of the file system.
#[derive(Debug)]
pub struct Device {
    device: File,
    size: u64,
}

impl Device {
    /// Mounts at `directory` a file system whose file has `size` bytes, always.
    pub fn mount(directory: &Path, size: u64) -> io::Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = CString::new(options)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("lossy-disk", directory, "fuse", flags, Some(options.as_c_str()))?;
        Ok(Self { device, size })
    }

    /// Answers until the file system is unmounted.
    pub fn serve(&self, file: &impl OneFile) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = match (&self.device).read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                    return Ok(());
                }
                // The one who asked has gone.
                Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let request = &buffer[..length];
            if let Some(answer) = self.answer(file, request) {
                self.reply(u64_at(request, 8), answer)?;
            }
        }
    }

    fn reply(&self, unique: u64, answer: io::Result<Vec<u8>>) -> io::Result<()> {
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()), Vec::new()),
        };
        let mut message = Message::default();
        message.u32(16 + body.len() as u32).u32(error as u32).u64(unique);
        message.0.extend(body);
        match (&self.device).write(&message.0) {
            // The one who asked has gone.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(()),
            written => written.map(drop),
        }
    }

    /// `None` for what wants no answer.
    fn answer(&self, file: &impl OneFile, request: &[u8]) -> Option<io::Result<Vec<u8>>> {
        let (code, inode) = (u32_at(request, 4), u64_at(request, 16));
        let body = &request[HEADER..];
        Some(match code {
            opcode::INIT => Ok(hello()),
            opcode::LOOKUP if body == [NAME.as_bytes(), b"\0"].concat() => Ok(self.entry()),
            opcode::LOOKUP => Err(Errno::NOENT.into()),
            opcode::GETATTR => Ok(self.attributes_for_now(inode)),
            opcode::OPEN => Ok(Message::default().u64(0).u32(DIRECT_IO).u32(0).take()),
            opcode::READ => self.read(file, body),
            opcode::WRITE => self.write(file, body),
            opcode::FSYNC => file.flush().map(|()| Vec::new()),
            opcode::RELEASE | opcode::DESTROY => Ok(Vec::new()),
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return None,
            _ => Err(Errno::NOSYS.into()),
        })
    }

    fn read(&self, file: &impl OneFile, body: &[u8]) -> io::Result<Vec<u8>> {
        let (offset, size) = (u64_at(body, 8), u64::from(u32_at(body, 16)));
        let size = size.min(self.size.saturating_sub(offset));
        file.read(offset, size as usize)
    }

    fn write(&self, file: &impl OneFile, body: &[u8]) -> io::Result<Vec<u8>> {
        let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
        if offset.saturating_add(u64::from(size)) > self.size {
            return Err(Errno::NOSPC.into());
        }
        file.write(offset, &body[WRITE_HEADER..][..size as usize])?;
        Ok(Message::default().u32(size).u32(0).take())
    }

    fn entry(&self) -> Vec<u8> {
        let mut message = Message::default();
        message.u64(INODE).u64(0).u64(FOREVER).u64(FOREVER).u32(0).u32(0);
        self.attributes(INODE, &mut message);
        message.take()
    }

    fn attributes_for_now(&self, inode: u64) -> Vec<u8> {
        let mut message = Message::default();
        message.u64(FOREVER).u32(0).u32(0);
        self.attributes(inode, &mut message);
        message.take()
    }

    fn attributes(&self, inode: u64, message: &mut Message) {
        let mode = if inode == ROOT { 0o40_700 } else { 0o100_600 };
        message.u64(inode).u64(self.size).u64(self.size / 512);
        // Times: seconds of three, then what is below a second.
        message.u64(0).u64(0).u64(0).u32(0).u32(0).u32(0);
        // Mode, links, user, group, device, block size, flags.
        message.u32(mode).u32(1).u32(0).u32(0).u32(0).u32(4096).u32(0);
    }
}

/// The answer to the kernel's greeting.
fn hello() -> Vec<u8> {
    let mut message = Message::default();
    // No read-ahead; how many requests wait in the background is left to the kernel.
    message.u32(VERSION.0).u32(VERSION.1).u32(0).u32(BIG_WRITES).u32(0).u32(MAX_WRITE as u32);
    // Time stamps count nanoseconds; the rest is of no use here.
    message.u32(1);
    message.0.resize(64, 0);
    message.take()
}

#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
