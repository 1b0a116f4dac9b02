// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What can go wrong in a device.

use std::io;

use virtio_wire::DeviceId;

/// An error of a device or one of its workers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver set a queue up with a size or an address that cannot be used.
    #[error("queue {queue} cannot be used: {reason}; the guest's driver must reset the device")]
    Queue {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The rings of a live queue broke the rules or left memory.
    #[error("ring of queue {queue} is broken; the guest's driver must reset the device")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// What the ring code found.
        source: virtio_queue::Error,
    },
    /// A descriptor chain broke the rules.
    #[error(
        "descriptor chain {head} of queue {queue} {fault}; the guest's driver must reset the device"
    )]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// Which rule.
        fault: ChainFault,
    },
    /// Guest memory that was there is not any more.
    #[error("guest memory cannot be accessed; the guest's driver must reset the device")]
    Memory {
        /// What the memory said.
        source: vm_memory::GuestMemoryError,
    },
    /// The host refused something that the device cannot do without.
    #[error("{device} cannot {operation}; see the cause, then the host's limits")]
    Host {
        /// Which device.
        device: DeviceId,
        /// What it tried.
        operation: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A saved state does not fit.
    #[error("state of {device} cannot be restored: {reason}; boot the pod afresh")]
    State {
        /// Which device was to take it.
        device: DeviceId,
        /// Why not.
        reason: &'static str,
    },
}

impl DeviceError {
    pub(crate) fn foreign_state(device: DeviceId) -> Self {
        Self::State {
            device,
            reason: "it belongs to another kind of device",
        }
    }

    pub(crate) fn unknown_state_version(device: DeviceId) -> Self {
        Self::State {
            device,
            reason: "its version is not one this build knows",
        }
    }
}

/// Which rule a descriptor chain broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// More descriptors than the queue has: too long, or a loop (virtio v1.3 §2.7.5.3.1).
    TooLong,
    /// A descriptor index is not below the size of its table.
    BadIndex,
    /// A buffer or an indirect table is not in guest memory.
    OutsideMemory,
    /// The buffers together exceed the device's cap.
    TooManyBytes,
    /// An indirect table that was not negotiated, is nested, is followed by more, or has a bad
    /// length (§2.7.5.3.1).
    BadIndirect,
    /// A device-readable buffer comes after a device-writable one (§2.7.4.2).
    BadOrder,
    /// The buffers do not hold what the device's request needs.
    BadLayout,
}

impl std::fmt::Display for ChainFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TooLong => "is longer than its queue or loops",
            Self::BadIndex => "names a descriptor outside its table",
            Self::OutsideMemory => "points outside guest memory",
            Self::TooManyBytes => "holds more bytes than the device takes in one request",
            Self::BadIndirect => "has an indirect table where or as none may be",
            Self::BadOrder => "has a readable buffer after a writable one",
            Self::BadLayout => "does not hold the buffers that a request needs",
        })
    }
}
