// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Messages with descriptors over a SOCK_SEQPACKET socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;

use super::{MAX_DESCRIPTORS, MAX_MESSAGE_BYTES};

/// One end of the control socket. Messages are sent and received whole, so several threads may send.
#[derive(Debug)]
pub struct ControlSocket {
    fd: OwnedFd,
}

/// A message, or the end.
#[derive(Debug)]
pub enum Received {
    /// Bytes and the descriptors that came with them.
    Message(Vec<u8>, Vec<OwnedFd>),
    /// The other side has closed its end.
    Closed,
}

impl ControlSocket {
    /// Two connected ends, close-on-exec.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Takes over an end.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Gives the end up.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends `message` with `descriptors`; with `MSG_DONTWAIT` among `flags` it fails rather than wait.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] above a cap; otherwise the socket's.
    pub fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE_BYTES || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights };
        let iov = [IoSlice::new(&bytes)];
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(self.fd.as_raw_fd(), &iov, control, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives one message; waits for it unless `MSG_DONTWAIT` is among `flags`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if it is above a cap; otherwise the socket's.
    pub fn receive(&self, flags: MsgFlags) -> io::Result<Received> {
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let (length, truncated, descriptors) = loop {
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Ok(received) => {
                    let mut descriptors = Vec::new();
                    for message in received.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(fds) = message {
                            descriptors.extend(fds.into_iter().map(own));
                        }
                    }
                    let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
                    break (received.bytes, received.flags.intersects(cut), descriptors);
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if truncated {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if length == 0 {
            return Ok(Received::Closed);
        }
        bytes.truncate(length);
        bytes.shrink_to_fit();
        Ok(Received::Message(bytes, descriptors))
    }
}

#[expect(unsafe_code, reason = "taking over descriptors that the kernel made")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just put this descriptor into our table, and nobody else knows of it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn message_arrives_with_its_descriptors() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let sent = ["a", "b"];
        ours.send(&sent, &[file.as_fd(), file.as_fd()], MsgFlags::empty())
            .unwrap();
        let Received::Message(bytes, descriptors) = theirs.receive(MsgFlags::empty()).unwrap()
        else {
            panic!("closed")
        };
        assert_eq!(bytes, br#"["a","b"]"#);
        assert_eq!(descriptors.len(), 2);
    }

    #[test]
    fn largest_message_passes_and_one_byte_more_does_not() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let largest = "x".repeat(MAX_MESSAGE_BYTES - 2);
        ours.send(&largest, &[], MsgFlags::MSG_DONTWAIT).unwrap();
        let received = theirs.receive(MsgFlags::empty()).unwrap();
        assert!(
            matches!(received, Received::Message(bytes, _) if bytes.len() == MAX_MESSAGE_BYTES)
        );
        let error = ours
            .send(&format!("{largest}x"), &[], MsgFlags::MSG_DONTWAIT)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn oversized_message_of_a_hostile_peer_is_an_error_and_leaks_nothing() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let bytes = vec![b' '; MAX_MESSAGE_BYTES + 1];
        nix::sys::socket::send(ours.as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT).unwrap();
        let error = theirs.receive(MsgFlags::empty()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn closed_peer_is_the_end() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        drop(ours);
        assert!(matches!(
            theirs.receive(MsgFlags::empty()).unwrap(),
            Received::Closed
        ));
    }
}
