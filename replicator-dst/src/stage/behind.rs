//! A thread that writes what a stager hands it, and gives the memory back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, SendError, Sender, unbounded};
use rustix::io::Errno;

use super::direct::{Files, Room};

/// What became of a room.
type Written = (Room, Result<(), Errno>);

/// The thread of one file. When dropped, it has ended, with all written that it was handed.
pub(super) struct Behind {
    rooms: Option<Sender<Room>>,
    written: Receiver<Written>,
    /// Where those begin that it has, in the order in which it gives them back.
    has: VecDeque<u64>,
    thread: Option<JoinHandle<()>>,
}

impl Behind {
    /// For these files.
    pub(super) fn start(files: Arc<Files>) -> std::io::Result<Self> {
        // Nobody waits to hand a room over: who has them makes no more than it may.
        let (rooms, queue) = unbounded::<Room>();
        let (done, written) = unbounded();
        let thread = std::thread::Builder::new().name("write-behind".to_owned());
        let thread = thread.spawn(move || {
            for room in queue {
                let result = files.write(&room);
                if done.send((room, result)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { rooms: Some(rooms), written, has: VecDeque::new(), thread: Some(thread) })
    }

    /// Where the first begins that is not known to be written.
    pub(super) fn first(&self) -> Option<u64> {
        self.has.front().copied()
    }

    /// Whether there is anything to wait for.
    pub(super) fn is_busy(&self) -> bool {
        !self.has.is_empty()
    }

    /// Takes a room to be written; gives it back when the thread is gone.
    pub(super) fn write(&mut self, room: Room) -> Option<Room> {
        let at = room.at();
        let Some(rooms) = &self.rooms else { return Some(room) };
        match rooms.send(room) {
            Ok(()) => {
                self.has.push_back(at);
                None
            }
            Err(SendError(room)) => Some(room),
        }
    }

    /// One that it is done with, if there is one.
    pub(super) fn written(&mut self) -> Option<Written> {
        let written = self.written.try_recv().ok()?;
        self.has.pop_front();
        Some(written)
    }

    /// Waits for the next one; there is one.
    ///
    /// # Errors
    /// `EIO` when the thread is gone, and what it had with it.
    pub(super) fn wait(&mut self) -> Result<Written, Errno> {
        let written = self.written.recv().map_err(|_| Errno::IO)?;
        self.has.pop_front();
        Ok(written)
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.rooms = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
