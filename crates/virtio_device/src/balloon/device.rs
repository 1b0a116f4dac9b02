// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the balloon.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_wire::balloon::{
    BalloonConfig, CONFIG_ACTUAL_OFFSET, DEFLATE_QUEUE, INFLATE_QUEUE, PAGE_BYTES, feature,
};
use virtio_wire::{DeviceId, Features};

use super::worker::{BalloonWorker, Queues};
use super::{BalloonMetrics, MAX_PFN_BYTES, QUEUE_SIZE, QUEUES, ReleasePages};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, Interrupt, VirtioDevice, Worker};

const STATE_VERSION: u16 = 1;

/// A balloon; see the module's documentation.
pub struct Balloon {
    shared: Arc<Shared>,
    release: Arc<dyn ReleasePages>,
}

/// What the device, its worker and its handles share.
pub(super) struct Shared {
    pub(super) metrics: BalloonMetrics,
    max_pages: u32,
    target: AtomicU32,
    actual: AtomicU32,
    /// Set while a driver is there to be told of a new target.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's hand on the balloon; cheap to clone, for the control thread.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Asks the guest to hold `bytes` (rounded down to pages, capped at its memory) in the balloon.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES)
            .unwrap_or(u32::MAX)
            .min(self.shared.max_pages);
        let before = self.shared.target.swap(pages, Ordering::Relaxed);
        let interrupt = self.shared.interrupt().clone();
        if let Some(interrupt) = interrupt.filter(|_| before != pages) {
            interrupt.signal_config_change();
        }
    }

    /// Bytes that the guest was asked to hold in the balloon.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::Relaxed)).saturating_mul(PAGE_BYTES)
    }

    /// Bytes that the guest says it holds in the balloon, at most its memory.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Relaxed)).saturating_mul(PAGE_BYTES)
    }
}

/// Saved state of a balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    version: u16,
    target: u32,
    actual: u32,
}

impl Balloon {
    /// A balloon for a guest of `memory_bytes`.
    #[must_use]
    pub fn new(memory_bytes: u64, release: Arc<dyn ReleasePages>) -> Self {
        let shared = Shared {
            metrics: BalloonMetrics::default(),
            max_pages: u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(u32::MAX),
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            interrupt: Mutex::new(None),
        };
        Self {
            shared: Arc::new(shared),
            release,
        }
    }

    /// The host's hand on it.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Balloon {
    fn kind(&self) -> DeviceId {
        DeviceId::BALLOON
    }

    fn features(&self) -> Features {
        // Without MUST_TELL_HOST a guest may use pages before it says so: nothing here minds. DEFLATE_ON_OOM is not
        // offered: what a pod was made smaller by is not its own to take back, and its MemTotal says so.
        Features::COMMON | feature::REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = BalloonConfig {
            num_pages: self.shared.target.load(Ordering::Relaxed),
            actual: self.shared.actual.load(Ordering::Relaxed),
        };
        read_config_bytes(&config.to_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // §5.5.4: `actual` is the driver's to write, as one 32-bit access (§4.2.2.2).
        if let (CONFIG_ACTUAL_OFFSET, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            let actual = u32::from_le_bytes(bytes).min(self.shared.max_pages);
            self.shared.actual.store(actual, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let mut reporting = Vec::new();
        for index in 2..u16::try_from(QUEUES).unwrap_or(0) {
            // Reported buffers are free memory, up to all of it.
            reporting.extend(activation.queue(index, u32::MAX)?);
        }
        let queues = Queues {
            inflate: activation.queue(INFLATE_QUEUE, MAX_PFN_BYTES)?,
            deflate: activation.queue(DEFLATE_QUEUE, MAX_PFN_BYTES)?,
            reporting,
        };
        *self.shared.interrupt() = Some(Arc::clone(&activation.interrupt));
        let (shared, release) = (Arc::clone(&self.shared), Arc::clone(&self.release));
        Ok(vec![Box::new(BalloonWorker::new(
            shared,
            release,
            queues,
            &activation,
        ))])
    }

    fn reset(&mut self) {
        *self.shared.interrupt() = None;
        self.shared.actual.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            version: STATE_VERSION,
            target: self.shared.target.load(Ordering::Relaxed),
            actual: self.shared.actual.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let DeviceState::Balloon(state) = state else {
            return Err(DeviceError::foreign_state(DeviceId::BALLOON));
        };
        if state.version != STATE_VERSION {
            return Err(DeviceError::unknown_state_version(DeviceId::BALLOON));
        }
        if state.target > self.shared.max_pages || state.actual > self.shared.max_pages {
            let reason = "it holds more pages than the guest has memory";
            return Err(DeviceError::State {
                device: DeviceId::BALLOON,
                reason,
            });
        }
        self.shared.target.store(state.target, Ordering::Relaxed);
        self.shared.actual.store(state.actual, Ordering::Relaxed);
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
