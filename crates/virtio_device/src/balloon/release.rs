// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Giving pages back to the host.
#![expect(unsafe_code, reason = "madvise takes a raw address")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::GuestSpace;

/// Who gives pages back; the seam at which tests look on.
///
/// Caller: the balloon's worker. The range is page-aligned; it may lie outside guest memory, which
/// is an error.
pub trait ReleasePages: Send + Sync {
    /// Frees the host's memory behind `len` bytes of guest memory at `addr`; what the guest reads
    /// there later is undefined until it writes.
    ///
    /// # Errors
    /// The range is not guest memory, or the host refuses; part of the range may have been released.
    fn release(&self, addr: GuestAddress, len: u64) -> io::Result<()>;
}

/// What guest memory is made of, which decides how a page is freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private to this process: anonymous, or a private mapping of a template.
    Private,
    /// Shared with other processes, on a memfd: the file's page must go too.
    Shared,
}

/// What guest memory is made of now; it may change while the VM is paused. Clones are one.
#[derive(Clone, Debug)]
pub struct BackingSwitch(Arc<AtomicBool>);

impl BackingSwitch {
    /// Starts with `backing`.
    #[must_use]
    pub fn new(backing: Backing) -> Self {
        Self(Arc::new(AtomicBool::new(backing == Backing::Shared)))
    }

    /// From now on it is `backing`.
    pub fn set(&self, backing: Backing) {
        self.0.store(backing == Backing::Shared, Ordering::SeqCst);
    }

    fn get(&self) -> Backing {
        if self.0.load(Ordering::SeqCst) {
            Backing::Shared
        } else {
            Backing::Private
        }
    }
}

/// Frees pages of mapped guest memory.
pub struct MemoryRelease<S> {
    memory: S,
    backing: BackingSwitch,
}

impl<S: GuestSpace> MemoryRelease<S> {
    /// For `memory`, all of which is backed as `backing` says.
    #[must_use]
    pub fn new(memory: S, backing: BackingSwitch) -> Self {
        Self { memory, backing }
    }
}

impl<S: GuestSpace> ReleasePages for MemoryRelease<S> {
    fn release(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let advice = match self.backing.get() {
            Backing::Private => libc::MADV_DONTNEED,
            Backing::Shared => libc::MADV_REMOVE,
        };
        let memory = self.memory.memory();
        if !memory.check_range(addr, len, Permissions::Write) {
            return Err(invalid());
        }
        for slice in memory
            .get_slices(addr, len, Permissions::Write)
            .map_err(|_| invalid())?
        {
            let slice = slice.map_err(|_| invalid())?;
            let guard = slice.ptr_guard_mut();
            // SAFETY: the slice is mapped guest memory, borrowed from `memory` for this call.
            // Nothing in this process relies on the content of guest memory, which the guest
            // changes at will; the mapping itself stays.
            if unsafe { libc::madvise(guard.as_ptr().cast(), guard.len(), advice) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
