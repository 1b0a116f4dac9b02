// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! All connections of the one guest: which packet belongs to which, and who may speak to the guest next.
//!
//! What can pile up is bounded: streams by [`MAX_CONNECTIONS`], bytes by their windows, resets
//! for connections that are gone by [`MAX_PENDING_RESETS`].
//!
//! Nothing here blocks. Guest memory is read for one header at a time, into a value.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ids::{GuestCid, VsockPort};
use virtio_wire::vsock::{
    ConnectionKey, CreditInfo, HEADER_LEN, Header, Message, Packet, Rejection,
};
use vm_memory::GuestMemory;

use super::connection::{Abort, Connection, Effects, Input, Phase};
use super::host::{HostPorts, Poller};
use super::stream::{HEADER_BYTES, Payload, Stream, Taken};
use super::table::{EntryId, Table};
use super::{
    LARGE_WINDOW, LARGE_WINDOWS, MAX_CONNECTIONS, MAX_PENDING_RESETS, SMALL_WINDOW, VsockMetrics,
};
use crate::{Buffers, DeviceError};

/// The first of the ports that stand for host processes; as many follow. Far from the small numbers that services of
/// the host are given; nothing depends on it.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// What the muxer is made of.
pub(super) struct MuxerParts {
    pub(super) guest_cid: GuestCid,
    pub(super) allowed: BTreeSet<VsockPort>,
    pub(super) listener: UnixListener,
    pub(super) ports: Box<dyn HostPorts>,
    pub(super) poller: Arc<Poller>,
    pub(super) metrics: Arc<VsockMetrics>,
}

/// A host process, before and after it has said which port it wants.
pub(super) enum Entry {
    /// It has connected.
    Greeting {
        socket: UnixStream,
        deadline: Instant,
    },
    /// It is one end of a connection.
    Stream(Stream),
}

/// See the module.
pub(super) struct Muxer {
    pub(super) parts: MuxerParts,
    pub(super) table: Table<Entry>,
    by_key: HashMap<ConnectionKey, EntryId>,
    /// Streams that have something for the guest, the next one first.
    pub(super) ready: VecDeque<EntryId>,
    /// Connections of the guest's that do not exist here.
    pub(super) resets: VecDeque<ConnectionKey>,
    /// Lengths of the packets of one turn; kept to be reused.
    pub(super) written: Vec<u32>,
    large_windows: usize,
    next_port: u32,
    /// The listener may have connections.
    pub(super) acceptable: bool,
    /// The earliest deadline, if the timer is set.
    pub(super) timer: Option<Instant>,
    /// Time of this wake.
    pub(super) now: Instant,
    /// When the worker was stopped, if none has served anything since.
    pub(super) paused_at: Option<Instant>,
    /// Whether a restored guest knows.
    pub(super) transport_reset: TransportReset,
}

/// What a restored guest has to hear before anything else (virtio v1.3 §5.10.6.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TransportReset {
    /// Nothing.
    Done,
    /// It has not heard yet.
    Wanted,
    /// It has been told, and has taken the event in once it gives the buffer back: once more than so many are available.
    Told { available: u16 },
}

impl Muxer {
    pub(super) fn new(parts: MuxerParts, now: Instant) -> Self {
        Self {
            parts,
            table: Table::new(MAX_CONNECTIONS),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            written: Vec::new(),
            large_windows: LARGE_WINDOWS,
            next_port: 0,
            acceptable: true,
            timer: None,
            now,
            paused_at: None,
            transport_reset: TransportReset::Done,
        }
    }

