// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Memory device (virtio v1.3 §5.15): guest memory that comes and goes while the VM runs.
//!
//! The host says how much it wants plugged ([`MemHandle::set_requested`]); the driver plugs and unplugs blocks of
//! [`BLOCK_BYTES`] until that is so, or as near as it can. Memory beneath the blocks comes in slots of [`SLOT_BYTES`],
//! each there as long as a block in it is plugged.
//!
//! ```text
//! region   |        slot 0         |        slot 1         |        slot 2         |
//! blocks   |PPPPPPPPPPPPPPPPPPPPPPP|PPPPPP-----------------|-----------------------|
//! memory   |      there            |      there            |    not there          |
//! ```
//!
//! Invariants:
//! - Plugging never takes the plugged size beyond the requested one, nor the slots beyond as many as the requested size
//!   fills, rounded up. So a guest that touches what it has not plugged reaches at most one slot's worth more than it
//!   was given, and outside of slots there is nothing to touch.
//! - What is unplugged is given back to the host at once.
//! - A request that is not about whole, existing blocks in the state it presumes changes nothing.
//!
//! A reset changes no block (§5.15.5): the driver's first request is to unplug all.

mod blocks;
mod device;
mod metrics;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Mem, MemHandle, MemOptions, MemState, MemorySlots};
pub use metrics::MemMetrics;

/// Size and alignment of a block: what Linux isolates at a time on x86 (`pageblock_order`).
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Size and alignment of a slot: what Linux adds at a time on x86 (`MIN_MEMORY_BLOCK_SIZE`).
pub const SLOT_BYTES: u64 = 128 << 20;

/// Entries of the request queue; a driver has one request under way.
const QUEUE_SIZE: u16 = 16;
/// Bytes of a request and its answer, with room to spare.
const MAX_CHAIN_BYTES: u32 = 128;
