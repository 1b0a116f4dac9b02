// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The queues of the vsock device.
//!
//! The receive queue is served after every event, whatever it was: a packet of the guest, a byte of the host or a
//! fresh buffer can each make a packet for the guest possible. The driver is asked for kicks on that queue only while
//! packets wait and buffers do not.
//!
//! Nothing is in flight between two calls: bytes are copied between socket and guest memory within one call, so
//! `pause` has nothing to finish. A worker ends with a pause; what is to go on after it is the muxer's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_wire::DeviceId;
use virtio_wire::vsock::EVENT_TRANSPORT_RESET;
use vm_memory::GuestMemory;

use super::device::Shared;
use super::muxer::{Muxer, TransportReset};
use super::stream::payload_room;
use super::{QUEUE_EVENTS, QUEUE_TO_GUEST, QUEUE_TO_HOST};
use crate::{
    Activation, Chain, DeviceError, Event, GuestSpace, Interrupt, MAX_BYTES_PER_WAKE,
    MAX_CHAINS_PER_WAKE, Progress, Queue, QueueState, Worker,
};

/// The device's queues.
pub(super) struct Queues {
    pub(super) to_guest: Queue,
    pub(super) to_host: Queue,
    /// `None` if the driver has not enabled it.
    pub(super) events: Option<Queue>,
}

/// Serves all three queues and the host's sockets.
pub(super) struct VsockWorker<S> {
    shared: Arc<Shared>,
    queues: Queues,
    indexes: Vec<u16>,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    rooms: Rooms,
}

/// Receive buffers taken from the queue, to be filled in one go; reused from wake to wake.
#[derive(Default)]
struct Rooms(Vec<Chain>);

/// What [`Rooms::take`] found.
struct TakenRooms {
    /// Buffers that hold a header and at least one byte.
    rooms: usize,
    /// Smaller ones, which the driver has back already, empty.
    short: u32,
}

impl Rooms {
    /// Takes up to `wanted` buffers off the queue.
    fn take<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        wanted: usize,
    ) -> Result<TakenRooms, DeviceError> {
        self.0.resize_with(wanted.max(self.0.len()), Chain::default);
        let mut taken = TakenRooms { rooms: 0, short: 0 };
        for chain in self.0.iter_mut().take(wanted) {
            if !queue.pop(mem, chain)? {
                break;
            }
            if payload_room(&chain.writable) == 0 {
                if taken.rooms == 0 {
                    queue.complete(mem, chain.head(), 0)?;
                    taken.short = 1;
                } else {
                    queue.undo_pop(); // chains go back in the order of the ring, so it has to wait
                }
                break;
            }
            taken.rooms = taken.rooms.saturating_add(1);
        }
        Ok(taken)
    }

    fn first(&self, n: usize) -> &[Chain] {
        self.0.get(..n).unwrap_or_default()
    }
}

impl<S: GuestSpace> VsockWorker<S> {
    pub(super) fn new(shared: Arc<Shared>, queues: Queues, activation: &Activation<S>) -> Self {
        let mut indexes = vec![QUEUE_TO_GUEST, QUEUE_TO_HOST];
        indexes.extend(queues.events.is_some().then_some(QUEUE_EVENTS));
        Self {
            shared,
            queues,
            indexes,
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
            chain: Chain::default(),
            rooms: Rooms::default(),
        }
    }

    /// Takes in packets of the guest.
    fn serve_to_host(&mut self, muxer: &mut Muxer) -> Result<Progress, DeviceError> {
        let mem = &*self.memory.memory();
        let queue = &mut self.queues.to_host;
        queue.serve(mem, &*self.interrupt, &mut self.chain, |chain| {
            muxer.take_packet(mem, &chain.readable)?;
            Ok(0)
        })
    }

