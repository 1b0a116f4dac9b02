// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the agent and its child process say to each other, over a pair of connected stream sockets.
//!
//! ```text
//! agent                          helper                         process-to-be
//!   | request, descriptors ------->|
//!   |                              |-- clone3 -------------------->|
//!   |<-- Pid ----------------------| (ends)                        |
//!   | PROCEED ------------------------------------------------->  |  the agent knows the pid before anything can end
//!   |<-- Terminal (with one descriptor, if asked for) ------------ |
//!   |<-- Ready ---------------------------------------------------|
//!   | START --------------------------------------------------->  |  execve; the socket closes
//!   |<-- Failed, at any step --------------------------------------|
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The longest payload of a message: a spec of 16 MiB is far past containerd's own limit for a message (4 MiB).
const MAX_PAYLOAD_LEN: usize = 16 * 1024 * 1024;

/// The most descriptors with one message: a pidfd and three streams.
const MAX_DESCRIPTORS: usize = 4;

/// One byte from the agent: the pid is known, go on.
pub(crate) const PROCEED: u8 = b'P';
/// One byte from the agent: run the program.
pub(crate) const START: u8 = b'S';

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    /// The request, as JSON.
    Request,
    /// The child's pid, four bytes little-endian.
    Pid,
    /// With the terminal's controlling end.
    Terminal,
    /// Everything but the program is in place.
    Ready,
    /// An error's text.
    Failed,
}

const TAGS: [Tag; 5] = [
    Tag::Request,
    Tag::Pid,
    Tag::Terminal,
    Tag::Ready,
    Tag::Failed,
];

/// A message.
pub(crate) struct Message {
    pub(crate) tag: Tag,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message. Without descriptors this needs no system call but `write(2)`, which seccomp profiles allow.
    ///
    /// # Errors
    /// Those of `write(2)` and `sendmsg(2)`.
    pub(crate) fn send(
        &self,
        tag: Tag,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let number = TAGS
            .iter()
            .position(|known| *known == tag)
            .unwrap_or_default();
        let len = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut frame = vec![u8::try_from(number).unwrap_or_default()];
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(payload);
        let sent = if descriptors.is_empty() {
            0
        } else {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            retry_on_intr(|| {
                sendmsg(
                    &self.0,
                    &[IoSlice::new(&frame)],
                    &mut control,
                    SendFlags::NOSIGNAL,
                )
            })?
        };
        self.write_all(frame.get(sent..).unwrap_or_default())
    }

    /// Sends one byte.
    ///
    /// # Errors
    /// Those of `write(2)`.
    pub(crate) fn send_byte(&self, byte: u8) -> io::Result<()> {
        self.write_all(&[byte])
    }

    /// Waits for the byte `expected`; `false` if the other end is gone.
    ///
    /// # Errors
    /// Those of `read(2)`; another byte is `InvalidData`.
    pub(crate) fn wait_for(&self, expected: u8) -> io::Result<bool> {
        let mut byte = [0_u8];
        match retry_on_intr(|| rustix::io::read(&self.0, &mut byte)) {
            Ok(0) | Err(Errno::CONNRESET) => Ok(false),
            Ok(_) if byte == [expected] => Ok(true),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next message; `None` if the other end is gone.
    ///
    /// # Errors
    /// Those of `recvmsg(2)`; `InvalidData` for what is no message.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        let mut header = [0_u8; 5];
        let mut descriptors = Vec::new();
        let mut read = 0;
        while read < header.len() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let rest = header.get_mut(read..).unwrap_or_default();
            let received = retry_on_intr(|| {
                recvmsg(
                    &self.0,
                    &mut [IoSliceMut::new(rest)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )
            });
            let count = match received {
                Ok(message) => message.bytes,
                Err(Errno::CONNRESET) => 0,
                Err(error) => return Err(error.into()),
            };
            if count == 0 {
                return Ok(None);
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    descriptors.extend(received);
                }
            }
            read = read.saturating_add(count);
        }
        let [tag, len @ ..] = header;
        let tag = *TAGS
            .get(usize::from(tag))
            .ok_or(io::ErrorKind::InvalidData)?;
        let len =
            usize::try_from(u32::from_le_bytes(len)).map_err(|_| io::ErrorKind::InvalidData)?;
        if len > MAX_PAYLOAD_LEN {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; len];
        let mut rest = payload.as_mut_slice();
        while !rest.is_empty() {
            let count = retry_on_intr(|| rustix::io::read(&self.0, &mut *rest))?;
            if count == 0 {
                return Ok(None);
            }
            rest = rest.get_mut(count..).unwrap_or_default();
        }
        Ok(Some(Message {
            tag,
            payload,
            descriptors,
        }))
    }

    fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = retry_on_intr(|| rustix::io::write(&self.0, bytes))?;
            bytes = bytes.get(count..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        (Channel::new(a.into()), Channel::new(b.into()))
    }

    #[test]
    fn message_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        a.send(Tag::Terminal, b"payload", &[writer.as_fd()])
            .unwrap();
        drop(writer);
        let message = b.receive().unwrap().unwrap();
        assert_eq!(
            (message.tag, message.payload.as_slice()),
            (Tag::Terminal, b"payload".as_slice())
        );
        rustix::io::write(&message.descriptors[0], b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(&reader, &mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn closed_end_is_no_message() {
        let (a, b) = pair();
        drop(a);
        assert!(b.receive().unwrap().is_none());
        assert!(!b.wait_for(START).unwrap());
    }

    #[test]
    fn unknown_tag_and_overlong_payload_are_refused() {
        for header in [[9, 0, 0, 0, 0], [0, 1, 0, 0, 1]] {
            let (a, b) = pair();
            a.write_all(&header).unwrap();
            assert!(b.receive().is_err());
        }
    }

    #[test]
    fn wrong_byte_is_refused() {
        let (a, b) = pair();
        a.send_byte(START).unwrap();
        assert!(b.wait_for(PROCEED).is_err());
    }
}
