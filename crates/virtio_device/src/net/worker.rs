// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The frame side of the network device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use virtio_wire::Features;
use virtio_wire::net::{
    GsoType, HEADER_BYTES, HEADER_LEN, NetHeader, RECEIVE_QUEUE, TRANSMIT_QUEUE, feature,
};
use vm_memory::GuestMemory;

use super::device::Shared;
use super::receive::Receive;
use super::{ETHERNET_BYTES, NetMetrics};
use crate::{
    Activation, Chain, DeviceError, Event, GuestSpace, Interrupt, IoSlices, MAX_BYTES_PER_WAKE,
    MAX_CHAINS_PER_WAKE, Progress, Queue, QueueState, Worker,
};

/// Token of the tap.
const TAP: u32 = 0;

/// Serves both queues. In flight between two calls of `handle`: no frame, but receive buffers that were taken ahead.
pub(super) struct NetWorker<S> {
    shared: Arc<Shared>,
    receive: Option<Receive>,
    transmit: Option<Queue>,
    indexes: Vec<u16>,
    features: Features,
    watch: Watch,
    chain: Chain,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
}

/// Whether the tap's readiness wakes the worker. The event loop watches an epoll of the device; the tap is in it or not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    On,
    Off,
    /// The tap has failed.
    Lost,
}

impl<S: GuestSpace> NetWorker<S> {
    pub(super) fn new(
        shared: Arc<Shared>,
        receive: Option<Queue>,
        transmit: Option<Queue>,
        activation: &Activation<S>,
    ) -> Self {
        let features = activation.features;
        let indexes = receive.iter().chain(&transmit).map(Queue::index).collect();
        let config = shared.config;
        Self {
            shared,
            receive: receive.map(|queue| Receive::new(queue, features, config)),
            transmit,
            indexes,
            features,
            watch: Watch::Off,
            chain: Chain::default(),
            memory: activation.memory.clone(),
            interrupt: Arc::clone(&activation.interrupt),
        }
    }

