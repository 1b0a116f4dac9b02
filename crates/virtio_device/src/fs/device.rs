// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the file system device.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd as CallFd};
use serde::{Deserialize, Serialize};
use virtio_wire::fs::{self as wire, CONFIG_BYTES, QUEUES};
use virtio_wire::vhost_user::{
    F_PROTOCOL_FEATURES, PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK, Region, Request,
};
use virtio_wire::{DeviceId, Features};
use vmm_sys_util::eventfd::EventFd;

use super::FsMetrics;
use super::front_end::FrontEnd;
use super::worker::FsWorker;
use crate::device::read_config_bytes;
use crate::{
    Activation, DeviceError, DeviceState, GuestSpace, MAX_QUEUE_SIZE, QueueState, VirtioDevice,
    Worker,
};

const STATE_VERSION: u16 = 1;
/// Linux derives the largest request from it: 1,020 pages.
const QUEUE_SIZES: [u16; QUEUES] = [MAX_QUEUE_SIZE; QUEUES];
const PROTOCOL_FEATURES: u64 = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK;

/// What a file system device is made of.
pub struct FsOptions {
    /// The name by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The vhost-user connection to the server.
    pub connection: UnixStream,
    /// Guest memory as the server maps it: all of it, in this file, by regions.
    pub memory: Arc<File>,
    /// The regions.
    pub regions: Vec<Region>,
    /// The transport's kick of each queue.
    pub kicks: Vec<Arc<EventFd>>,
    /// Hears once that the server is gone or misbehaves. On the I/O thread; must not wait for it.
    pub on_loss: Box<dyn Fn(String) + Send + Sync>,
}

/// Saved state of a file system device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    version: u16,
    tag: String,
}

/// A file system device; see the module's documentation.
pub struct Fs {
    tag: String,
    config: [u8; CONFIG_BYTES],
    features: Features,
    shared: Arc<Shared>,
}

/// What the device and its workers share.
pub(super) struct Shared {
    front_end: Mutex<FrontEnd>,
    /// For the event loop alone.
    pub(super) connection: Arc<UnixStream>,
    pub(super) memory: Arc<File>,
    pub(super) regions: Vec<Region>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    /// The server's interrupts, by queue.
    pub(super) calls: Vec<CallFd>,
    pub(super) metrics: FsMetrics,
    on_loss: Box<dyn Fn(String) + Send + Sync>,
}

impl Shared {
    /// Held by the worker while it speaks with the server, by nobody else once the device is made.
    pub(super) fn front_end(&self) -> MutexGuard<'_, FrontEnd> {
        self.front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The server is of no use any more.
    pub(super) fn lost(&self, operation: &'static str, source: io::Error) -> DeviceError {
        let error = host(operation)(source);
        self.metrics.losses.increment();
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        (self.on_loss)(format!("{error}: {}", cause.unwrap_or_default()));
        error
    }
}

pub(super) fn host(operation: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host {
        device: DeviceId::FS,
        operation,
        source,
    }
}

impl Fs {
    /// Takes up the conversation with the server.
    ///
    /// # Errors
    /// [`DeviceError::Host`]: the tag cannot be one, or the server does not answer in time, or lacks a feature.
    pub fn new(options: FsOptions) -> Result<Self, DeviceError> {
        let config = wire::config(&options.tag)
            .map_err(io::Error::other)
            .map_err(host("have this tag"))?;
        let calls =
            (0..QUEUES).map(|_| CallFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC));
        let calls = calls
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::from)
            .map_err(host("create a queue's event"))?;
        let connection = Arc::new(options.connection);
        let mut front_end = FrontEnd::new(Arc::clone(&connection));
        let offered =
            negotiate(&mut front_end).map_err(host("come to terms with the file server"))?;
        let features = Features::from_bits(offered & Features::COMMON.bits());
        if !features.contains(Features::VERSION_1) {
            let source = io::Error::other("it does not know virtio 1");
            return Err(host("come to terms with the file server")(source));
        }
        Ok(Self {
            tag: options.tag,
            config,
            features,
            shared: Arc::new(Shared {
                front_end: Mutex::new(front_end),
                connection,
                memory: options.memory,
                regions: options.regions,
                kicks: options.kicks,
                calls,
                metrics: FsMetrics::default(),
                on_loss: options.on_loss,
            }),
        })
    }
}

/// Answers the features that the server offers.
fn negotiate(front_end: &mut FrontEnd) -> io::Result<u64> {
    front_end.begin();
    front_end.tell(Request::SET_OWNER, &[])?;
    let features = front_end.ask(Request::GET_FEATURES)?;
    if features & F_PROTOCOL_FEATURES == 0 {
        return Err(io::Error::other("it has no protocol features"));
    }
    let offered = front_end.ask(Request::GET_PROTOCOL_FEATURES)?;
    if offered & PROTOCOL_FEATURES != PROTOCOL_FEATURES {
        return Err(io::Error::other(
            "it cannot confirm requests, or has one queue",
        ));
    }
    let accepted = PROTOCOL_FEATURES.to_le_bytes();
    front_end.tell(Request::SET_PROTOCOL_FEATURES, &accepted)?;
    Ok(features)
}

impl<S: GuestSpace> VirtioDevice<S> for Fs {
    fn kind(&self) -> DeviceId {
        DeviceId::FS
    }

    fn features(&self) -> Features {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let mut queues: Vec<(u16, QueueState)> = Vec::new();
        for (index, state) in (0u16..).zip(&activation.queues) {
            // Chains are the server's to check; that the rings are in memory is checked here.
            if activation.queue(index, u32::MAX)?.is_some() {
                queues.push((index, state.clone()));
            }
        }
        Ok(vec![Box::new(FsWorker::new(
            Arc::clone(&self.shared),
            queues,
            activation.features,
            activation.interrupt,
        ))])
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            version: STATE_VERSION,
            tag: self.tag.clone(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match state {
            // What the guest has looked up and opened is known to the server that it spoke with, and to no other.
            DeviceState::Fs(_) => Err(DeviceError::State {
                device: DeviceId::FS,
                reason: "its open files are in another file server",
            }),
            _ => Err(DeviceError::foreign_state(DeviceId::FS)),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
