// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The request side of the entropy device.

use std::sync::Arc;

use virtio_wire::DeviceId;

use super::{EntropySource, MAX_REQUEST_BYTES, RngMetrics};
use crate::{
    Activation, Chain, ChainFault, DeviceError, Event, GuestSpace, Interrupt, Progress, Queue,
    QueueState, Worker,
};

/// Serves the request queue. Nothing is in flight between two calls of `handle`.
pub(super) struct RngWorker<S> {
    source: Arc<dyn EntropySource>,
    metrics: Arc<RngMetrics>,
    queue: Queue,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> RngWorker<S> {
    pub(super) fn new(
        source: Arc<dyn EntropySource>,
        metrics: Arc<RngMetrics>,
        queue: Queue,
        activation: &Activation<S>,
    ) -> Self {
        Self {
            source,
            metrics,
            queue,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }
}

impl<S: GuestSpace> Worker for RngWorker<S> {
    fn queues(&self) -> &[u16] {
        &[0]
    }

    fn handle(&mut self, _event: Event) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            source,
            metrics,
            queue,
            chain,
            interrupt,
            ..
        } = self;
        queue.serve(mem, &**interrupt, chain, |chain| {
            if chain.writable.is_empty() {
                // §5.4.6.1: the driver MUST give writable buffers only.
                return Err(DeviceError::Chain {
                    queue: 0,
                    head: chain.head(),
                    fault: ChainFault::BadLayout,
                });
            }
            let mut bytes = [0; MAX_REQUEST_BYTES];
            let wanted = chain.writable.len() as usize;
            let to = match bytes.split_at_mut_checked(wanted) {
                Some((to, _)) => to,
                None => &mut bytes,
            };
            source.fill(to).map_err(|source| DeviceError::Host {
                device: DeviceId::RNG,
                operation: "get random bytes from the host",
                source,
            })?;
            let written = u32::try_from(chain.writable.write_at(mem, 0, to)?).unwrap_or(0);
            metrics.requests.increment();
            metrics.bytes.add(u64::from(written));
            Ok(written)
        })
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        vec![(0, self.queue.state())]
    }
}
