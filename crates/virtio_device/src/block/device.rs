// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the block device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_wire::blk::{
    BlkConfig, CONFIG_WRITEBACK_OFFSET, ID_BYTES, SECTOR_BYTES, WRITE_FEATURES, feature,
};
use virtio_wire::{DeviceId, Features};

use super::request::Limits;
use super::worker::BlockWorker;
use super::{
    BlockMetrics, DiskIo, MAX_DISCARD_SECTORS, MAX_QUEUES, MAX_RANGES, MAX_REQUEST_BYTES,
    MAX_WRITE_ZEROES_SECTORS, QUEUE_SIZE, SEG_MAX, SIZE_MAX,
};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, Limiter, VirtioDevice, Worker};

/// Version of [`BlockState`].
const STATE_VERSION: u16 = 1;

/// Whether the guest may change the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// It may not.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// What a block device is made of.
pub struct BlockOptions {
    /// The storage.
    pub disk: Arc<dyn DiskIo>,
    /// What the guest may do.
    pub access: Access,
    /// Serial number, by which the guest's `/dev/disk/by-id` names it; at most 20 bytes (§5.2.6).
    pub serial: String,
    /// Request queues, 1 to 64.
    pub queues: u16,
    /// What holds its requests to a rate; several disks may share it. The default has no limit.
    pub limiter: Arc<Limiter>,
}

/// A block device; see the module's documentation.
pub struct Block {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
}

/// What the device and its workers share.
pub(super) struct Shared {
    pub(super) disk: Arc<dyn DiskIo>,
    pub(super) serial: [u8; ID_BYTES],
    pub(super) metrics: BlockMetrics,
    pub(super) limiter: Arc<Limiter>,
    capacity: u64,
    access: Access,
    /// The `writeback` field of configuration space, which the driver may change at any time.
    writeback: AtomicBool,
}

/// Saved state of a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    version: u16,
    capacity: u64,
    access: Access,
    queues: u16,
    writeback: bool,
}

impl Block {
    /// A block device over `options.disk`, whose size in whole sectors is read once, here.
    ///
    /// # Errors
    /// The disk's size cannot be read; the serial number or the number of queues is out of bounds.
    pub fn new(options: BlockOptions) -> Result<Self, DeviceError> {
        let host = |operation, source| DeviceError::Host {
            device: DeviceId::BLOCK,
            operation,
            source,
        };
        let size = options
            .disk
            .size()
            .map_err(|source| host("read the size of its disk", source))?;
        let mut serial = [0; ID_BYTES];
        let text = options.serial.as_bytes();
        if text.len() > ID_BYTES {
            return Err(host(
                "take a serial number of more than 20 bytes",
                std::io::ErrorKind::InvalidInput.into(),
            ));
        }
        serial
            .iter_mut()
            .zip(text)
            .for_each(|(to, from)| *to = *from);
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(host(
                "have that number of queues (1 to 64)",
                std::io::ErrorKind::InvalidInput.into(),
            ));
        }
        let shared = Shared {
            disk: options.disk,
            serial,
            metrics: BlockMetrics::default(),
            limiter: options.limiter,
            capacity: size / SECTOR_BYTES,
            access: options.access,
            writeback: AtomicBool::new(true),
        };
        Ok(Self {
            shared: Arc::new(shared),
            queue_sizes: vec![QUEUE_SIZE; usize::from(options.queues)],
        })
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.queue_sizes.len()).unwrap_or(MAX_QUEUES)
    }

    fn config(&self) -> BlkConfig {
        BlkConfig {
            capacity: self.shared.capacity,
            size_max: SIZE_MAX,
            seg_max: SEG_MAX,
            blk_size: 512,
            physical_block_exp: 3, // 4096 bytes: what host file systems and disks work in
            min_io_size: 8,
            opt_io_size: 0,
            writeback: u8::from(self.shared.writeback.load(Ordering::Relaxed)),
            num_queues: self.queues(),
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_discard_seg: MAX_RANGES,
            discard_sector_alignment: 8,
            max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS,
            max_write_zeroes_seg: MAX_RANGES,
            write_zeroes_may_unmap: 1,
        }
    }
}

impl Shared {
    /// Whether a write must be durable before it completes (§5.2.6.2).
    pub(super) fn writes_through(&self, features: Features) -> bool {
        let cached = if features.contains(feature::CONFIG_WCE) {
            self.writeback.load(Ordering::Relaxed)
        } else {
            features.contains(feature::FLUSH)
        };
        !cached
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Block {
    fn kind(&self) -> DeviceId {
        DeviceId::BLOCK
    }

    fn features(&self) -> Features {
        let common = Features::COMMON
            | feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::MQ;
        match self.shared.access {
            Access::ReadOnly => common | feature::RO,
            Access::ReadWrite => common | WRITE_FEATURES,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config().to_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // §5.2.4: `writeback` is the one field a driver may write, and only with CONFIG_WCE, which
        // a read-only disk lacks.
        if let (CONFIG_WRITEBACK_OFFSET, [value], Access::ReadWrite) =
            (offset, data, self.shared.access)
        {
            self.shared.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let limits = Limits {
            capacity: self.shared.capacity,
            access: self.shared.access,
            features: activation.features,
        };
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        for index in 0..self.queues() {
            if let Some(queue) = activation.queue(index, MAX_REQUEST_BYTES)? {
                let shared = Arc::clone(&self.shared);
                workers.push(Box::new(BlockWorker::new(
                    shared,
                    limits,
                    queue,
                    &activation,
                )));
            }
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            version: STATE_VERSION,
            capacity: self.shared.capacity,
            access: self.shared.access,
            queues: self.queues(),
            writeback: self.shared.writeback.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let refuse = |reason| DeviceError::State {
            device: DeviceId::BLOCK,
            reason,
        };
        let DeviceState::Block(state) = state else {
            return Err(DeviceError::foreign_state(DeviceId::BLOCK));
        };
        if state.version != STATE_VERSION {
            return Err(DeviceError::unknown_state_version(DeviceId::BLOCK));
        }
        if state.capacity != self.shared.capacity {
            return Err(refuse("the disk has another size now"));
        }
        if state.access != self.shared.access || state.queues != self.queues() {
            return Err(refuse(
                "the device has another access mode or number of queues now",
            ));
        }
        self.shared
            .writeback
            .store(state.writeback, Ordering::Relaxed);
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
