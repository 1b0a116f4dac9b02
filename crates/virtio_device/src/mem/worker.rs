// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The request side of the memory device.

use std::sync::Arc;

use virtio_wire::mem::{
    BlockRange, MemRequest, MemResponse, REQUEST_BYTES, REQUEST_QUEUE, RESPONSE_BYTES,
};
use vm_memory::{GuestAddress, GuestMemory};

use super::BLOCK_BYTES;
use super::device::Shared;
use crate::{
    Activation, Chain, ChainFault, DeviceError, Event, GuestSpace, Interrupt, Progress, Queue,
    QueueState, Worker,
};

/// Serves the request queue. Nothing is in flight between two calls of `handle`.
pub(super) struct MemWorker<S> {
    shared: Arc<Shared>,
    queue: Queue,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> MemWorker<S> {
    pub(super) fn new(shared: Arc<Shared>, queue: Queue, activation: &Activation<S>) -> Self {
        Self {
            shared,
            queue,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }
}

impl<S: GuestSpace> Worker for MemWorker<S> {
    fn queues(&self) -> &[u16] {
        &[REQUEST_QUEUE]
    }

    fn handle(&mut self, _event: Event) -> Result<Progress, DeviceError> {
        // What a request plugs, the rings of this device are not in: one view of memory does for all of them.
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            shared,
            queue,
            chain,
            interrupt,
            ..
        } = self;
        queue.serve(mem, &**interrupt, chain, |chain| {
            let response = shared.answer(request(mem, chain)?);
            let written = chain.writable.write_at(mem, 0, &response.to_bytes())?;
            Ok(u32::try_from(written).unwrap_or(0))
        })
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        vec![(REQUEST_QUEUE, self.queue.state())]
    }
}

fn request<M: GuestMemory>(mem: &M, chain: &Chain) -> Result<MemRequest, DeviceError> {
    let bad = || DeviceError::Chain {
        queue: REQUEST_QUEUE,
        head: chain.head(),
        fault: ChainFault::BadLayout,
    };
    let mut bytes = [0; REQUEST_BYTES];
    if chain.readable.read_at(mem, 0, &mut bytes)? != REQUEST_BYTES
        || (chain.writable.len() as usize) < RESPONSE_BYTES
    {
        return Err(bad());
    }
    MemRequest::parse(&bytes).map_err(|_| bad())
}

impl Shared {
    fn answer(&self, request: MemRequest) -> MemResponse {
        let response = match request {
            MemRequest::Plug(range) => self.plug(range),
            MemRequest::Unplug(range) => self.unplug(range),
            MemRequest::UnplugAll => self.unplug_all(),
            MemRequest::State(range) => self.blocks().state(range),
            MemRequest::Unknown(_) => MemResponse::Error,
        };
        match response {
            MemResponse::Nack => self.metrics.refused.increment(),
            MemResponse::Error => self.metrics.wrong.increment(),
            MemResponse::Ack | MemResponse::Busy | MemResponse::State(_) => {}
        }
        response
    }

    /// §5.15.6.2
    fn plug(&self, range: BlockRange) -> MemResponse {
        let mut blocks = self.blocks();
        let plug = match blocks.plan_plug(range, self.requested()) {
            Ok(plug) => plug,
            Err(response) => return response,
        };
        let slots = plug.new_slots.iter().map(|slot| blocks.address(*slot));
        if self.add_slots(&slots.collect::<Vec<_>>()).is_err() {
            return MemResponse::Busy;
        }
        blocks.plug(&plug);
        self.set_plugged(blocks.plugged());
        self.metrics.plugged_bytes.add(bytes(range));
        MemResponse::Ack
    }

    /// §5.15.6.3
    fn unplug(&self, range: BlockRange) -> MemResponse {
        let mut blocks = self.blocks();
        let empty = match blocks.unplug(range) {
            Ok(empty) => empty,
            Err(response) => return response,
        };
        self.metrics.unplugged_bytes.add(bytes(range));
        self.release(range.addr, bytes(range));
        let slots = empty.iter().map(|slot| blocks.address(*slot));
        self.remove_slots(&slots.collect::<Vec<_>>());
        self.set_plugged(blocks.plugged());
        MemResponse::Ack
    }

    /// §5.15.6.4
    fn unplug_all(&self) -> MemResponse {
        let mut blocks = self.blocks();
        let present: Vec<u64> = blocks
            .present()
            .map(|(slot, _)| blocks.address(slot))
            .collect();
        self.metrics.unplugged_bytes.add(blocks.plugged());
        for slot in &present {
            self.release(*slot, super::SLOT_BYTES);
        }
        self.remove_slots(&present);
        blocks.load(&[]);
        self.set_plugged(0);
        MemResponse::Ack
    }

    fn release(&self, addr: u64, len: u64) {
        if self.release.release(GuestAddress(addr), len).is_err() {
            self.metrics.host_failures.increment();
        }
    }
}

fn bytes(range: BlockRange) -> u64 {
    u64::from(range.blocks).saturating_mul(BLOCK_BYTES)
}
