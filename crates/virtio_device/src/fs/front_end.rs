// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The conversation with the server: one request at a time, each with its answer, within a deadline.
//!
//! Not the `vhost` crate's front end: its sends and receives repeat for as long as the socket says "again", so no
//! timeout on the socket ends them, and a server that stops reading would stop this process.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use virtio_wire::vhost_user::{self, Confirmation, HEADER_BYTES, Request};

/// How long one conversation may take: going live, or stopping. The guest, and the devices of the same I/O thread, wait
/// for it; a server that is well answers in less than a millisecond.
const DEADLINE: Duration = Duration::from_secs(2);

/// The connection to the server.
pub(super) struct FrontEnd {
    socket: Arc<UnixStream>,
    until: Instant,
}

impl FrontEnd {
    pub(super) fn new(socket: Arc<UnixStream>) -> Self {
        Self {
            socket,
            until: Instant::now(),
        }
    }

    /// From now on the deadline runs.
    pub(super) fn begin(&mut self) {
        let now = Instant::now();
        self.until = now.checked_add(DEADLINE).unwrap_or(now);
    }

    /// Sends a request that has no answer, with a descriptor for some.
    pub(super) fn tell(&mut self, request: Request, payload: &[u8]) -> io::Result<()> {
        self.send(request, payload, &[], Confirmation::None)
    }

    /// Sends a request and waits until the server confirms it.
    pub(super) fn confirm(
        &mut self,
        request: Request,
        payload: &[u8],
        descriptors: &[RawFd],
    ) -> io::Result<()> {
        self.send(request, payload, descriptors, Confirmation::Asked)?;
        match vhost_user::number(self.receive(request)?) {
            0 => Ok(()),
            _ => Err(io::Error::other("the file server refuses a request")),
        }
    }

    /// Asks for a number.
    pub(super) fn ask(&mut self, request: Request) -> io::Result<u64> {
        self.send(request, &[], &[], Confirmation::None)?;
        self.receive(request).map(vhost_user::number)
    }

    /// Stops a queue; its position in the available ring.
    pub(super) fn stop(&mut self, index: u16) -> io::Result<u16> {
        let request = Request::GET_VRING_BASE;
        let payload = vhost_user::vring_state(index, 0);
        self.send(request, &payload, &[], Confirmation::None)?;
        let answer = self.receive(request)?;
        vhost_user::vring_base(index, answer).map_err(invalid)
    }

    fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        descriptors: &[RawFd],
        confirmation: Confirmation,
    ) -> io::Result<()> {
        let bytes = vhost_user::request(request, payload, confirmation).map_err(invalid)?;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let mut rest: &[u8] = &bytes;
        let mut rights = descriptors;
        while !rest.is_empty() {
            let control = [ControlMessage::ScmRights(rights)];
            let control = if rights.is_empty() { &[][..] } else { &control };
            let fd = self.socket.as_raw_fd();
            match sendmsg::<()>(fd, &[IoSlice::new(rest)], control, flags, None) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    rights = &[];
                }
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The payload of the answer to `request`. Descriptors that come with it are the kernel's to close.
    fn receive(&mut self, request: Request) -> io::Result<[u8; 8]> {
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header)?;
        vhost_user::check_reply(request, header).map_err(invalid)?;
        let mut payload = [0; 8];
        self.fill(&mut payload)?;
        Ok(payload)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        while !rest.is_empty() {
            match recv(self.socket.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait(&self, event: PollFlags) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Rounded up, so that it does not wait for no time again and again.
        let timeout = left.saturating_add(Duration::from_millis(1));
        let timeout = PollTimeout::try_from(timeout).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(self.socket.as_fd(), event)], timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn invalid(error: virtio_wire::WireError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
