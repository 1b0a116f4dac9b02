// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The request side of the block device: one worker per queue.

use std::io;
use std::sync::Arc;

use virtio_wire::blk::{HEADER_BYTES, RequestStatus};
use vm_memory::GuestMemory;

use super::device::Shared;
use super::request::{self, Limits, Request};
use crate::{
    Activation, Chain, ChainFault, DeviceError, Direction, Event, GuestSpace, Interrupt, IoSlices,
    Progress, Queue, QueueState, Worker,
};

/// Serves one request queue. Nothing is in flight between two calls of `handle`: each request ends
/// before the next starts.
pub(super) struct BlockWorker<S> {
    executor: Executor,
    indexes: [u16; 1],
    queue: Queue,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> BlockWorker<S> {
    pub(super) fn new(
        shared: Arc<Shared>,
        limits: Limits,
        queue: Queue,
        activation: &Activation<S>,
    ) -> Self {
        Self {
            executor: Executor { shared, limits },
            indexes: [queue.index()],
            queue,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }
}

impl<S: GuestSpace> Worker for BlockWorker<S> {
    fn queues(&self) -> &[u16] {
        &self.indexes
    }

    fn handle(&mut self, _event: Event) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let Self {
            executor,
            queue,
            chain,
            interrupt,
            ..
        } = self;
        let index = queue.index();
        let limiter = &executor.shared.limiter;
        let run = |chain: &Chain| executor.run(&*memory, chain, index);
        queue.serve_within(&*memory, &**interrupt, chain, (|| limiter.wait(), run))
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        vec![(self.queue.index(), self.queue.state())]
    }
}

struct Executor {
    shared: Arc<Shared>,
    limits: Limits,
}

impl Executor {
    /// Runs one request and writes its status; returns the bytes written into the chain.
    fn run<M: GuestMemory>(&self, mem: &M, chain: &Chain, queue: u16) -> Result<u32, DeviceError> {
        let bad = |fault| DeviceError::Chain {
            queue,
            head: chain.head(),
            fault,
        };
        let request = request::parse(mem, chain, &self.limits)?.map_err(bad)?;
        let status_at = request::status_offset(chain).map_err(bad)?;
        let (status, data) = self.execute(mem, chain, &request)?;
        self.shared.limiter.took(request.bytes());
        if chain.writable.write_at(mem, status_at, &[status.0])? != 1 {
            return Err(bad(ChainFault::BadLayout));
        }
        Ok(data.saturating_add(1))
    }

    /// The status, and the bytes of data written to the guest.
    fn execute<M: GuestMemory>(
        &self,
        mem: &M,
        chain: &Chain,
        request: &Request,
    ) -> Result<(RequestStatus, u32), DeviceError> {
        let Shared {
            disk,
            metrics,
            serial,
            ..
        } = &*self.shared;
        let mut data = 0;
        let done = match request {
            Request::Read { offset, len } => {
                let to = IoSlices::new(mem, &chain.writable, 0, *len, Direction::IntoGuest)?;
                disk.read(to, *offset).map(|()| {
                    metrics.reads.increment();
                    metrics.read_bytes.add(u64::from(*len));
                    data = *len;
                })
            }
            Request::Write { offset, len } => {
                let from = IoSlices::new(
                    mem,
                    &chain.readable,
                    HEADER_BYTES,
                    *len,
                    Direction::FromGuest,
                )?;
                disk.write(from, *offset)
                    .and_then(|()| self.settle())
                    .map(|()| {
                        metrics.writes.increment();
                        metrics.written_bytes.add(u64::from(*len));
                    })
            }
            Request::Flush => disk.flush().map(|()| metrics.flushes.increment()),
            Request::GetId => {
                data = u32::try_from(chain.writable.write_at(mem, 0, serial)?).unwrap_or(0);
                Ok(())
            }
            Request::Discard(ranges) => ranges
                .iter()
                .filter(|range| range.len > 0)
                .try_for_each(|range| disk.discard(range.offset, range.len))
                .and_then(|()| self.settle())
                .map(|()| metrics.discards.increment()),
            Request::WriteZeroes(ranges) => ranges
                .iter()
                .filter(|(range, _)| range.len > 0)
                .try_for_each(|(range, unmap)| disk.write_zeroes(range.offset, range.len, *unmap))
                .and_then(|()| self.settle())
                .map(|()| metrics.write_zeroes.increment()),
            Request::Refused(status) => return Ok((self.refuse(*status), 0)),
        };
        Ok(match done {
            Ok(()) => (RequestStatus::OK, data),
            Err(_) => {
                metrics.host_errors.increment();
                (RequestStatus::IOERR, 0)
            }
        })
    }

    /// Makes what was just written durable, if the driver counts on that.
    fn settle(&self) -> io::Result<()> {
        if self.shared.writes_through(self.limits.features) {
            self.shared.disk.flush()
        } else {
            Ok(())
        }
    }

    fn refuse(&self, status: RequestStatus) -> RequestStatus {
        let metrics = &self.shared.metrics;
        if status == RequestStatus::UNSUPP {
            metrics.unsupported.increment()
        } else {
            metrics.refused.increment()
        }
        status
    }
}