    /// Gives the guest what there is for it.
    fn serve_to_guest(&mut self, muxer: &mut Muxer) -> Result<Progress, DeviceError> {
        if muxer.transport_reset != TransportReset::Done || !muxer.has_work() {
            return Ok(Progress::Idle);
        }
        let mem = &*self.memory.memory();
        let queue = &mut self.queues.to_guest;
        let mut chains = 0u32;
        let mut bytes = 0u64;
        queue.disable_kicks(mem)?;
        let progress = loop {
            if !muxer.has_work() {
                break Progress::Idle;
            }
            if chains >= MAX_CHAINS_PER_WAKE || bytes >= MAX_BYTES_PER_WAKE {
                break Progress::More;
            }
            let taken = self.rooms.take(queue, mem, muxer.rooms_wanted())?;
            chains = chains.saturating_add(taken.short);
            muxer
                .parts
                .metrics
                .short_buffers
                .add(u64::from(taken.short));
            let rooms = self.rooms.first(taken.rooms);
            if rooms.is_empty() {
                if taken.short > 0 || queue.enable_kicks(mem)? {
                    continue;
                }
                break Progress::Idle;
            }
            let written = muxer.give_packets(mem, rooms)?;
            for (room, len) in rooms.iter().zip(written) {
                queue.complete(mem, room.head(), *len)?;
                chains = chains.saturating_add(1);
                bytes = bytes.saturating_add(u64::from(*len));
            }
            for _ in written.len()..rooms.len() {
                queue.undo_pop();
            }
        };
        if chains > 0 {
            queue.notify(mem, &*self.interrupt)?;
        }
        Ok(progress)
    }

    /// Tells a restored guest, and finds out whether it has heard.
    fn serve_events(&mut self, muxer: &mut Muxer) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queues.events else {
            return Ok(());
        };
        let mem = &*self.memory.memory();
        if muxer.transport_reset == TransportReset::Wanted && queue.pop(mem, &mut self.chain)? {
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let written = self.chain.writable.write_at(mem, 0, &event)?;
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            queue.complete(mem, self.chain.head(), written)?;
            queue.notify(mem, &*self.interrupt)?;
            let available = queue.available(mem)?;
            muxer.transport_reset = TransportReset::Told { available };
        }
        // The driver kicks when it gives the buffer back; one that did before this is seen right here.
        queue.enable_kicks(mem)?;
        if let TransportReset::Told { available } = muxer.transport_reset
            && queue.available(mem)? > available
        {
            muxer.transport_reset = TransportReset::Done;
        }
        Ok(())
    }
}

impl<S: GuestSpace> Worker for VsockWorker<S> {
    fn queues(&self) -> &[u16] {
        &self.indexes
    }

    fn sources(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        vec![(0, self.shared.poller.as_fd())]
    }

    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError> {
        let shared = Arc::clone(&self.shared);
        let mut muxer = shared.muxer();
        muxer.now = (shared.clock)();
        if let Some(paused_at) = muxer.paused_at.take() {
            let pause = muxer.now.saturating_duration_since(paused_at);
            muxer.postpone(pause);
        }
        let served = match event {
            Event::Queue(QUEUE_TO_HOST) => self.serve_to_host(&mut muxer)?,
            Event::Queue(QUEUE_EVENTS) => {
                self.serve_events(&mut muxer)?;
                Progress::Idle
            }
            Event::Queue(_) => Progress::Idle,
            Event::Source(_) => muxer.host_events().map_err(host_error)?,
        };
        let sent = self.serve_to_guest(&mut muxer)?;
        Ok(match (served, sent) {
            (Progress::Idle, Progress::Idle) => Progress::Idle,
            _ => Progress::More,
        })
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        let now = (self.shared.clock)();
        self.shared.muxer().paused_at.get_or_insert(now);
        let queues = [Some(&self.queues.to_guest), Some(&self.queues.to_host)];
        let all = queues.into_iter().chain([self.queues.events.as_ref()]);
        all.flatten()
            .map(|queue| (queue.index(), queue.state()))
            .collect()
    }
}

fn host_error(source: io::Error) -> DeviceError {
    DeviceError::Host {
        device: DeviceId::VSOCK,
        operation: "wait for events of its sockets",
        source,
    }
}
