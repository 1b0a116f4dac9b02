// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Network device (virtio v1.3 §5.1), one queue pair over a tap.
//!
//! Frames go between the tap and guest memory without a copy in between, one `readv` or `writev` each: a tap gives and
//! takes one frame per call. A wake serves frames up to the caps of [`crate::Queue`], and interrupts once at its end.
//!
//! Invariants:
//! - The tap never offers the guest what its driver did not accept: [`FrameIo::set_offloads`] follows the features.
//! - Of the header of a frame that the guest sends, the tap sees the device's own copy, checked against the features.
//! - A guest without buffers leaves frames in the tap's queue, whose length is the host's, and costs no wake-ups.
//! - What a guest may send (addresses) is not judged here: the filter on the tap does that.

mod device;
mod metrics;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Net, NetLimits, NetOptions, NetState};
pub use metrics::NetMetrics;
pub use tap::{FrameIo, Offload, Offloads, Tap};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of the largest frame with segmentation offload and its header (virtio v1.3 §5.1.6.3.1).
const MAX_FRAME_BYTES: u32 = 65_562;
/// Bytes of one chain: drivers without mergeable buffers round [`MAX_FRAME_BYTES`] up to pages.
const MAX_CHAIN_BYTES: u32 = 2 * MAX_FRAME_BYTES;
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: u32 = 14;
/// Bytes of a VLAN tag, for which a driver leaves room.
const VLAN_BYTES: u32 = 4;
/// The MTU that a driver without a better one assumes.
const ETHERNET_MTU: u16 = 1500;
