// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device's state, for a reader who wonders why bytes do not flow.

use serde::Serialize;

use super::connection::Phase;
use super::muxer::{Entry, Muxer};

/// Everything that lives in the device now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VsockDump {
    /// CID of the guest.
    pub guest_cid: u32,
    /// Each connection, in no order that means anything.
    pub connections: Vec<ConnectionDump>,
    /// Host processes that have not said yet what they want.
    pub callers: usize,
    /// Connections that have a packet for the guest and wait for a buffer or their turn.
    pub ready: usize,
    /// Resets that wait for a buffer.
    pub pending_resets: usize,
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConnectionDump {
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Port on the host's side.
    pub host_port: u32,
    /// Tells users of the same place in the device's table apart.
    pub generation: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// The guest sends no more.
    pub guest_ended: bool,
    /// The host sends no more.
    pub host_ended: bool,
    /// Bytes of the guest that the host has not taken.
    pub buffered: u32,
    /// Size of the buffer they are in, in bytes.
    pub window: u32,
    /// Bytes of the host that the guest has been sent and has not taken.
    pub in_flight: u32,
    /// Bytes that the guest still has room for.
    pub credit: u32,
    /// The host may have written bytes that were not read yet.
    pub host_readable: bool,
}

impl Muxer {
    /// The state now.
    pub(super) fn dump(&self) -> VsockDump {
        let connections: Vec<ConnectionDump> = self
            .table
            .iter()
            .filter_map(|(id, entry)| match entry {
                Entry::Stream(stream) => {
                    let machine = &stream.machine;
                    let (guest, host) = machine.given_up();
                    Some(ConnectionDump {
                        guest_port: stream.key.guest_port,
                        host_port: stream.key.host_port,
                        generation: id.generation(),
                        phase: machine.phase(),
                        guest_ended: guest.send,
                        host_ended: host.send,
                        buffered: machine.from_guest().buffered(),
                        window: machine.from_guest().size(),
                        in_flight: machine.to_guest().in_flight(),
                        credit: machine.to_guest().available(),
                        host_readable: stream.readable,
                    })
                }
                Entry::Greeting { .. } => None,
            })
            .collect();
        let (ready, pending_resets) = self.in_line();
        VsockDump {
            guest_cid: self.parts.guest_cid.get(),
            callers: self.table.len().saturating_sub(connections.len()),
            connections,
            ready,
            pending_resets,
        }
    }
}
