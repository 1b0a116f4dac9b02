// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One connection with the host socket at its other end: what the machine decides is done here.
//!
//! A write to a socket whose other end has gone must fail and not kill: the process ignores SIGPIPE, as every Rust
//! program does from its start.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::Shutdown as Half;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use virtio_wire::vsock::{ConnectionKey, HEADER_LEN};
use vm_memory::GuestMemory;

use super::connection::{Connection, Effects};
use super::host::Poller;
use crate::{Buffers, Chain, DeviceError, Direction, IoSlices};

/// [`HEADER_LEN`] as buffers count.
pub(super) const HEADER_BYTES: u32 = 44;
const _: () = assert!(HEADER_BYTES as usize == HEADER_LEN);

/// Bytes copied from guest memory to the backlog in one go.
const COPY_CHUNK: usize = 4096;

/// What the guest sent behind a header, still in its memory.
pub(super) struct Payload<'a, M> {
    /// Guest memory.
    pub(super) mem: &'a M,
    /// The packet, header included.
    pub(super) packet: &'a Buffers,
    /// Bytes behind the header that count; the packet holds at least so many.
    pub(super) len: u32,
}

/// What a socket has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// It took so many bytes, maybe none for now.
    Bytes(u32),
    /// It takes no more, ever.
    Gone,
}

/// What came of reading from a socket into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Got {
    /// So many bytes, at least one.
    Bytes(u32),
    /// Nothing now.
    Nothing,
    /// Nothing ever again: the other side has ended its stream.
    End,
    /// Nothing ever again, in either direction.
    Gone,
}

/// A connection and its host socket.
///
/// Invariant: the backlog holds exactly the bytes that the machine counts as buffered, so it never outgrows the window.
pub(super) struct Stream {
    /// The ports, as long as [`Connection::holds_ports`].
    pub(super) key: ConnectionKey,
    /// What decides.
    pub(super) machine: Connection,
    /// The host's end.
    pub(super) socket: UnixStream,
    /// The socket may have bytes, or its end.
    pub(super) readable: bool,
    /// It is in the list of streams with something for the guest.
    pub(super) queued: bool,
    /// The last read filled all the room it had: the next one should have more.
    pub(super) bulk: bool,
    /// Whether this one has one of the large windows.
    pub(super) large: bool,
    /// The poller watches for room.
    watches_room: bool,
    /// Bytes of the guest that the socket had no room for; allocated while there are any.
    backlog: VecDeque<u8>,
}

impl Stream {
    /// A stream over `socket`, which does not block, and of which the poller is yet to say what there is to read.
    pub(super) fn new(
        key: ConnectionKey,
        machine: Connection,
        socket: UnixStream,
        large: bool,
    ) -> Self {
        Self {
            key,
            machine,
            socket,
            readable: false,
            queued: false,
            bulk: false,
            large,
            watches_room: false,
            backlog: VecDeque::new(),
        }
    }

    /// Whether bytes wait for the socket to have room.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether a buffer of the guest should be spent on this stream.
    pub(super) fn wants_guest(&self) -> bool {
        self.machine.has_control() || (self.readable && self.machine.takes_data())
    }

    /// Gives a packet's payload to the socket, what it has no room for to the backlog.
    ///
    /// # Errors
    /// Guest memory has gone.
    pub(super) fn deliver<M: GuestMemory>(
        &mut self,
        payload: &Payload<'_, M>,
    ) -> Result<Taken, DeviceError> {
        let mut taken = 0;
        if self.backlog.is_empty() && payload.len > 0 {
            match self.write_direct(payload)? {
                Taken::Bytes(n) => taken = n,
                Taken::Gone => return Ok(Taken::Gone),
            }
        }
        let mut chunk = [0; COPY_CHUNK];
        let mut at = taken;
        while at < payload.len {
            let left = usize::try_from(payload.len.saturating_sub(at)).unwrap_or(COPY_CHUNK);
            let piece = chunk.get_mut(..left.min(COPY_CHUNK)).unwrap_or_default();
            let offset = HEADER_BYTES.saturating_add(at);
            let copied = payload.packet.read_at(payload.mem, offset, piece)?;
            self.backlog.extend(piece.iter());
            at = at.saturating_add(u32::try_from(copied.max(1)).unwrap_or(u32::MAX));
        }
        Ok(Taken::Bytes(taken))
    }

