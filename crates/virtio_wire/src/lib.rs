// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! virtio wire structs and pure parsers (little-endian types, open enums).
//!
//! Purpose: turn bytes that a guest wrote into owned Rust values, and values into the bytes a guest reads.
//! Nothing here does I/O, touches guest memory or keeps state, so each parser is a fuzz target as it stands.
//!
//! Invariants:
//! - A parser takes a byte slice, copies what it needs and never panics; too few bytes are a [`WireError`].
//! - Enums are open: an unknown number survives parse and encode unchanged (the device decides what
//!   it means).
//! - All multi-byte fields are little-endian (virtio v1.3 §1.4).
#![forbid(unsafe_code)]

pub mod balloon;
pub mod blk;
mod bytes;
pub mod console;
mod device_id;
mod features;
pub mod fs;
pub mod mem;
pub mod net;
mod status;
pub mod vhost_user;
pub mod vsock;

pub use bytes::WireError;
pub use device_id::DeviceId;
pub use features::Features;
pub use status::DeviceStatus;
