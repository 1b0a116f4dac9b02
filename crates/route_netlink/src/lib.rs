// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A blocking rtnetlink socket (rtnetlink(7)): one request, its answers.
//!
//! For the host's side of a pod's network and for the agent's: both set up a handful of interfaces once, in order, and need
//! no event loop for it. The socket belongs to the network namespace of the thread that opens it. The kernel answers within
//! the call, so nothing here waits for anybody else.
#![forbid(unsafe_code)]

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

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
    pub fn change(&mut self, message: RouteNetlinkMessage, change: Change) -> io::Result<()> {
        let flags = match change {
            Change::Existing => 0,
            Change::New => NLM_F_CREATE | NLM_F_EXCL,
            Change::Beside => NLM_F_CREATE | NLM_F_APPEND,
        };
        self.exchange(message, NLM_F_ACK | flags).map(drop)
    }

    /// Everything of a kind.
    ///
    /// # Errors
    /// The kernel's refusal, or an answer that cannot be read.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_DUMP)
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = usize::try_from(answer.header.length)
                    .unwrap_or(usize::MAX)
                    .next_multiple_of(4)
                    .max(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue; // of a request whose answer nobody waited for
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn loopback_is_among_the_links() {
        let mut socket = RouteSocket::open().unwrap();
        let links = socket
            .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
            .unwrap();
        assert!(links.iter().any(|link| matches!(
            link,
            RouteNetlinkMessage::NewLink(link)
                if link.attributes.contains(&LinkAttribute::IfName("lo".to_owned()))
        )));
    }

    #[test]
    fn refusal_is_the_kernels_errno_and_the_socket_stays_usable() {
        let mut socket = RouteSocket::open().unwrap();
        let mut nowhere = LinkMessage::default();
        nowhere.header.index = i32::MAX.unsigned_abs();
        for _ in 0..2 {
            let error = socket
                .change(
                    RouteNetlinkMessage::SetLink(nowhere.clone()),
                    Change::Existing,
                )
                .unwrap_err();
            assert!(error.raw_os_error().is_some(), "{error}");
        }
    }
}
