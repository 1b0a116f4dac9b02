// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The rtnetlink socket with messages as values.

use std::io;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::RouteNetlinkMessage;
use route_netlink::{Change, Message};

/// A socket in the network namespace of the thread that opens it.
pub(crate) struct RouteSocket(route_netlink::RouteSocket);

impl RouteSocket {
    pub(crate) fn open() -> io::Result<Self> {
        route_netlink::RouteSocket::open().map(Self)
    }

    pub(crate) fn change(
        &mut self,
        message: RouteNetlinkMessage,
        change: Change,
    ) -> io::Result<()> {
        self.0.change(&encode(&message), change)
    }

    pub(crate) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let answers = self.0.dump(&encode(&message))?;
        answers.iter().map(decode).collect()
    }
}

fn encode(message: &RouteNetlinkMessage) -> Message {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    Message {
        kind: message.message_type(),
        body,
    }
}

fn decode(message: &Message) -> io::Result<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    RouteNetlinkMessage::deserialize(&header, &message.body)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
