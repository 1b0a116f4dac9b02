// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Saved state of devices.

use serde::{Deserialize, Serialize};

/// What [`crate::VirtioDevice::save`] gives and `restore` takes; the caller picks the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeviceState {
    /// Entropy source: nothing but its presence.
    Rng,
}
