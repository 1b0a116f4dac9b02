// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the network device.

use std::io;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use serde::{Deserialize, Serialize};
use virtio_wire::net::{NetConfig, RECEIVE_QUEUE, TRANSMIT_QUEUE, feature};
use virtio_wire::{DeviceId, Features};

use super::tap::{FrameIo, Offload, Offloads};
use super::worker::NetWorker;
use super::{MAX_CHAIN_BYTES, NetMetrics, QUEUE_SIZE};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, Limiter, VirtioDevice, Worker};

const STATE_VERSION: u16 = 1;

/// What a network device is made of.
pub struct NetOptions {
    /// Where frames come from and go to.
    pub io: Arc<dyn FrameIo>,
    /// The card's address.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet.
    pub mtu: u16,
    /// What holds its traffic to a rate.
    pub limits: NetLimits,
}

/// What holds a card's traffic to a rate, each way; several cards may share it. The default has no limit.
#[derive(Clone, Debug, Default)]
pub struct NetLimits {
    /// Frames to the guest.
    pub ingress: Arc<Limiter>,
    /// Frames from the guest, those that are dropped among them.
    pub egress: Arc<Limiter>,
}

/// A network card; see the module's documentation.
pub struct Net {
    shared: Arc<Shared>,
}

/// What the device and its worker share.
pub(super) struct Shared {
    pub(super) io: Arc<dyn FrameIo>,
    pub(super) config: NetConfig,
    /// What stands for the tap where workers are watched; see [`super::worker`].
    pub(super) readiness: Epoll,
    pub(super) limits: NetLimits,
    pub(super) metrics: NetMetrics,
}

/// Saved state of a network card: none but its version. Frames in flight are lost, as networks lose them, and the address
/// is the one that the new device was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    version: u16,
}

impl Net {
    /// A card with these options.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(options: NetOptions) -> Result<Self, DeviceError> {
        let readiness = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|error| failed("watch the tap")(error.into()))?;
        Ok(Self {
            shared: Arc::new(Shared {
                io: options.io,
                config: NetConfig {
                    mac: options.mac,
                    mtu: options.mtu,
                },
                readiness,
                limits: options.limits,
                metrics: NetMetrics::default(),
            }),
        })
    }
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Host {
        device: DeviceId::NET,
        operation,
        source,
    }
}

/// What the driver takes, from what it accepted (virtio v1.3 §5.1.3.1: segmentation needs checksums).
fn offloads(features: Features) -> Offloads {
    let guest = |feature| {
        if features.contains(feature | feature::GUEST_CSUM) {
            Offload::Guest
        } else {
            Offload::Host
        }
    };
    Offloads {
        checksum: guest(feature::GUEST_CSUM),
        tcp4: guest(feature::GUEST_TSO4),
        tcp6: guest(feature::GUEST_TSO6),
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Net {
    fn kind(&self) -> DeviceId {
        DeviceId::NET
    }

    fn features(&self) -> Features {
        Features::COMMON
            | feature::CSUM
            | feature::GUEST_CSUM
            | feature::MTU
            | feature::MAC
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::MRG_RXBUF
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config.to_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let receive = activation.queue(RECEIVE_QUEUE, MAX_CHAIN_BYTES)?;
        let transmit = activation.queue(TRANSMIT_QUEUE, MAX_CHAIN_BYTES)?;
        self.shared
            .io
            .set_offloads(offloads(activation.features))
            .map_err(failed("set the tap's offloads"))?;
        let shared = Arc::clone(&self.shared);
        Ok(vec![Box::new(NetWorker::new(
            shared,
            receive,
            transmit,
            &activation,
        ))])
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {
            version: STATE_VERSION,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match state {
            DeviceState::Net(NetState {
                version: STATE_VERSION,
            }) => Ok(()),
            DeviceState::Net(_) => Err(DeviceError::unknown_state_version(DeviceId::NET)),
            _ => Err(DeviceError::foreign_state(DeviceId::NET)),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
