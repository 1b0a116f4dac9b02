// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Who speaks to the guest next.
//!
//! The streams that have something for the guest are in a list and take turns: one packet without data, or up to
//! [`MAX_PAYLOAD`](virtio_wire::vsock::MAX_PAYLOAD) bytes in as many packets as the guest's buffers make of
//! it. So a busy stream delays the others by one turn, and one whose reader is slow (no credit, or no room in its
//! socket) is simply not in the list. Resets go first: they free the guest's ports.

use std::sync::Arc;

use virtio_wire::vsock::{CreditInfo, Message, Packet};
use vm_memory::GuestMemory;

use super::MAX_TURN_PACKETS;
use super::connection::Input;
use super::muxer::Muxer;
use super::stream::{Got, HEADER_BYTES, payload_room};
use super::table::EntryId;
use crate::{Buffers, Chain, DeviceError};

impl Muxer {
    /// Puts a stream into the ready list if it has something for the guest.
    pub(super) fn schedule(&mut self, id: EntryId) {
        let Some(stream) = self.stream(id) else {
            return;
        };
        if stream.wants_guest() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Whether a buffer of the guest would probably be filled.
    pub(super) fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// How many buffers of the guest the next turn can probably use.
    pub(super) fn rooms_wanted(&mut self) -> usize {
        let next = self.ready.front().copied();
        let next = next.filter(|_| self.resets.is_empty());
        match next.and_then(|id| self.stream(id)) {
            Some(stream) if stream.bulk => MAX_TURN_PACKETS,
            _ => 1,
        }
    }

    /// Writes the packets of the next turn into the first of `rooms`, of which there is one at least, each taking a
    /// header and at least one byte; returns their lengths in bytes, none if there is no packet after all.
    ///
    /// # Errors
    /// Guest memory has gone.
    pub(super) fn give_packets<M: GuestMemory>(
        &mut self,
        mem: &M,
        rooms: &[Chain],
    ) -> Result<&[u32], DeviceError> {
        self.written.clear();
        let Some(first) = rooms.first() else {
            return Ok(&self.written);
        };
        if let Some(key) = self.resets.pop_front() {
            let credit = CreditInfo {
                buf_alloc: 0,
                fwd_cnt: 0,
            };
            let packet = Packet {
                key,
                message: Message::Reset,
                credit,
            };
            self.parts.metrics.resets_sent.increment();
            self.write(mem, &first.writable, &packet)?;
            return Ok(&self.written);
        }
        while self.written.is_empty()
            && let Some(id) = self.ready.pop_front()
        {
            let Some(stream) = self.stream(id) else {
                continue;
            };
            stream.queued = false;
            if let Some(message) = stream.machine.next_control() {
                let packet = Packet {
                    key: stream.key,
                    message,
                    credit: stream.machine.credit(),
                };
                self.write(mem, &first.writable, &packet)?;
            } else {
                self.data_to_guest(id, mem, rooms)?;
            }
            self.schedule(id);
        }
        Ok(&self.written)
    }

    /// Reads from a stream's socket into `rooms`.
    fn data_to_guest<M: GuestMemory>(
        &mut self,
        id: EntryId,
        mem: &M,
        rooms: &[Chain],
    ) -> Result<(), DeviceError> {
        let Some(stream) = self.stream(id).filter(|stream| stream.readable) else {
            return Ok(());
        };
        let credit = stream.machine.data_room();
        if credit == 0 {
            return Ok(());
        }
        match stream.read(mem, rooms, credit)? {
            Got::Bytes(len) => {
                stream.machine.sent(len);
                let (key, credit) = (stream.key, stream.machine.credit());
                let metrics = Arc::clone(&self.parts.metrics);
                metrics.bytes_to_guest.add(u64::from(len));
                let mut left = len;
                for room in rooms.iter().map(|chain| &chain.writable) {
                    let len = left.min(payload_room(room));
                    if len == 0 {
                        break;
                    }
                    left = left.saturating_sub(len);
                    let message = Message::Data { len };
                    let packet = Packet {
                        key,
                        message,
                        credit,
                    };
                    self.write(mem, room, &packet)?;
                    metrics.packets_to_guest.increment();
                }
            }
            Got::Nothing => {}
            Got::End => self.step(id, Input::HostEnded),
            Got::Gone => {
                self.step(id, Input::HostEnded);
                self.host_stopped_reading(id);
            }
        }
        Ok(())
    }

    /// Writes a packet's header in front of its data, if any, and notes the length of both.
    fn write<M: GuestMemory>(
        &mut self,
        mem: &M,
        room: &Buffers,
        packet: &Packet,
    ) -> Result<(), DeviceError> {
        let header = packet.to_guest(self.parts.guest_cid).encode();
        room.write_at(mem, 0, &header)?;
        let data = match packet.message {
            Message::Data { len } => len,
            _ => 0,
        };
        self.written.push(HEADER_BYTES.saturating_add(data));
        Ok(())
    }
}
