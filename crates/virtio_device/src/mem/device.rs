// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the memory device.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_wire::mem::{MemConfig, REQUEST_QUEUE, feature};
use virtio_wire::{DeviceId, Features};
use vm_memory::GuestAddress;

use super::blocks::Blocks;
use super::worker::MemWorker;
use super::{BLOCK_BYTES, MAX_CHAIN_BYTES, MemMetrics, QUEUE_SIZE};
use crate::balloon::ReleasePages;
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, Interrupt, VirtioDevice, Worker};

const STATE_VERSION: u16 = 1;

/// Who makes memory beneath blocks; the seam to the VMM.
///
/// Caller: the device's worker, or whoever restores the device. One call at a time.
pub trait MemorySlots: Send + Sync {
    /// Makes [`SLOT_BYTES`](super::SLOT_BYTES) of guest memory at `addr`; it reads as zero. A slot that is there already is no error.
    ///
    /// # Errors
    /// The host has no memory or no slot left; nothing has changed.
    fn add(&self, addr: GuestAddress) -> io::Result<()>;

    /// Takes the memory at `addr` away from the guest, and gives it back to the host once no device uses it any more.
    ///
    /// # Errors
    /// The host refuses; the slot is as it was.
    fn remove(&self, addr: GuestAddress) -> io::Result<()>;
}

/// What a memory device is made of.
pub struct MemOptions {
    /// Where blocks can be in guest-physical memory: whole slots.
    pub region: Range<u64>,
    /// Who makes memory.
    pub slots: Arc<dyn MemorySlots>,
    /// Who gives pages of it back.
    pub release: Arc<dyn ReleasePages>,
}

/// A memory device; see the module's documentation.
pub struct Mem {
    shared: Arc<Shared>,
}

/// What the device, its worker and its handles share.
pub(super) struct Shared {
    pub(super) metrics: MemMetrics,
    pub(super) slots: Arc<dyn MemorySlots>,
    pub(super) release: Arc<dyn ReleasePages>,
    region: Range<u64>,
    requested: AtomicU64,
    /// As in `blocks`, for those who must not wait for the worker.
    plugged: AtomicU64,
    /// The worker's, and that of save and restore while there is no worker.
    blocks: Mutex<Blocks>,
    /// Set while a driver is there to be told of a new requested size.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    pub(super) fn requested(&self) -> u64 {
        self.requested.load(Ordering::SeqCst)
    }

    pub(super) fn set_plugged(&self, bytes: u64) {
        self.plugged.store(bytes, Ordering::SeqCst);
    }

    pub(super) fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn region_bytes(&self) -> u64 {
        self.region.end.saturating_sub(self.region.start)
    }

    /// Makes slots; all or none.
    pub(super) fn add_slots(&self, addresses: &[u64]) -> io::Result<()> {
        for (done, addr) in addresses.iter().enumerate() {
            if let Err(error) = self.slots.add(GuestAddress(*addr)) {
                self.metrics.host_failures.increment();
                self.remove_slots(addresses.get(..done).unwrap_or_default());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes slots away, as far as the host lets go.
    pub(super) fn remove_slots(&self, addresses: &[u64]) {
        for addr in addresses {
            if self.slots.remove(GuestAddress(*addr)).is_err() {
                self.metrics.host_failures.increment();
            }
        }
    }
}

/// The host's hand on the device; cheap to clone, for the control thread.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Asks the guest to have `bytes` plugged, rounded up to blocks, capped at the region.
    pub fn set_requested(&self, bytes: u64) {
        let bytes = bytes
            .min(self.shared.region_bytes())
            .next_multiple_of(BLOCK_BYTES);
        let before = self.shared.requested.swap(bytes, Ordering::SeqCst);
        let interrupt = self.shared.interrupt().clone();
        if let Some(interrupt) = interrupt.filter(|_| before != bytes) {
            interrupt.signal_config_change();
        }
    }

    /// Bytes that the guest was asked to have plugged.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.shared.requested()
    }

    /// Bytes that it has plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.shared.plugged.load(Ordering::SeqCst)
    }
}

/// Saved state of a memory device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    version: u16,
    requested: u64,
    /// The slots with plugged blocks, in rising order, and a bit for each of these.
    plugged: Vec<(u32, u64)>,
}