    /// Takes in one packet of the guest.
    ///
    /// # Errors
    /// Guest memory has gone. What the guest does wrong is no error: it is dropped, counted, and where the
    /// specification says so answered with a reset.
    pub(super) fn take_packet<M: GuestMemory>(
        &mut self,
        mem: &M,
        packet: &Buffers,
    ) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER_LEN];
        let copied = packet.read_at(mem, 0, &mut bytes)?;
        let metrics = Arc::clone(&self.parts.metrics);
        let Ok(header) = Header::parse(bytes.get(..copied).unwrap_or_default()) else {
            metrics.malformed.increment();
            return Ok(());
        };
        let found = match Packet::from_guest(&header, self.parts.guest_cid) {
            Ok(found) => found,
            Err(Rejection::Address) => {
                metrics.misaddressed.increment();
                return Ok(());
            }
            Err(Rejection::Silent) => {
                metrics.malformed.increment();
                return Ok(());
            }
            Err(Rejection::Reset(key, _)) => {
                metrics.malformed.increment();
                self.cut_off(key);
                return Ok(());
            }
        };
        let len = match found.message {
            Message::Data { len } => len,
            _ => 0,
        };
        if packet.len().saturating_sub(HEADER_BYTES) < len {
            metrics.malformed.increment();
            self.cut_off(found.key);
            return Ok(());
        }
        self.route(&found, &Payload { mem, packet, len })
    }

    fn route<M: GuestMemory>(
        &mut self,
        packet: &Packet,
        payload: &Payload<'_, M>,
    ) -> Result<(), DeviceError> {
        let Some(&id) = self.by_key.get(&packet.key) else {
            match packet.message {
                Message::Request => self.accept(packet.key, packet.credit),
                Message::Reset => {}
                _ => {
                    self.parts.metrics.unknown_connection.increment();
                    self.owe_reset(packet.key);
                }
            }
            return Ok(());
        };
        let now = self.now;
        let Some(stream) = self.stream(id) else {
            return Ok(());
        };
        let input = Input::Guest(packet.message, packet.credit);
        let effects = stream.machine.step(input, now);
        if !effects.deliver {
            self.apply(id, &effects);
            return Ok(());
        }
        let taken = stream.deliver(payload)?;
        self.parts.metrics.packets_to_host.increment();
        let bytes = u64::from(payload.len);
        self.parts.metrics.bytes_to_host.add(bytes);
        self.apply(id, &effects);
        self.host_took(id, taken);
        Ok(())
    }

    /// The guest asks for a port of the host.
    fn accept(&mut self, key: ConnectionKey, credit: CreditInfo) {
        self.resets.retain(|other| *other != key); // an old reset would look like the answer to this
        let port = VsockPort(key.host_port);
        let metrics = Arc::clone(&self.parts.metrics);
        if self.table.is_full() {
            metrics.refused_full.increment();
            return self.owe_reset(key);
        }
        let (window, large) = self.window();
        let Ok(machine) = Connection::accept(window, credit) else {
            metrics.credit_violations.increment();
            return self.owe_reset(key);
        };
        let allowed = self.parts.allowed.contains(&port);
        let socket = allowed.then(|| self.parts.ports.open(port).ok()).flatten();
        let Some(socket) = socket.filter(|socket| socket.set_nonblocking(true).is_ok()) else {
            metrics.refused.increment();
            return self.owe_reset(key);
        };
        let stream = Stream::new(key, machine, socket, large);
        if self.add(Entry::Stream(stream)).is_some() {
            metrics.opened_by_guest.increment();
        } else {
            metrics.refused_full.increment();
            self.owe_reset(key);
        }
    }

    /// Puts an entry into the table and under the kernel's eye; `None` if either is full.
    pub(super) fn add(&mut self, entry: Entry) -> Option<EntryId> {
        let id = self.table.insert(|_| entry)?;
        let poller = Arc::clone(&self.parts.poller);
        let watched = match self.table.get(id)? {
            Entry::Greeting { socket, .. } => poller.watch(socket, id.to_token()),
            Entry::Stream(stream) => poller.watch(&stream.socket, id.to_token()),
        };
        if watched.is_err() {
            self.table.remove(id);
            return None;
        }
        self.added(id);
        Some(id)
    }

    /// A stream has come into the table: it holds its ports, a window and maybe a deadline.
    pub(super) fn added(&mut self, id: EntryId) {
        let Some(stream) = self.stream(id) else {
            return;
        };
        let (key, large, deadline) = (stream.key, stream.large, stream.machine.deadline());
        self.by_key.insert(key, id);
        if large {
            self.large_windows = self.large_windows.saturating_sub(1);
        }
        self.note_deadline(deadline);
        self.schedule(id);
    }

    /// Size of the next stream's receive buffer, and whether that is a large one.
    pub(super) fn window(&self) -> (u32, bool) {
        if self.large_windows > 0 {
            (LARGE_WINDOW, true)
        } else {
            (SMALL_WINDOW, false)
        }
    }

    /// A port that stands for a host process towards `guest_port`.
    pub(super) fn ephemeral_key(&mut self, guest_port: VsockPort) -> Option<ConnectionKey> {
        (0..=MAX_CONNECTIONS).find_map(|_| {
            let host_port = FIRST_EPHEMERAL_PORT | self.next_port;
            self.next_port = self.next_port.wrapping_add(1) % FIRST_EPHEMERAL_PORT;
            let key = ConnectionKey {
                guest_port: guest_port.0,
                host_port,
            };
            (!self.by_key.contains_key(&key)).then_some(key)
        })
    }

    /// Advances a stream.
    pub(super) fn step(&mut self, id: EntryId, input: Input) {
        let now = self.now;
        if let Some(stream) = self.stream(id) {
            let effects = stream.machine.step(input, now);
            self.apply(id, &effects);
        }
    }

    /// A socket was written to, and maybe more must wait.
    pub(super) fn host_took(&mut self, id: EntryId, taken: Taken) {
        match taken {
            Taken::Gone => self.host_stopped_reading(id),
            Taken::Bytes(n) => {
                let poller = Arc::clone(&self.parts.poller);
                if let Some(stream) = self.stream(id)
                    && stream.rearm(&poller, id.to_token()).is_err()
                {
                    return self.host_stopped_reading(id);
                }
                if n > 0 {
                    self.step(id, Input::HostTook(n));
                }
            }
        }
    }

    pub(super) fn host_stopped_reading(&mut self, id: EntryId) {
        if let Some(stream) = self.stream(id) {
            stream.drop_backlog();
        }
        self.step(id, Input::HostStoppedReading);
    }

    /// Does what the machine of stream `id` has decided.
    fn apply(&mut self, id: EntryId, effects: &Effects) {
        let Some(stream) = self.stream(id) else {
            return;
        };
        stream.shut(effects);
        let greeted = effects.greet_host.then(|| stream.greet());
        let (key, phase) = (stream.key, stream.machine.phase());
        let (ports, deadline) = (stream.machine.holds_ports(), stream.machine.deadline());
        if !ports && self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        if effects.reset_guest {
            self.owe_reset(key);
        }
        if let Some(abort) = effects.abort {
            self.count(abort);
        }
        if phase == Phase::Closed {
            self.remove(id);
            return;
        }
        self.note_deadline(deadline);
        self.schedule(id);
        match greeted {
            Some(Taken::Gone) => self.host_stopped_reading(id),
            Some(Taken::Bytes(_)) => self.parts.metrics.opened_by_host.increment(),
            None => {}
        }
    }

    fn count(&self, abort: Abort) {
        let metrics = &self.parts.metrics;
        match abort {
            Abort::ByGuest => metrics.aborted_by_guest.increment(),
            Abort::ByHost => metrics.aborted_by_host.increment(),
            Abort::Protocol => metrics.protocol_violations.increment(),
            Abort::Credit => metrics.credit_violations.increment(),
            Abort::Timeout => metrics.timeouts.increment(),
        }
    }

    /// Drops an entry; closing its socket also takes it out of the poller.
    pub(super) fn remove(&mut self, id: EntryId) {
        if let Some(Entry::Stream(stream)) = self.table.remove(id) {
            if stream.queued {
                self.ready.retain(|other| *other != id);
            }
            if stream.large {
                self.large_windows = self.large_windows.saturating_add(1);
            }
            if self.by_key.get(&stream.key) == Some(&id) {
                self.by_key.remove(&stream.key);
            }
        }
    }

    /// Ends a connection that the guest spoke of in a way that makes no sense, if there is one, and resets the guest.
    fn cut_off(&mut self, key: ConnectionKey) {
        if let Some(id) = self.by_key.get(&key).copied() {
            self.remove(id);
        }
        self.owe_reset(key);
    }

    fn owe_reset(&mut self, key: ConnectionKey) {
        if self.resets.len() < MAX_PENDING_RESETS {
            self.resets.push_back(key);
        } else {
            self.parts.metrics.resets_dropped.increment();
        }
    }

    /// Makes sure that the timer goes off at `deadline` or before.
    pub(super) fn note_deadline(&mut self, deadline: Option<Instant>) {
        let Some(deadline) = deadline else { return };
        if self.timer.is_none_or(|timer| deadline < timer) {
            let after = deadline.saturating_duration_since(self.now);
            // Setting a timer of ours cannot fail; if it did, the next event would still find the deadline passed.
            let _ = self.parts.poller.set_timer(after);
            self.timer = Some(deadline);
        }
    }

    /// Time did not count for `by`: nothing ran.
    pub(super) fn postpone(&mut self, by: Duration) {
        for entry in self.table.values_mut() {
            match entry {
                Entry::Greeting { deadline, .. } => {
                    *deadline = deadline.checked_add(by).unwrap_or(*deadline);
                }
                Entry::Stream(stream) => stream.machine.postpone(by),
            }
        }
        let earliest = self.earliest_deadline();
        self.timer = None;
        self.note_deadline(earliest);
    }

    pub(super) fn earliest_deadline(&self) -> Option<Instant> {
        let deadlines = self.table.iter().filter_map(|(_, entry)| entry.deadline());
        deadlines.min()
    }

    /// Drops every connection without a word: the guest's driver has gone, or takes over anew.
    pub(super) fn drop_connections(&mut self) {
        self.table = Table::new(MAX_CONNECTIONS);
        self.by_key.clear();
        self.ready.clear();
        self.resets.clear();
        self.large_windows = LARGE_WINDOWS;
        self.paused_at = None;
        self.transport_reset = TransportReset::Done;
    }

    pub(super) fn stream(&mut self, id: EntryId) -> Option<&mut Stream> {
        match self.table.get_mut(id)? {
            Entry::Stream(stream) => Some(stream),
            Entry::Greeting { .. } => None,
        }
    }

    /// Connections that wait in line: ready streams, pending resets.
    pub(super) fn in_line(&self) -> (usize, usize) {
        (self.ready.len(), self.resets.len())
    }
}

impl Entry {
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Greeting { deadline, .. } => Some(*deadline),
            Self::Stream(stream) => stream.machine.deadline(),
        }
    }
}
