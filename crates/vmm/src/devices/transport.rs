// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The virtio-mmio register file (virtio v1.3 §4.2.2) of one device.
//!
//! Caller: vCPU threads for the guest's accesses, the control thread to pause, save and restore; one at a time, behind
//! the window's lock. Every access is total: what the specification forbids is ignored, and reads as zero.
//!
//! ```text
//! RESET ─ACKNOWLEDGE, DRIVER─> negotiating ─FEATURES_OK─> queues ─DRIVER_OK─> live (workers run)
//!   ^                                                                            │ worker fails: NEEDS_RESET
//!   └───────────────────────── Status := 0, in any state ────────────────────────┘
//! ```

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_device::{Activation, DeviceState, Interrupt, QueueState, VirtioDevice, Worker};
use virtio_wire::{DeviceStatus, Features};
use vmm_sys_util::eventfd::EventFd;

use super::{Memory, Signals};
use crate::VmmError;

/// Register offsets (virtio v1.3 §4.2.2, table 4.1).
pub mod registers {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt", the value of `MagicValue`.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The value of `Version`.
pub(super) const VERSION: u32 = 2;
/// The value of `VendorID`: "CFFR".
const VENDOR: u32 = 0x5246_4643;

/// Runs workers; the seam between register file and I/O thread.
///
/// Caller: transports, behind their window's lock. Neither call waits for a guest.
pub trait WorkerHost: Send + Sync {
    /// Starts the workers of device `index`: `kicks` has the descriptor of each queue, by its index.
    fn start(
        &self,
        index: u16,
        workers: Vec<Box<dyn Worker>>,
        kicks: Vec<Arc<EventFd>>,
        signals: Arc<Signals>,
    );

    /// Pauses and drops the workers of device `index`; after it none touches guest memory. Answers where their queues
    /// stand; nothing if there are none.
    fn stop(&self, index: u16) -> Vec<(u16, QueueState)>;
}

/// Short ways from a guest's kick to a worker's descriptor; the seam between register file and KVM.
///
/// Without one a kick still arrives, by an exit. They are made when a device goes live and not before: on recent kernels a
/// VM that ever had one takes tens of milliseconds longer to tear down.
pub trait Doorbells: Send + Sync {
    /// From now on, writing `queue` to `QueueNotify` of device `index` signals `kick` without an exit. Whether it could be done.
    fn connect(&self, index: u16, queue: u16, kick: &EventFd) -> bool;

    /// Undoes it.
    fn disconnect(&self, index: u16, queue: u16, kick: &EventFd);
}

/// What a register file is made of.
pub struct TransportParts {
    /// The device behind it.
    pub device: Box<dyn VirtioDevice<Memory>>,
    /// Which window it is in.
    pub index: u16,
    /// Guest memory.
    pub memory: Memory,
    /// Its interrupts.
    pub signals: Arc<Signals>,
    /// One descriptor for each of the device's queues.
    pub kicks: Vec<Arc<EventFd>>,
    /// Who runs its workers.
    pub host: Arc<dyn WorkerHost>,
    /// Who makes kicks cheap.
    pub doorbells: Arc<dyn Doorbells>,
}

/// The register file.
pub struct Transport {
    parts: TransportParts,
    state: Registers,
    /// Queues that have a doorbell.
    connected: Vec<u16>,
}

/// Registers that the driver writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueState>,
}

/// Saved state of a register file and its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    registers: Registers,
    pending: u32,
    generation: u32,
    device: DeviceState,
}

impl Transport {
    /// A device that no driver has touched.
    #[must_use]
    pub fn new(parts: TransportParts) -> Self {
        let mut transport = Self {
            parts,
            state: Registers::default(),
            connected: Vec::new(),
        };
        transport.clear();
        transport
    }