impl Mem {
    /// A device with nothing plugged and nothing requested. The region is cut to whole slots.
    #[must_use]
    pub fn new(options: MemOptions) -> Self {
        let MemOptions {
            region,
            slots,
            release,
        } = options;
        let blocks = Blocks::new(&region);
        let region = region.start..region.start.saturating_add(blocks.len());
        Self {
            shared: Arc::new(Shared {
                metrics: MemMetrics::default(),
                slots,
                release,
                region,
                requested: AtomicU64::new(0),
                plugged: AtomicU64::new(0),
                blocks: Mutex::new(blocks),
                interrupt: Mutex::new(None),
            }),
        }
    }

    /// The host's hand on it.
    #[must_use]
    pub fn handle(&self) -> MemHandle {
        MemHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    fn restore_blocks(&self, present: &[(u32, u64)]) -> Result<(), DeviceError> {
        let bad = |reason| DeviceError::State {
            device: DeviceId::MEM,
            reason,
        };
        let mut blocks = self.shared.blocks();
        let mut new = blocks.clone();
        if !new.load(present) {
            return Err(bad("it has plugged blocks where there can be none"));
        }
        let slots =
            |of: &Blocks| -> Vec<u64> { of.present().map(|(slot, _)| of.address(slot)).collect() };
        let (before, after) = (slots(&blocks), slots(&new));
        let missing = |from: &[u64], of: &[u64]| -> Vec<u64> {
            let absent = of.iter().copied().filter(|addr| !from.contains(addr));
            absent.collect()
        };
        self.shared
            .add_slots(&missing(&before, &after))
            .map_err(|source| DeviceError::Host {
                device: DeviceId::MEM,
                operation: "make the memory that was plugged",
                source,
            })?;
        self.shared.remove_slots(&missing(&after, &before));
        self.shared.set_plugged(new.plugged());
        *blocks = new;
        Ok(())
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Mem {
    fn kind(&self) -> DeviceId {
        DeviceId::MEM
    }

    fn features(&self) -> Features {
        Features::COMMON | feature::UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = &self.shared;
        let config = MemConfig {
            block_size: BLOCK_BYTES,
            addr: shared.region.start,
            region_size: shared.region_bytes(),
            usable_region_size: shared.region_bytes(),
            plugged_size: shared.plugged.load(Ordering::SeqCst),
            requested_size: shared.requested(),
        };
        read_config_bytes(&config.to_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // §5.15.4: nothing in it is the driver's to write.
    }

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let queue = activation.queue(REQUEST_QUEUE, MAX_CHAIN_BYTES)?;
        *self.shared.interrupt() = Some(Arc::clone(&activation.interrupt));
        let worker = |queue| {
            let worker = MemWorker::new(Arc::clone(&self.shared), queue, &activation);
            Box::new(worker) as Box<dyn Worker>
        };
        Ok(queue.map(worker).into_iter().collect())
    }

    fn reset(&mut self) {
        *self.shared.interrupt() = None;
    }

    fn save(&self) -> DeviceState {
        let blocks = self.shared.blocks();
        let present = blocks.present();
        DeviceState::Mem(MemState {
            version: STATE_VERSION,
            requested: self.shared.requested(),
            plugged: present
                .filter_map(|(slot, word)| Some((u32::try_from(slot).ok()?, word)))
                .collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let DeviceState::Mem(state) = state else {
            return Err(DeviceError::foreign_state(DeviceId::MEM));
        };
        if state.version != STATE_VERSION {
            return Err(DeviceError::unknown_state_version(DeviceId::MEM));
        }
        if state.requested > self.shared.region_bytes() || state.requested % BLOCK_BYTES != 0 {
            return Err(DeviceError::State {
                device: DeviceId::MEM,
                reason: "it asks for more than there can be, or for parts of blocks",
            });
        }
        self.restore_blocks(&state.plugged)?;
        self.shared
            .requested
            .store(state.requested, Ordering::SeqCst);
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.shared.metrics.snapshot();
        all.push(("requested_size", self.shared.requested()));
        all.push(("plugged_size", self.shared.plugged.load(Ordering::SeqCst)));
        all
    }
}
