// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the host types.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::INPUT_BYTES;

/// Bytes on their way to the guest, at most [`INPUT_BYTES`], and the event that wakes the console's worker.
///
/// Written by the control thread, taken by the worker.
pub struct ConsoleInput {
    pending: Mutex<VecDeque<u8>>,
    event: EventFd,
}

impl ConsoleInput {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            pending: Mutex::default(),
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// Queues bytes for the guest; returns how many there was room for.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut pending = self.lock();
        let room = INPUT_BYTES.saturating_sub(pending.len()).min(bytes.len());
        pending.extend(bytes.iter().take(room));
        drop(pending);
        if room > 0 {
            // Only a counter at its maximum fails, and then the worker is awake already.
            let _ = self.event.write(1);
        }
        room
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Takes up to `max` bytes.
    pub(super) fn take(&self, max: usize) -> Vec<u8> {
        let mut pending = self.lock();
        let n = pending.len().min(max);
        pending.drain(..n).collect()
    }

    /// Makes the event unreadable until the next `send`.
    pub(super) fn clear_event(&self) {
        // Fails only if there is nothing to clear.
        let _ = self.event.read();
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
