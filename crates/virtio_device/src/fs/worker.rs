// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Gives the queues to the server, passes its interrupts on, and takes the queues back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtio_wire::Features;
use virtio_wire::vhost_user::{self, F_PROTOCOL_FEATURES, Request};

use super::device::Shared;
use super::front_end::FrontEnd;
use crate::{DeviceError, Event, Interrupt, Progress, QueueState, Worker};

/// Token of the connection; those of the queues' interrupts are the queues' indexes.
const CONNECTION: u32 = 1 << 16;

/// Serves no queue itself. Its I/O thread never sees the guest's kicks: the server has them.
pub(super) struct FsWorker {
    shared: Arc<Shared>,
    queues: Vec<(u16, QueueState)>,
    features: Features,
    interrupt: Arc<dyn Interrupt>,
    /// The server has the queues.
    started: bool,
}

impl FsWorker {
    pub(super) fn new(
        shared: Arc<Shared>,
        queues: Vec<(u16, QueueState)>,
        features: Features,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            shared,
            queues,
            features,
            interrupt,
            started: false,
        }
    }

    fn hand_over(&self, front_end: &mut FrontEnd) -> io::Result<()> {
        front_end.begin();
        let features = self.features.bits() | F_PROTOCOL_FEATURES;
        self.confirm(front_end, Request::SET_FEATURES, &features.to_le_bytes())?;
        let table = vhost_user::memory_table(&self.shared.regions).map_err(io::Error::other)?;
        let files = vec![self.shared.memory.as_raw_fd(); self.shared.regions.len()];
        front_end.confirm(Request::SET_MEM_TABLE, &table, &files)?;
        self.shared.metrics.answers.increment();
        for (index, queue) in &self.queues {
            self.hand_over_queue(front_end, *index, queue)?;
        }
        Ok(())
    }

    fn hand_over_queue(
        &self,
        front_end: &mut FrontEnd,
        index: u16,
        queue: &QueueState,
    ) -> io::Result<()> {
        let number = usize::from(index);
        let (Some(call), Some(kick)) =
            (self.shared.calls.get(number), self.shared.kicks.get(number))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let state = |value: u32| vhost_user::vring_state(index, value);
        let addresses =
            vhost_user::vring_addresses(index, queue.desc_table, queue.used_ring, queue.avail_ring);
        let descriptor = vhost_user::vring_descriptor(index);
        self.confirm(front_end, Request::SET_VRING_NUM, &state(queue.size.into()))?;
        let position = state(queue.next_avail.into());
        self.confirm(front_end, Request::SET_VRING_BASE, &position)?;
        self.confirm(front_end, Request::SET_VRING_ADDR, &addresses)?;
        front_end.confirm(Request::SET_VRING_CALL, &descriptor, &[call.as_raw_fd()])?;
        front_end.confirm(Request::SET_VRING_KICK, &descriptor, &[kick.as_raw_fd()])?;
        self.confirm(front_end, Request::SET_VRING_ENABLE, &state(1))?;
        // A kick may have come while nobody had the queue, or have been read by a server that stopped right after.
        kick.write(1)
    }

    fn confirm(
        &self,
        front_end: &mut FrontEnd,
        request: Request,
        payload: &[u8],
    ) -> io::Result<()> {
        front_end.confirm(request, payload, &[])?;
        self.shared.metrics.answers.increment();
        Ok(())
    }

    /// Stops every queue and notes where it stands.
    fn take_back(&mut self) -> io::Result<()> {
        let mut front_end = self.shared.front_end();
        front_end.begin();
        for (index, queue) in &mut self.queues {
            let position = front_end.stop(*index)?;
            queue.next_avail = position;
            // The server completes what it has taken before it stops.
            queue.next_used = position;
        }
        Ok(())
    }
}

impl Worker for FsWorker {
    fn queues(&self) -> &[u16] {
        &[]
    }

    fn sources(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        let calls = (0u32..).zip(self.shared.calls.iter().map(AsFd::as_fd));
        let connection = (CONNECTION, self.shared.connection.as_fd());
        calls.chain([connection]).collect()
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        let result = self.hand_over(&mut self.shared.front_end());
        result.map_err(|error| {
            self.shared
                .lost("hand its queues to the file server", error)
        })?;
        self.started = true;
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError> {
        match event {
            Event::Source(CONNECTION) => {
                // Nothing comes unasked, so this is its end, or the server breaks the rules.
                let source = io::Error::from(io::ErrorKind::ConnectionAborted);
                return Err(self.shared.lost("go on without the file server", source));
            }
            Event::Source(index) => {
                let index = u16::try_from(index).unwrap_or(u16::MAX);
                if let Some(call) = self.shared.calls.get(usize::from(index))
                    && call.read().is_ok()
                {
                    self.shared.metrics.interrupts.increment();
                    self.interrupt.signal_used_queue(index);
                }
            }
            Event::Queue(_) => {}
        }
        Ok(Progress::Idle)
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        if self.started {
            self.started = false;
            if let Err(error) = self.take_back() {
                let _ = self
                    .shared
                    .lost("take its queues back from the file server", error);
            }
            // What it signalled last.
            for (index, _) in &self.queues {
                if let Some(call) = self.shared.calls.get(usize::from(*index))
                    && call.read().is_ok()
                {
                    self.interrupt.signal_used_queue(*index);
                }
            }
        }
        self.queues.clone()
    }
}
