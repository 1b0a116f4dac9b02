// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How a VM ends, told once: the first reason counts.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::VmmError;

/// Why the VM has ended.
#[derive(Debug)]
pub enum End {
    /// The guest shut down, reset itself or crashed.
    Guest,
    /// The VMM cannot go on.
    Failed(VmmError),
}

/// Where vCPUs report the end, and the control thread waits for it.
pub struct Ends {
    first: Mutex<Option<End>>,
    event: EventFd,
}

impl Ends {
    /// Nothing has ended.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> Result<Self, VmmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(VmmError::host("create an event"))?;
        Ok(Self {
            first: Mutex::new(None),
            event,
        })
    }

    /// Reports an end; only the first is kept.
    pub fn report(&self, end: End) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(end);
        let _ = self.event.write(1);
    }

    /// The end, if there was one.
    pub fn take(&self) -> Option<End> {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Readable once there is an end.
impl AsFd for Ends {
    #[expect(unsafe_code, reason = "EventFd only has a raw descriptor")]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
