// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The disks, which come and go while the VM runs, and the slots that they share with the file system device.

use std::fs::File;
use std::sync::Arc;

use virtio_device::block::{Access, Block, BlockOptions, FileDisk};

use super::Machine;
use crate::boot::cmdline;
use crate::control::{DiskAccess, DiskConfig};
use crate::devices::Transport;
use crate::{VmmError, layout};

/// Request queues of a disk: one thread serves all of them.
const DISK_QUEUES: u16 = 1;

impl Machine {
    /// Puts a disk into a free slot; answers the guest's name of the slot's device.
    ///
    /// # Errors
    /// No slot is free, the serial is in use, or the file is no disk.
    pub fn attach_disk(&mut self, disk: &DiskConfig, file: File) -> Result<String, VmmError> {
        if self.disks.values().any(|serial| *serial == disk.serial) {
            return Err(VmmError::SerialInUse {
                serial: disk.serial.clone(),
            });
        }
        let index = self.free_slot()?;
        let block = Block::new(BlockOptions {
            disk: Arc::new(FileDisk::new(file)),
            access: match disk.access {
                DiskAccess::ReadOnly => Access::ReadOnly,
                DiskAccess::ReadWrite => Access::ReadWrite,
            },
            serial: disk.serial.clone(),
            queues: DISK_QUEUES,
            limiter: Arc::clone(&self.limiters.disk),
        })
        .map_err(|source| VmmError::Device {
            name: "block",
            source,
        })?;
        self.add_device(index, Box::new(block))?;
        self.disks.insert(index, disk.serial.clone());
        Ok(cmdline::platform_device(index))
    }

    /// Empties the slot of the disk with this serial; nothing if there is none.
    ///
    /// # Errors
    /// [`VmmError::DiskBusy`] while the guest's driver has it.
    pub fn detach_disk(&mut self, serial: &str) -> Result<(), VmmError> {
        let Some(index) = self
            .disks
            .iter()
            .find(|(_, found)| *found == serial)
            .map(|(index, _)| *index)
        else {
            return Ok(());
        };
        if let Some(mut window) = self.bus.window(index) {
            if window.as_ref().is_some_and(Transport::is_in_use) {
                return Err(VmmError::DiskBusy {
                    serial: serial.to_owned(),
                });
            }
            window.take();
        }
        self.disks.remove(&index);
        Ok(())
    }

    /// A slot that has neither disk nor file system.
    pub(super) fn free_slot(&self) -> Result<u16, VmmError> {
        let slots = self.disk_slots;
        let file_system = self.file_system.as_ref().map(|(index, _)| *index);
        (layout::FIRST_DISK_SLOT..layout::FIRST_DISK_SLOT.saturating_add(slots))
            .find(|index| !self.disks.contains_key(index) && file_system != Some(*index))
            .ok_or(VmmError::NoSlot { slots })
    }
}