    fn write_direct<M: GuestMemory>(&self, payload: &Payload<'_, M>) -> Result<Taken, DeviceError> {
        let mut slices = IoSlices::new(
            payload.mem,
            payload.packet,
            HEADER_BYTES,
            payload.len,
            Direction::FromGuest,
        )?;
        Ok(taken(slices.write_to(self.socket.as_fd())))
    }

    /// Writes what has piled up, as far as there is room.
    pub(super) fn flush(&mut self) -> Taken {
        let (front, back) = self.backlog.as_slices();
        let slices = [IoSlice::new(front), IoSlice::new(back)];
        let outcome = taken((&self.socket).write_vectored(&slices));
        if let Taken::Bytes(n) = outcome {
            let n = usize::try_from(n).unwrap_or(usize::MAX);
            self.backlog.drain(..n.min(self.backlog.len()));
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new(); // gives the memory back
        }
        outcome
    }

    /// Reads at most `credit` bytes into `rooms`, behind where their headers will be.
    ///
    /// # Errors
    /// Guest memory has gone.
    pub(super) fn read<M: GuestMemory>(
        &mut self,
        mem: &M,
        rooms: &[Chain],
        credit: u32,
    ) -> Result<Got, DeviceError> {
        let mut left = credit;
        let mut slices = IoSlices::empty(Direction::IntoGuest);
        for room in rooms.iter().map(|chain| &chain.writable) {
            slices.append(mem, room, HEADER_BYTES, left)?;
            left = left.saturating_sub(payload_room(room));
        }
        let room = slices.len();
        let got = match slices.read_from(self.socket.as_fd()) {
            Ok(0) => Got::End,
            Ok(n) => Got::Bytes(u32::try_from(n).unwrap_or(u32::MAX)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Got::Nothing,
            Err(_) => Got::Gone,
        };
        self.readable = matches!(got, Got::Bytes(_));
        self.bulk = slices.is_empty() && room > 0;
        Ok(got)
    }

    /// Tells the host process which port of the host stands for it. The socket is fresh, so it has room for the line.
    pub(super) fn greet(&self) -> Taken {
        let line = format!("OK {}\n", self.key.host_port);
        match (&self.socket).write(line.as_bytes()) {
            Ok(n) if n == line.len() => Taken::Bytes(0),
            _ => Taken::Gone,
        }
    }

    /// Ends the halves that the machine says have ended. A socket whose other end is gone has ended already.
    pub(super) fn shut(&mut self, effects: &Effects) {
        if effects.shutdown_host_write {
            let _ = self.socket.shutdown(Half::Write);
        }
        if effects.shutdown_host_read {
            let _ = self.socket.shutdown(Half::Read);
            self.readable = false;
        }
    }

    /// Makes the poller watch for room exactly while bytes wait for it.
    ///
    /// # Errors
    /// The host has no memory left.
    pub(super) fn rearm(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        let wanted = self.has_backlog();
        if wanted != self.watches_room {
            poller.watch_room(&self.socket, token, wanted)?;
            self.watches_room = wanted;
        }
        Ok(())
    }

    /// Forgets what the host will not take any more.
    pub(super) fn drop_backlog(&mut self) {
        self.backlog = VecDeque::new();
    }
}

/// Bytes of data that a packet in `room` can carry.
pub(super) fn payload_room(room: &Buffers) -> u32 {
    room.len().saturating_sub(HEADER_BYTES)
}

fn taken(result: io::Result<usize>) -> Taken {
    match result {
        Ok(n) => Taken::Bytes(u32::try_from(n).unwrap_or(u32::MAX)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Taken::Bytes(0),
        Err(_) => Taken::Gone,
    }
}
