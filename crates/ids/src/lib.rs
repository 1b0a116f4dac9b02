// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Identifiers and units; depends on nothing.
//!
//! An id is checked once, where it enters, and is then a type of its own: a [`ContainerId`] cannot be passed for an
//! [`ExecId`], nor [`Mib`] for [`Bytes`]. Ids that the other side can use again (an exec id after its delete) carry
//! a [`Generation`].
#![forbid(unsafe_code)]

mod identifier;
mod limits;
mod units;

pub use identifier::{
    ContainerId, DiskSerial, ExecId, InvalidId, MAX_ID_LEN, Namespace, SandboxId,
};
pub use limits::{Limit, Limits, Rate};
pub use units::{Bytes, Generation, GuestCid, Mib, VcpuCount, VsockPort};
