// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The request side of the balloon.

use std::sync::Arc;

use virtio_wire::balloon::{
    DEFLATE_QUEUE, INFLATE_QUEUE, PAGE_BYTES, PFN_BYTES, parse_page_address,
};
use vm_memory::{GuestAddress, GuestMemory};

use super::device::Shared;
use super::{BalloonMetrics, MAX_PFN_BYTES, ReleasePages};
use crate::{
    Activation, Chain, DeviceError, Event, GuestSpace, Interrupt, Progress, Queue, QueueState,
    Segment, Worker,
};

/// The queues that the driver enabled.
pub(super) struct Queues {
    pub(super) inflate: Option<Queue>,
    pub(super) deflate: Option<Queue>,
    pub(super) reporting: Vec<Queue>,
}

impl Queues {
    fn iter(&self) -> impl Iterator<Item = &Queue> {
        self.inflate
            .iter()
            .chain(&self.deflate)
            .chain(&self.reporting)
    }
}

/// Serves all queues. Nothing is in flight between two calls of `handle`.
pub(super) struct BalloonWorker<S> {
    shared: Arc<Shared>,
    release: Arc<dyn ReleasePages>,
    queues: Queues,
    indexes: Vec<u16>,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> BalloonWorker<S> {
    pub(super) fn new(
        shared: Arc<Shared>,
        release: Arc<dyn ReleasePages>,
        queues: Queues,
        activation: &Activation<S>,
    ) -> Self {
        Self {
            shared,
            release,
            indexes: queues.iter().map(Queue::index).collect(),
            queues,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }
}

impl<S: GuestSpace> Worker for BalloonWorker<S> {
    fn queues(&self) -> &[u16] {
        &self.indexes
    }

    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            shared,
            release,
            queues,
            chain,
            interrupt,
            ..
        } = self;
        let releaser = Releaser {
            release: &**release,
            metrics: &shared.metrics,
        };
        let Event::Queue(index) = event else {
            return Ok(Progress::Idle);
        };
        let queue = match index {
            INFLATE_QUEUE => queues.inflate.as_mut(),
            DEFLATE_QUEUE => queues.deflate.as_mut(),
            _ => queues
                .reporting
                .iter_mut()
                .find(|queue| queue.index() == index),
        };
        let Some(queue) = queue else {
            return Ok(Progress::Idle);
        };
        queue.serve(mem, &**interrupt, chain, |chain| {
            match index {
                INFLATE_QUEUE => releaser.inflate(mem, chain)?,
                DEFLATE_QUEUE => {
                    shared
                        .metrics
                        .deflated_pages
                        .add(u64::from(chain.readable.len() / PFN_BYTES));
                }
                _ => chain
                    .writable
                    .segments()
                    .iter()
                    .for_each(|segment| releaser.report(segment)),
            }
            Ok(0)
        })
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        self.queues
            .iter()
            .map(|queue| (queue.index(), queue.state()))
            .collect()
    }
}

struct Releaser<'a> {
    release: &'a dyn ReleasePages,
    metrics: &'a BalloonMetrics,
}

impl Releaser<'_> {
    /// Releases the pages that an inflate request names (§5.5.6.1); runs of neighbours in one call.
    fn inflate<M: GuestMemory>(&self, mem: &M, chain: &Chain) -> Result<(), DeviceError> {
        let mut numbers = [0; MAX_PFN_BYTES as usize];
        let got = chain.readable.read_at(mem, 0, &mut numbers)?;
        let (numbers, _) = numbers.split_at_checked(got).unwrap_or_default();
        let mut run: Option<(u64, u64)> = None; // first byte, and the byte after the last
        for number in numbers.chunks_exact(PFN_BYTES as usize) {
            let Ok(addr) = parse_page_address(number) else {
                break;
            };
            self.metrics.inflated_pages.increment();
            run = match run {
                Some((start, end)) if end == addr => Some((start, addr.saturating_add(PAGE_BYTES))),
                // Linux allocates top down, so neighbours come in falling order too.
                Some((start, end)) if addr.saturating_add(PAGE_BYTES) == start => Some((addr, end)),
                other => {
                    self.run(other);
                    Some((addr, addr.saturating_add(PAGE_BYTES)))
                }
            };
        }
        self.run(run);
        Ok(())
    }

    /// Releases the whole pages of a reported buffer (§5.5.6.7).
    fn report(&self, segment: &Segment) {
        self.metrics.reported_bytes.add(u64::from(segment.len));
        let end = segment.addr.0.saturating_add(u64::from(segment.len));
        let end = end.saturating_sub(end % PAGE_BYTES);
        if let Some(start) = segment
            .addr
            .0
            .checked_next_multiple_of(PAGE_BYTES)
            .filter(|start| *start < end)
        {
            self.run(Some((start, end)));
        }
    }

    fn run(&self, run: Option<(u64, u64)>) {
        let Some((start, end)) = run else { return };
        let len = end.saturating_sub(start);
        match self.release.release(GuestAddress(start), len) {
            Ok(()) => self.metrics.released_bytes.add(len),
            Err(_) => self.metrics.refused_ranges.increment(),
        }
    }
}
