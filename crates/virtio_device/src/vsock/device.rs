// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the vsock device.

use std::collections::BTreeSet;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ids::{GuestCid, VsockPort};
use serde::{Deserialize, Serialize};
use virtio_wire::{DeviceId, Features};

use super::host::Poller;
use super::muxer::{Muxer, MuxerParts, TransportReset};
use super::worker::{Queues, VsockWorker};
use super::{
    DATA_QUEUE_SIZE, EVENT_QUEUE_SIZE, HostPorts, MAX_CHAIN_BYTES, QUEUE_EVENTS, QUEUE_TO_GUEST,
    QUEUE_TO_HOST, VsockDump, VsockMetrics,
};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, VirtioDevice, Worker};

/// Version of [`VsockState`].
const STATE_VERSION: u16 = 1;

/// Where the device gets the time; a test brings its own.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// What a vsock device is made of.
pub struct VsockOptions {
    /// CID of the guest.
    pub guest_cid: GuestCid,
    /// Where host processes connect.
    pub listener: UnixListener,
    /// Ports of the host that the guest may connect to.
    pub host_ports: BTreeSet<VsockPort>,
    /// Opens them.
    pub ports: Box<dyn HostPorts>,
}

/// Saved state of a vsock device. Connections are not in it: a restore resets them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    version: u16,
    guest_cid: u32,
}

/// A vsock device; see the module's documentation.
pub struct Vsock {
    shared: Arc<Shared>,
    guest_cid: GuestCid,
    /// The next activation is that of a restored guest, which must hear of it.
    restored: bool,
}

/// What the device and its worker share.
pub(super) struct Shared {
    muxer: Mutex<Muxer>,
    pub(super) poller: Arc<Poller>,
    pub(super) clock: Clock,
    metrics: Arc<VsockMetrics>,
}

impl Shared {
    /// The worker holds this while it serves one event, which never blocks; others only look.
    pub(super) fn muxer(&self) -> MutexGuard<'_, Muxer> {
        self.muxer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks into a device that its transport owns. Cheap to clone.
#[derive(Clone)]
pub struct VsockHandle(Arc<Shared>);

impl VsockHandle {
    /// The state of the device and its connections now.
    #[must_use]
    pub fn dump(&self) -> VsockDump {
        self.0.muxer().dump()
    }
}

impl Vsock {
    /// A device with these resources.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the host has no descriptors left or the listener is not a socket.
    pub fn new(options: VsockOptions) -> Result<Self, DeviceError> {
        Self::with_clock(options, Arc::new(Instant::now))
    }

    /// A device whose time comes from `clock`. Its timer runs on the host's all the same: whoever moves the clock by
    /// hand calls the worker by hand.
    ///
    /// # Errors
    /// As [`Vsock::new`].
    pub fn with_clock(options: VsockOptions, clock: Clock) -> Result<Self, DeviceError> {
        let host = |operation| {
            move |source| DeviceError::Host {
                device: DeviceId::VSOCK,
                operation,
                source,
            }
        };
        let listener = options.listener;
        listener
            .set_nonblocking(true)
            .map_err(host("set up its listening socket"))?;
        let poller = Poller::new(&listener).map_err(host("watch its listening socket"))?;
        let poller = Arc::new(poller);
        let metrics = Arc::new(VsockMetrics::default());
        let parts = MuxerParts {
            guest_cid: options.guest_cid,
            allowed: options.host_ports,
            listener,
            ports: options.ports,
            poller: Arc::clone(&poller),
            metrics: Arc::clone(&metrics),
        };
        let muxer = Mutex::new(Muxer::new(parts, clock()));
        Ok(Self {
            shared: Arc::new(Shared {
                muxer,
                poller,
                clock,
                metrics,
            }),
            guest_cid: options.guest_cid,
            restored: false,
        })
    }

    /// A handle to look into the device.
    #[must_use]
    pub fn handle(&self) -> VsockHandle {
        VsockHandle(Arc::clone(&self.shared))
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Vsock {
    fn kind(&self) -> DeviceId {
        DeviceId::VSOCK
    }

    fn features(&self) -> Features {
        Features::COMMON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[DATA_QUEUE_SIZE, DATA_QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let guest_cid = u64::from(self.guest_cid.get()).to_le_bytes(); // §5.10.4: the only field
        read_config_bytes(&guest_cid, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let to_guest = activation.queue(QUEUE_TO_GUEST, MAX_CHAIN_BYTES)?;
        let to_host = activation.queue(QUEUE_TO_HOST, MAX_CHAIN_BYTES)?;
        let events = activation.queue(QUEUE_EVENTS, MAX_CHAIN_BYTES)?;
        let (Some(to_guest), Some(to_host)) = (to_guest, to_host) else {
            return Ok(Vec::new()); // no driver of a socket device does without one of them
        };
        // After a pause, connections go on: the guest has not noticed it.
        if std::mem::take(&mut self.restored) {
            let mut muxer = self.shared.muxer();
            muxer.drop_connections();
            if events.is_some() {
                muxer.transport_reset = TransportReset::Wanted;
            }
        }
        let queues = Queues {
            to_guest,
            to_host,
            events,
        };
        let shared = Arc::clone(&self.shared);
        let worker = VsockWorker::new(shared, queues, &activation);
        Ok(vec![Box::new(worker)])
    }

    fn reset(&mut self) {
        self.restored = false;
        self.shared.muxer().drop_connections();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            version: STATE_VERSION,
            guest_cid: self.guest_cid.get(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let refuse = |reason| DeviceError::State {
            device: DeviceId::VSOCK,
            reason,
        };
        let DeviceState::Vsock(state) = state else {
            return Err(refuse("it belongs to another kind of device"));
        };
        if state.version != STATE_VERSION {
            return Err(refuse("its version is not one this build knows"));
        }
        if state.guest_cid != self.guest_cid.get() {
            return Err(refuse("the guest has another CID now"));
        }
        self.restored = true;
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