    /// A read by the guest.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config) = offset.checked_sub(registers::CONFIG) {
            self.parts.device.read_config(config, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            // §4.2.2.2: registers are 32 bits wide and aligned; others read as zero.
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// A write by the guest.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(registers::CONFIG) {
            self.parts.device.write_config(config, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    /// Whether a driver has the device. One that lets go resets it and acknowledges its existence again, no more.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        DeviceStatus(self.state.status).contains(DeviceStatus::DRIVER)
    }

    /// Stops the workers and keeps their queues' positions; a later [`Transport::resume`] carries on.
    pub fn pause(&mut self) {
        for (index, position) in self.parts.host.stop(self.parts.index) {
            if let Some(queue) = self.state.queues.get_mut(usize::from(index)) {
                *queue = position;
            }
        }
    }

    /// Starts the workers of a live device again.
    pub fn resume(&mut self) {
        let live = self.status().contains(DeviceStatus::DRIVER_OK);
        if live && !self.parts.signals.needs_reset() {
            self.activate();
        }
    }

    /// The state; call it paused.
    #[must_use]
    pub fn save(&self) -> TransportState {
        let mut registers = self.state.clone();
        registers.status = self.status().0;
        TransportState {
            registers,
            pending: self.parts.signals.pending(),
            generation: self.parts.signals.generation(),
            device: self.parts.device.save(),
        }
    }

    /// Takes over a saved state; [`Transport::resume`] then starts the workers.
    ///
    /// # Errors
    /// The state is another device's.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), VmmError> {
        let offered = self.parts.device.features();
        let accepted = Features::from_bits(state.registers.driver_features);
        if state.registers.queues.len() != self.parts.device.queue_sizes().len()
            || !offered.contains(accepted)
        {
            return Err(VmmError::State {
                reason: "a device has other queues or features",
            });
        }
        let name = self.parts.device.kind().name();
        self.parts
            .device
            .restore(&state.device)
            .map_err(|source| VmmError::Device { name, source })?;
        self.state = state.registers.clone();
        self.state.status &= !DeviceStatus::NEEDS_RESET.0;
        self.parts.signals.restore(state.pending, state.generation);
        if DeviceStatus(state.registers.status).contains(DeviceStatus::NEEDS_RESET) {
            self.parts.signals.set_needs_reset();
        }
        Ok(())
    }

