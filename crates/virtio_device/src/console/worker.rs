// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The request side of the console.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_wire::console::{RECEIVE_QUEUE, TRANSMIT_QUEUE};
use vm_memory::GuestMemory;

use super::ConsoleInput;
use super::device::Shared;
use crate::{
    Activation, Chain, ChainFault, DeviceError, Event, GuestSpace, Interrupt, MAX_CHAINS_PER_WAKE,
    Progress, Queue, QueueState, Worker,
};

/// Token of the input event.
const INPUT: u32 = 0;

/// Bytes of output copied at a time.
const COPY_BYTES: usize = 4096;

/// Serves both queues. In flight between two calls of `handle`: input bytes, which wait in [`ConsoleInput`].
pub(super) struct ConsoleWorker<S> {
    shared: Arc<Shared>,
    input: Arc<ConsoleInput>,
    receive: Option<Queue>,
    transmit: Option<Queue>,
    indexes: Vec<u16>,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> ConsoleWorker<S> {
    pub(super) fn new(
        shared: Arc<Shared>,
        input: Arc<ConsoleInput>,
        receive: Option<Queue>,
        transmit: Option<Queue>,
        activation: &Activation<S>,
    ) -> Self {
        let indexes = receive.iter().chain(&transmit).map(Queue::index).collect();
        Self {
            shared,
            input,
            receive,
            transmit,
            indexes,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }

    fn print(&mut self) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            shared,
            transmit,
            chain,
            interrupt,
            ..
        } = self;
        let Some(queue) = transmit else {
            return Ok(Progress::Idle);
        };
        queue.serve(mem, &**interrupt, chain, |chain| {
            let mut at = 0;
            while at < chain.readable.len() {
                let mut bytes = [0; COPY_BYTES];
                let n = chain.readable.read_at(mem, at, &mut bytes)?;
                let bytes = bytes.get(..n).unwrap_or_default();
                shared.metrics.output_bytes.add(n as u64);
                shared
                    .metrics
                    .file_dropped_bytes
                    .add(shared.log.append(bytes) as u64);
                at = at.saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
            }
            Ok(0)
        })
    }

    /// Moves pending input into the guest's buffers, as many bytes as each holds.
    fn type_in(&mut self) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            shared,
            input,
            receive,
            chain,
            interrupt,
            ..
        } = self;
        let Some(queue) = receive else {
            return Ok(Progress::Idle);
        };
        let mut chains = 0u32;
        while !input.is_empty() && chains < MAX_CHAINS_PER_WAKE && next_buffer(queue, mem, chain)? {
            let bytes = input.take(chain.writable.len() as usize);
            let written = u32::try_from(chain.writable.write_at(mem, 0, &bytes)?).unwrap_or(0);
            queue.complete(mem, chain.head(), written)?;
            shared.metrics.input_bytes.add(u64::from(written));
            chains = chains.saturating_add(1);
        }
        if chains > 0 {
            queue.notify(mem, &**interrupt)?;
        }
        Ok(if chains < MAX_CHAINS_PER_WAKE {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}

/// Takes the next receive buffer; with none, kicks are on when this returns false, so that the next
/// buffer wakes the worker.
fn next_buffer<M: GuestMemory>(
    queue: &mut Queue,
    mem: &M,
    chain: &mut Chain,
) -> Result<bool, DeviceError> {
    let found = queue.pop(mem, chain)? || queue.enable_kicks(mem)? && queue.pop(mem, chain)?;
    if !found {
        return Ok(false);
    }
    if chain.writable.is_empty() {
        let fault = ChainFault::BadLayout;
        return Err(DeviceError::Chain {
            queue: queue.index(),
            head: chain.head(),
            fault,
        });
    }
    Ok(true)
}

impl<S: GuestSpace> Worker for ConsoleWorker<S> {
    fn queues(&self) -> &[u16] {
        &self.indexes
    }

    fn sources(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        vec![(INPUT, self.input.event())]
    }

    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError> {
        match event {
            Event::Queue(TRANSMIT_QUEUE) => self.print(),
            Event::Queue(RECEIVE_QUEUE) => self.type_in(),
            Event::Queue(_) => Ok(Progress::Idle),
            Event::Source(_) => {
                self.input.clear_event();
                self.type_in()
            }
        }
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        self.receive
            .iter()
            .chain(&self.transmit)
            .map(|queue| (queue.index(), queue.state()))
            .collect()
    }
}
