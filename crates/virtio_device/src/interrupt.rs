// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How a device gets the driver's attention.

/// Interrupts of one device; given by the transport at activation, called from I/O and control threads.
///
/// Neither call blocks or fails: an interrupt already pending counts as sent.
pub trait Interrupt: Send + Sync {
    /// The used ring of queue `index` has new entries (virtio v1.3 §4.2.2, `InterruptStatus` bit 0).
    fn signal_used_queue(&self, index: u16);

    /// Configuration space has changed (bit 1); the transport also bumps `ConfigGeneration` (§2.5.1).
    fn signal_config_change(&self);
}
