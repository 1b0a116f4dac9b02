// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a VMM needs to share its guest's memory with a file server.

use std::fs::File;
use std::io;

use ids::Bytes;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Files for the VMM.
pub(crate) struct SharedMemory {
    /// Where guest memory goes. Nobody who has it can change its size, so the file server cannot take memory away from
    /// under the VMM.
    pub(crate) memory: File,
    /// The VMM's own page map, which it has no path to.
    pub(crate) pagemap: File,
}

impl SharedMemory {
    /// For the VMM with this process id, which has not been reaped, and a guest that can have so much memory. What of it
    /// the guest does not have costs nothing.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn prepare(pid: u32, size: Bytes) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let memory = memfd_create("guest-memory", flags)
            // Linux before 6.3 does not know the last flag.
            .or_else(|_| memfd_create("guest-memory", flags - MemfdFlags::NOEXEC_SEAL))?;
        let memory = File::from(memory);
        memory.set_len(size.0)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&memory, seals)?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { memory, pagemap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_of_guest_memory_is_fixed() {
        let files = SharedMemory::prepare(std::process::id(), Bytes(2 << 20)).unwrap();
        assert_eq!(files.memory.metadata().unwrap().len(), 2 << 20);
        assert!(files.memory.set_len(0).is_err());
        assert!(files.memory.set_len(4 << 20).is_err());
    }
}
