//! A UDP socket that hands the kernel no more packets at once than its path takes.
//!
//! quinn hands over up to ten packets of the connection's MTU as one offloaded send.
//! Where they are longer than one send may be (64 KiB) it fails without an error, so
//! large packets need a limit of their own.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// See the module.
#[derive(Debug)]
pub(super) struct Limited {
    socket: Arc<dyn AsyncUdpSocket>,
    /// Packets at once.
    most: usize,
}

impl Limited {
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>, most: usize) -> Self {
        Self { socket, most }
    }
}

impl AsyncUdpSocket for Limited {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments().min(self.most)
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