    fn receive(&mut self) -> Result<Progress, DeviceError> {
        if self.watch == Watch::Lost {
            return Ok(Progress::Idle);
        }
        let memory = self.memory.memory();
        let mem = &*memory;
        let tap = self.shared.io.descriptor();
        let metrics = &self.shared.metrics;
        let Some(receive) = &mut self.receive else {
            return Ok(Progress::Idle);
        };
        receive.queue().disable_kicks(mem)?;
        let (mut frames, mut bytes) = (0u32, 0u64);
        // The same from frame to frame: only what a frame has used is replaced.
        let mut slices = receive.slices(mem)?;
        let limiter = &self.shared.limits.ingress;
        let (watch, progress) = loop {
            if let Some(wait) = limiter.wait() {
                // Frames wait in the tap's queue, which drops what is too much, as a slow link does.
                break (Some(Watch::Off), Progress::Later(wait));
            }
            if frames >= MAX_CHAINS_PER_WAKE || bytes >= MAX_BYTES_PER_WAKE {
                break (None, Progress::More);
            }
            if !receive.prepare(mem, &mut slices)? {
                metrics.starved.increment();
                break (Some(Watch::Off), Progress::Idle);
            }
            match slices.read_from(tap) {
                Ok(len) if len > HEADER_BYTES => {
                    let behind = receive.deliver(mem, u32::try_from(len).unwrap_or(u32::MAX))?;
                    slices.advance(behind as usize);
                    frames = frames.saturating_add(1);
                    bytes = bytes.saturating_add(len as u64);
                    limiter.took(len.saturating_sub(HEADER_BYTES) as u64);
                    metrics.received_frames.increment();
                    metrics
                        .received_bytes
                        .add(len.saturating_sub(HEADER_BYTES) as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break (Some(Watch::On), Progress::Idle);
                }
                Ok(_) | Err(_) => {
                    metrics.host_errors.increment();
                    break (Some(Watch::Lost), Progress::Idle);
                }
            }
        };
        if frames > 0 {
            receive.queue().notify(mem, &*self.interrupt)?;
        }
        if let Some(watch) = watch {
            self.set_watch(watch);
        }
        Ok(progress)
    }

    fn set_watch(&mut self, watch: Watch) {
        if self.watch == watch {
            return;
        }
        let (epoll, tap) = (&self.shared.readiness, self.shared.io.descriptor());
        // Taken out, not masked: errors are reported whatever the mask.
        let done = match watch {
            Watch::On => epoll.add(tap, EpollEvent::new(EpollFlags::EPOLLIN, 0)),
            Watch::Off | Watch::Lost => epoll.delete(tap),
        };
        self.watch = match done {
            // What was never in, or still is.
            Ok(()) | Err(Errno::ENOENT | Errno::EEXIST) => watch,
            Err(_) => {
                self.shared.metrics.host_errors.increment();
                Watch::Lost
            }
        };
    }

    fn send(&mut self) -> Result<Progress, DeviceError> {
        let memory = self.memory.memory();
        let mem = &*memory;
        let Self {
            shared,
            transmit,
            chain,
            interrupt,
            features,
            ..
        } = self;
        let Some(queue) = transmit else {
            return Ok(Progress::Idle);
        };
        let limiter = &shared.limits.egress;
        let send = |chain: &Chain| {
            send_frame(mem, shared, *features, chain)?;
            limiter.took(u64::from(chain.readable.len().saturating_sub(HEADER_LEN)));
            Ok(0)
        };
        queue.serve_within(mem, &**interrupt, chain, (|| limiter.wait(), send))
    }
}

/// Sends one frame, or drops it and counts why: a network may lose frames.
fn send_frame<M: GuestMemory>(
    mem: &M,
    shared: &Shared,
    features: Features,
    chain: &Chain,
) -> Result<(), DeviceError> {
    let metrics: &NetMetrics = &shared.metrics;
    let mut bytes = [0; HEADER_BYTES];
    chain.readable.read_at(mem, 0, &mut bytes)?;
    let length = chain.readable.len().saturating_sub(HEADER_LEN);
    let header = match NetHeader::parse(&bytes) {
        Ok(header) if length >= ETHERNET_BYTES => allowed(header, features),
        _ => None,
    };
    let Some(header) = header.map(NetHeader::to_bytes) else {
        metrics.refused_frames.increment();
        return Ok(());
    };
    let mut frame = IoSlices::host(&header);
    frame.append(mem, &chain.readable, HEADER_LEN, length)?;
    match frame.write_to(shared.io.descriptor()) {
        Ok(_) => {
            metrics.sent_frames.increment();
            metrics.sent_bytes.add(u64::from(length));
        }
        // No buffer left, no such header, no such interface: all the same to the guest.
        Err(_) => metrics.dropped_frames.increment(),
    }
    Ok(())
}

/// The header as the tap gets it; `None` if it asks for what was not negotiated (virtio v1.3 §5.1.6.2).
fn allowed(header: NetHeader, features: Features) -> Option<NetHeader> {
    let needed = match header.gso_type {
        GsoType::NONE => Features::NONE,
        GsoType::TCPV4 => feature::HOST_TSO4 | feature::CSUM,
        GsoType::TCPV6 => feature::HOST_TSO6 | feature::CSUM,
        _ => return None,
    };
    let needed = match header.flags {
        0 => needed,
        NetHeader::NEEDS_CSUM => needed | feature::CSUM,
        _ => return None,
    };
    features.contains(needed).then_some(NetHeader {
        num_buffers: 0,
        ..header
    })
}

impl<S: GuestSpace> Worker for NetWorker<S> {
    fn queues(&self) -> &[u16] {
        &self.indexes
    }

    fn sources(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        vec![(TAP, self.shared.readiness.0.as_fd())]
    }

    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError> {
        match event {
            Event::Queue(TRANSMIT_QUEUE) => self.send(),
            Event::Queue(RECEIVE_QUEUE) | Event::Source(TAP) => self.receive(),
            Event::Queue(_) | Event::Source(_) => Ok(Progress::Idle),
        }
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        if self.watch == Watch::On {
            self.set_watch(Watch::Off);
        }
        let receive = self
            .receive
            .as_mut()
            .map(|receive| (RECEIVE_QUEUE, receive.put_back()));
        let transmit = self
            .transmit
            .as_ref()
            .map(|queue| (TRANSMIT_QUEUE, queue.state()));
        receive.into_iter().chain(transmit).collect()
    }
}
