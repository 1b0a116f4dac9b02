// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Guest memory that comes and goes while the VM runs.
//!
//! A slot is one mapping, one memory slot of KVM's and one region in the devices' view, and they come and go together:
//! the mapping belongs to the region, so it is unmapped when the last device that took the view before has let go of it.
//! A vCPU that touches what is in no slot leaves the guest as it does for any address without memory.
#![expect(unsafe_code, reason = "gives KVM the addresses of guest memory")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use virtio_device::mem::{MemorySlots, SLOT_BYTES};
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use crate::devices::Memory;
use crate::memory::{self, Pages};

/// KVM's number of the first slot: 0 and 1 are the memory that the VM starts with.
const FIRST_SLOT: u32 = 2;

/// Makes the slots of one VM.
pub(crate) struct HotSlots {
    vm: Arc<VmFd>,
    memory: Memory,
    region: Range<u64>,
    pages: Pages,
    /// Where memory is once it is shared: a file, and the offset of the region in it.
    shared: Mutex<Option<(Arc<File>, u64)>>,
}

impl HotSlots {
    /// For `vm` and the devices' view of its memory; slots can be in `region`.
    pub(crate) fn new(vm: Arc<VmFd>, memory: Memory, region: Range<u64>, pages: Pages) -> Self {
        Self {
            vm,
            memory,
            region,
            pages,
            shared: Mutex::new(None),
        }
    }

    /// From now on new slots are parts of `file`, in which the region starts at `offset`.
    pub(crate) fn share(&self, file: Arc<File>, offset: u64) {
        *self.shared() = Some((file, offset));
    }

    fn shared(&self) -> MutexGuard<'_, Option<(Arc<File>, u64)>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self, addr: u64) -> io::Result<u32> {
        let offset = addr.checked_sub(self.region.start);
        let offset = offset.filter(|_| addr < self.region.end);
        offset
            .and_then(|offset| u32::try_from(offset / SLOT_BYTES).ok())
            .and_then(|index| index.checked_add(FIRST_SLOT))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }

    /// Tells KVM of a slot; one of no bytes is none.
    fn set(&self, addr: u64, bytes: u64, host: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.number(addr)?,
            flags: 0,
            guest_phys_addr: addr,
            memory_size: bytes,
            userspace_addr: host,
        };
        // SAFETY: the address is that of a whole mapping, which is not unmapped before KVM is told that the slot is gone;
        // or there are no bytes.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    fn replace(&self, view: GuestMemoryMmap) {
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(view);
    }
}

impl MemorySlots for HotSlots {
    fn add(&self, addr: GuestAddress) -> io::Result<()> {
        let view = self.memory.memory();
        if view.find_region(addr).is_some() {
            return Ok(());
        }
        self.number(addr.0)?;
        let file = self.shared().as_ref().map(|(file, offset)| {
            let offset = offset.saturating_add(addr.0.saturating_sub(self.region.start));
            FileOffset::from_arc(Arc::clone(file), offset)
        });
        let region = memory::map_more(addr, SLOT_BYTES, self.pages, file)?;
        let host = region.as_ptr() as u64;
        let view = view
            .insert_region(Arc::new(region))
            .map_err(io::Error::other)?;
        self.set(addr.0, SLOT_BYTES, host)?;
        self.replace(view);
        Ok(())
    }

    fn remove(&self, addr: GuestAddress) -> io::Result<()> {
        let view = self.memory.memory();
        let Ok((view, _region)) = view.remove_region(addr, SLOT_BYTES) else {
            return Ok(());
        };
        self.set(addr.0, 0, 0)?;
        self.replace(view);
        Ok(())
    }
}
