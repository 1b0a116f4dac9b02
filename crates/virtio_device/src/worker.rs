// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The I/O thread's view of a device.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::{DeviceError, QueueState};

/// Why a worker is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver has kicked this queue (by its index), or may have.
    Queue(u16),
    /// The worker's own descriptor with this token is readable.
    Source(u32),
}

/// Whether a worker left work undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "More and Later mean that no further kick will come for what is left"]
pub enum Progress {
    /// Nothing left: the next kick will wake it.
    Idle,
    /// The cap per wake was reached: call `handle` with the same event again, after the other
    /// workers had their turn.
    More,
    /// A limit was reached: call `handle` with the same event again after this time, or earlier.
    Later(Duration),
}

/// Serves some queues of an activated device.
///
/// Caller: one I/O thread's event loop, never two threads at once. The loop watches the kick
/// descriptor of each queue in [`Worker::queues`] and each descriptor in [`Worker::sources`] for
/// input, level-triggered, and removes them before it drops the worker.
///
/// Order: `start` once, before anything else; `handle` for every queue once at the start and after each pause (a kick may have come
/// earlier), then as events arrive. Spurious events are harmless. `pause` at any time between two
/// calls of `handle`; a later `handle` resumes.
///
/// Stopping: `pause` then drop. All work in flight belongs to the worker and is finished or put
/// back by `pause`; after it, no guest memory is touched until the next `handle`.
///
/// Failure: an error from `handle` is final. The caller sets DEVICE_NEEDS_RESET (virtio v1.3
/// §2.1.2), sends the configuration change interrupt and stops calling the worker until the driver
/// resets the device.
pub trait Worker: Send {
    /// Indexes of the queues it serves; constant.
    fn queues(&self) -> &[u16];

    /// Descriptors of its own to watch, each with its token; constant for the life of the worker.
    fn sources(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        Vec::new()
    }

    /// Does what needs the I/O thread before the first event; nothing for most.
    ///
    /// # Errors
    /// As [`Worker::handle`]; final too.
    fn start(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Does what the event calls for, up to the caps per wake.
    ///
    /// # Errors
    /// The driver broke the rules of the ring, or the host failed in a way that no request status can carry.
    fn handle(&mut self, event: Event) -> Result<Progress, DeviceError>;

    /// Finishes or puts back what is in flight; returns each queue's index and position.
    fn pause(&mut self) -> Vec<(u16, QueueState)>;
}
