// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Saved state of devices.

use serde::{Deserialize, Serialize};

use crate::balloon::BalloonState;
use crate::block::BlockState;
use crate::console::ConsoleState;
use crate::fs::FsState;
use crate::mem::MemState;
use crate::net::NetState;
use crate::rng::RngState;
use crate::vsock::VsockState;

/// What [`crate::VirtioDevice::save`] gives and `restore` takes; the caller picks the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeviceState {
    /// Block device.
    Block(BlockState),
    /// Memory balloon.
    Balloon(BalloonState),
    /// Console.
    Console(ConsoleState),
    /// File system.
    Fs(FsState),
    /// Memory device.
    Mem(MemState),
    /// Network card.
    Net(NetState),
    /// Entropy source.
    Rng(RngState),
    /// Socket device.
    Vsock(VsockState),
}
