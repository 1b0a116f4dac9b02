// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The driver side of the virtio rings, for tests, fuzz targets and benchmarks.
//!
//! [`TestMemory`] is a guest's memory with room for rings and buffers, [`TestDriver`] one queue's
//! rings in it as a driver lays them out, and [`ChainBuilder`] makes descriptor chains, good ones
//! and hostile ones. [`run_back_end`] is the other side of a vhost-user connection. It shares no code with the device side but
//! the numbers of vhost-user, so the two check each other. It trusts
//! its caller: misuse panics.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "test support that panics on misuse is what its callers want"
)]

mod back_end;
mod chain_builder;
mod driver;
mod memory;

pub use back_end::{Reply, Told, honest, run_back_end};
pub use chain_builder::{Buffer, ChainBuilder};
pub use driver::{RingAddresses, TestDriver, Used};
pub use memory::TestMemory;

/// The buffer continues in descriptor `next` (virtio v1.3 §2.7.5).
pub const DESC_NEXT: u16 = 1;
/// The device writes the buffer.
pub const DESC_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;
