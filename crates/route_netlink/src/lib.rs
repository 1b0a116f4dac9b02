// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A blocking rtnetlink socket (rtnetlink(7)): one request, its answers.
//!
//! For the host's side of a pod's network and for the agent's: both set up a handful of interfaces once, in order, and need
//! no event loop for it. Bodies of messages are bytes here: the host reads everything that the kernel can say and has a
//! library for that; the agent says a little, and every byte of its program is in the memory of every pod.
//!
//! The socket belongs to the network namespace of the thread that opens it. The kernel answers within the call, so nothing
//! here waits for anybody else.
#![forbid(unsafe_code)]

mod attributes;

use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

pub use attributes::{Attributes, attributes};

// Linux `include/uapi/linux/netlink.h`.
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NOTHING: u16 = 1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Bytes of `struct nlmsghdr`: length u32, type u16, flags u16, sequence number u32, port u32.
const HEADER: usize = 16;

/// What a change does to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Changes or deletes it; it must be there.
    Existing,
    /// Makes it; it must not be there.
    New,
    /// Makes it beside others like it: routes to one destination through several interfaces.
    Beside,
}

/// A message: `RTM_*` of rtnetlink(7), and what follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: u16,
    /// A structure that depends on the kind, and attributes.
    pub body: Vec<u8>,
}

/// A socket.
pub struct RouteSocket {
    socket: Socket,
    sequence: u32,
}

impl RouteSocket {
    /// A socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Those of socket(2) and bind(2).
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for a change and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's refusal as the errno that it is.
    pub fn change(&mut self, message: &Message, change: Change) -> io::Result<()> {
        let flags = match change {
            Change::Existing => 0,
            Change::New => CREATE | EXCLUSIVE,
            Change::Beside => CREATE | APPEND,
        };
        self.exchange(message, ACKNOWLEDGE | flags).map(drop)
    }

    /// Everything of a kind.
    ///
    /// # Errors
    /// The kernel's refusal, or an answer that cannot be read.
    pub fn dump(&mut self, message: &Message) -> io::Result<Vec<Message>> {
        self.exchange(message, DUMP)
    }

    fn exchange(&mut self, message: &Message, flags: u16) -> io::Result<Vec<Message>> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER.saturating_add(message.body.len()))
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(message.kind.to_ne_bytes());
        bytes.extend((REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]); // from this socket
        bytes.extend(&message.body);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while let Some((answer, sequence, after)) = take(rest)? {
                rest = after;
                if sequence != self.sequence {
                    continue; // of a request whose answer nobody waited for
                }
                match answer.kind {
                    NOTHING => {}
                    DONE => return Ok(answers),
                    ERROR => return refusal(&answer.body).map(|()| answers),
                    _ => answers.push(answer),
                }
            }
        }
    }
}

/// The next message of a datagram, its sequence number, and what is behind it.
fn take(datagram: &[u8]) -> io::Result<Option<(Message, u32, &[u8])>> {
    if datagram.is_empty() {
        return Ok(None);
    }
    let parsed = || {
        let (header, _) = datagram.split_first_chunk::<HEADER>()?;
        let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let body = datagram.get(HEADER..length)?.to_vec();
        let kind = u16::from_ne_bytes([k0, k1]);
        let sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
        let behind = datagram.get(length.next_multiple_of(4)..);
        Some((Message { kind, body }, sequence, behind.unwrap_or_default()))
    };
    let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "no netlink message");
    parsed().map(Some).ok_or_else(unreadable)
}

/// The body of an error begins with a negative errno, or 0 for "done".
fn refusal(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().copied().map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEWLINK: u16 = 16;
    const GETLINK: u16 = 18;
    const SETLINK: u16 = 19;
    const IFNAME: u16 = 3;

    #[test]
    fn loopback_is_among_the_links() {
        let mut socket = RouteSocket::open().unwrap();
        let links = socket
            .dump(&Message {
                kind: GETLINK,
                body: vec![0; 16],
            })
            .unwrap();
        let is_loopback = |link: &Message| {
            let mut found = attributes(link.body.get(16..).unwrap());
            link.kind == NEWLINK && found.any(|(kind, value)| kind == IFNAME && value == b"lo\0")
        };
        assert!(links.iter().any(is_loopback));
    }

    #[test]
    fn refusal_is_the_kernels_errno_and_the_socket_stays_usable() {
        let mut socket = RouteSocket::open().unwrap();
        let mut body = vec![0; 16];
        body[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let nowhere = Message {
            kind: SETLINK,
            body,
        };
        for _ in 0..2 {
            let error = socket.change(&nowhere, Change::Existing).unwrap_err();
            assert!(error.raw_os_error().is_some(), "{error}");
        }
    }

    #[test]
    fn datagram_that_is_cut_is_an_error_and_not_the_end() {
        assert!(take(&[]).unwrap().is_none());
        take(&[0; HEADER - 1]).unwrap_err();
        for length in [0, 15, 17u32] {
            let mut bytes = vec![0; HEADER];
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            take(&bytes).unwrap_err();
        }
        refusal(&[]).unwrap_err();
        refusal(&i32::MIN.to_ne_bytes()).unwrap_err();
    }
}