    /// What the device is, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.parts.device.kind().name()
    }

    /// Why the device last needed a reset.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.parts.signals.last_error()
    }

    /// Counters of the device.
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.parts.device.metrics()
    }

    /// `Status` as the guest reads it.
    #[must_use]
    pub fn status(&self) -> DeviceStatus {
        let needs_reset = if self.parts.signals.needs_reset() {
            DeviceStatus::NEEDS_RESET
        } else {
            DeviceStatus::RESET
        };
        DeviceStatus(self.state.status) | needs_reset
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            registers::MAGIC_VALUE => MAGIC,
            registers::VERSION => VERSION,
            registers::DEVICE_ID => self.parts.device.kind().0,
            registers::VENDOR_ID => VENDOR,
            registers::DEVICE_FEATURES => {
                let features = self.parts.device.features();
                features.page(self.state.device_features_sel)
            }
            registers::QUEUE_SIZE_MAX => self.max_queue_size(),
            registers::QUEUE_READY => u32::from(self.queue().is_some_and(|queue| queue.ready)),
            registers::INTERRUPT_STATUS => self.parts.signals.pending(),
            registers::STATUS => self.status().0,
            registers::CONFIG_GENERATION => self.parts.signals.generation(),
            // §4.2.2.2: no shared memory region has length and base of all ones.
            registers::SHM_LEN_LOW..=registers::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            registers::DEVICE_FEATURES_SEL => self.state.device_features_sel = value,
            registers::DRIVER_FEATURES_SEL => self.state.driver_features_sel = value,
            registers::DRIVER_FEATURES => self.set_driver_features(value),
            registers::QUEUE_SEL => self.state.queue_sel = value,
            registers::QUEUE_NOTIFY => self.notify(value),
            registers::INTERRUPT_ACK => self.parts.signals.acknowledge(value),
            registers::STATUS => self.set_status(DeviceStatus(value)),
            _ => self.set_queue(offset, value),
        }
    }

    fn max_queue_size(&self) -> u32 {
        usize::try_from(self.state.queue_sel)
            .ok()
            .and_then(|index| self.parts.device.queue_sizes().get(index))
            .map_or(0, |size| u32::from(*size))
    }

    fn queue(&self) -> Option<&QueueState> {
        let index = usize::try_from(self.state.queue_sel).ok()?;
        self.state.queues.get(index)
    }

    /// §3.1.1: features are settled once FEATURES_OK is set.
    fn set_driver_features(&mut self, value: u32) {
        if !DeviceStatus(self.state.status).contains(DeviceStatus::FEATURES_OK) {
            let features = Features::from_bits(self.state.driver_features);
            self.state.driver_features = features
                .with_page(self.state.driver_features_sel, value)
                .bits();
        }
    }

    /// A kick that did not come through the ioeventfd: of another width, or without KVM.
    fn notify(&self, value: u32) {
        let kick = usize::try_from(value)
            .ok()
            .and_then(|index| self.parts.kicks.get(index));
        if let Some(kick) = kick {
            // Fails only if the counter is full, and then the worker is about to wake.
            let _ = kick.write(1);
        }
    }

    /// §4.2.3.2: queues are set up between FEATURES_OK and DRIVER_OK; sizes above the maximum are ignored.
    fn set_queue(&mut self, offset: u64, value: u32) {
        let status = DeviceStatus(self.state.status);
        let open =
            status.contains(DeviceStatus::FEATURES_OK) && !status.contains(DeviceStatus::DRIVER_OK);
        let max = self.max_queue_size();
        let index = usize::try_from(self.state.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.state.queues.get_mut(index).filter(|_| open) else {
            return;
        };
        match (offset, queue.ready) {
            (registers::QUEUE_READY, _) => queue.ready = value & 1 == 1,
            (registers::QUEUE_SIZE, false) if value <= max => {
                queue.size = u16::try_from(value).unwrap_or(0);
            }
            (registers::QUEUE_DESC_LOW, false) => set_low(&mut queue.desc_table, value),
            (registers::QUEUE_DESC_HIGH, false) => set_high(&mut queue.desc_table, value),
            (registers::QUEUE_DRIVER_LOW, false) => set_low(&mut queue.avail_ring, value),
            (registers::QUEUE_DRIVER_HIGH, false) => set_high(&mut queue.avail_ring, value),
            (registers::QUEUE_DEVICE_LOW, false) => set_low(&mut queue.used_ring, value),
            (registers::QUEUE_DEVICE_HIGH, false) => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// §2.1: bits are only ever added, until zero resets the device.
    fn set_status(&mut self, value: DeviceStatus) {
        if value == DeviceStatus::RESET {
            self.reset();
            return;
        }
        let old = DeviceStatus(self.state.status);
        let known = DeviceStatus::ACKNOWLEDGE
            | DeviceStatus::DRIVER
            | DeviceStatus::FEATURES_OK
            | DeviceStatus::DRIVER_OK
            | DeviceStatus::FAILED;
        let mut new = DeviceStatus(old.0 | value.0 & known.0);
        let added = new.without(old);
        if added.contains(DeviceStatus::FEATURES_OK) && !self.features_are_acceptable() {
            new = new.without(DeviceStatus::FEATURES_OK);
        }
        let live = added.contains(DeviceStatus::DRIVER_OK);
        if live && !new.contains(DeviceStatus::FEATURES_OK) {
            new = new.without(DeviceStatus::DRIVER_OK);
        }
        self.state.status = new.0;
        if live && new.contains(DeviceStatus::DRIVER_OK) && !self.parts.signals.needs_reset() {
            self.activate();
        }
    }

    /// §6.1: a driver accepts a subset, with VERSION_1 in it.
    fn features_are_acceptable(&self) -> bool {
        let accepted = Features::from_bits(self.state.driver_features);
        self.parts.device.features().contains(accepted) && accepted.contains(Features::VERSION_1)
    }

    fn activate(&mut self) {
        let interrupt = Arc::clone(&self.parts.signals) as Arc<dyn Interrupt>;
        let activation = Activation {
            memory: self.parts.memory.clone(),
            queues: self.state.queues.clone(),
            features: Features::from_bits(self.state.driver_features),
            interrupt,
        };
        match self.parts.device.activate(activation) {
            Ok(workers) => {
                self.connect();
                self.parts.host.start(
                    self.parts.index,
                    workers,
                    self.parts.kicks.clone(),
                    Arc::clone(&self.parts.signals),
                );
            }
            Err(error) => self.parts.signals.fail(&error),
        }
    }

    /// Gives every queue in use its doorbell.
    fn connect(&mut self) {
        let index = self.parts.index;
        let queues = self.state.queues.iter().zip(&self.parts.kicks);
        for (number, (queue, kick)) in (0u16..).zip(queues) {
            let new = queue.ready && !self.connected.contains(&number);
            if new && self.parts.doorbells.connect(index, number, kick) {
                self.connected.push(number);
            }
        }
    }

    fn disconnect(&mut self) {
        for number in self.connected.drain(..) {
            if let Some(kick) = self.parts.kicks.get(usize::from(number)) {
                let index = self.parts.index;
                self.parts.doorbells.disconnect(index, number, kick);
            }
        }
    }

    fn reset(&mut self) {
        if DeviceStatus(self.state.status).contains(DeviceStatus::DRIVER_OK) {
            self.parts.host.stop(self.parts.index);
        }
        self.disconnect();
        self.parts.device.reset();
        self.clear();
    }

    fn clear(&mut self) {
        self.parts.signals.reset();
        let queues = self.parts.device.queue_sizes().iter();
        self.state = Registers {
            queues: queues
                .map(|size| QueueState {
                    size: *size,
                    ..QueueState::default()
                })
                .collect(),
            ..Registers::default()
        };
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.parts.host.stop(self.parts.index);
        self.disconnect();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
