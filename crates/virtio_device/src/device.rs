// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The transport's view of a device.

use std::sync::Arc;

use virtio_wire::{DeviceId, Features};
use vm_memory::GuestAddressSpace;

use crate::{DeviceError, DeviceState, Interrupt, Queue, QueueState, Worker};

/// Guest memory as devices hold it: cheap to clone, sent to I/O threads. `Arc<GuestMemoryMmap>` is one.
pub trait GuestSpace: GuestAddressSpace + Send + Sync + 'static {}

impl<T: GuestAddressSpace + Send + Sync + 'static> GuestSpace for T {}

/// One virtio device, as its transport drives it.
///
/// Caller: the transport, one call at a time (it holds the device behind a lock); on vCPU threads
/// for what a guest register access causes, on the control thread for save, restore and metrics.
///
/// Order:
/// ```text
///             ┌────────────── reset ───────────────┐
///             v                                    │
///   new ─> inactive ── activate ──> active ── (workers paused and dropped)
///             ^  │
///   restore ──┘  └─ features, queue_sizes, config, save: in any state
/// ```
/// `activate` is called once per DRIVER_OK; the transport pauses and drops all workers before
/// `reset` or a second `activate`. `restore` comes before the first `activate` of a new device. To
/// resume a restored device the transport calls `activate` with the saved [`QueueState`]s.
///
/// Failure: only `activate` and `restore` fail; the device is then as before the call, and the transport sets
/// DEVICE_NEEDS_RESET or refuses the snapshot. Nothing here blocks on the guest.
pub trait VirtioDevice<S: GuestSpace>: Send {
    /// What kind of device this is.
    fn kind(&self) -> DeviceId;

    /// Every feature offered, ring and version bits included; constant for the life of the device.
    fn features(&self) -> Features;

    /// The largest size of each queue (a power of two, at most [`crate::MAX_QUEUE_SIZE`]); constant.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from configuration space at `offset`; bytes past its end read as zero (virtio v1.3 §2.5).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A guest's write to configuration space; what is not writable is ignored (§2.5.1).
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Goes live: validates the queues and returns the workers that serve them (queues not ready have none).
    ///
    /// # Errors
    /// A queue whose size, alignment or rings are not usable, or a resource the host refuses.
    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError>;

    /// Back to the state before any driver (§2.4); workers are gone already. Host-side settings stay.
    fn reset(&mut self);

    /// The state that a new device with the same resources needs to carry on; call it with workers paused.
    fn save(&self) -> DeviceState;

    /// Takes over a saved state.
    ///
    /// # Errors
    /// The state is another device's, of an unknown version, or holds values this device could not
    /// have saved.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError>;

    /// Name and value of each counter since the device was made.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}

/// What a device gets when the driver says DRIVER_OK.
pub struct Activation<S> {
    /// Guest memory.
    pub memory: S,
    /// State of each queue, by queue index: as the driver wrote it, or as saved.
    pub queues: Vec<QueueState>,
    /// Features that the driver accepted; the transport has checked that they were offered.
    pub features: Features,
    /// How to interrupt the guest.
    pub interrupt: Arc<dyn Interrupt>,
}

impl<S: GuestSpace> Activation<S> {
    /// Queue `index` ready to be served, or `None` if the driver did not enable it.
    ///
    /// `max_chain_bytes` caps the sum of all buffers of one chain.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] if its size or addresses are not usable.
    pub fn queue(&self, index: u16, max_chain_bytes: u32) -> Result<Option<Queue>, DeviceError> {
        match self.queues.get(usize::from(index)) {
            Some(state) if state.ready => Queue::new(
                index,
                state,
                self.features,
                max_chain_bytes,
                &*self.memory.memory(),
            )
            .map(Some),
            _ => Ok(None),
        }
    }
}

/// Fills `data` from `config` at `offset`; bytes past the end read as zero (virtio v1.3 §2.5).
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = config.get(start..).unwrap_or_default();
    let bytes = rest.iter().copied().chain(std::iter::repeat(0));
    data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
}
