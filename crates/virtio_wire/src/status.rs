// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device status field (virtio v1.3 §2.1).

use std::ops::BitOr;

/// The bits of the status register; an open set, unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStatus(pub u32);

impl DeviceStatus {
    /// Written by the driver to reset the device (§2.1.2, §2.4).
    pub const RESET: Self = Self(0);
    /// The guest has found the device.
    pub const ACKNOWLEDGE: Self = Self(1);
    /// The guest knows how to drive the device.
    pub const DRIVER: Self = Self(2);
    /// The driver is ready: the device goes live.
    pub const DRIVER_OK: Self = Self(4);
    /// Feature negotiation is complete.
    pub const FEATURES_OK: Self = Self(8);
    /// The device has met an error from which it cannot recover.
    pub const NEEDS_RESET: Self = Self(0x40);
    /// The guest has given up on the device.
    pub const FAILED: Self = Self(0x80);

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits that are set here and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for DeviceStatus {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
