// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Feature bits (virtio v1.3 §2.2, §6).

use std::ops::BitOr;

/// A set of feature bits, as offered by a device or accepted by a driver.
///
/// Bits 0 to 23 belong to the device type (their constants are in its module), 24 and up to the transport and
/// the rings. Unknown bits are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature at all.
    pub const NONE: Self = Self(0);
    /// Descriptors may point to a table of descriptors (§2.7.5.3).
    pub const RING_INDIRECT_DESC: Self = Self::bit(28);
    /// `used_event` and `avail_event` replace the notification flags (§2.7.7, §2.7.10).
    pub const RING_EVENT_IDX: Self = Self::bit(29);
    /// The device follows version 1 of the specification and later (§6).
    pub const VERSION_1: Self = Self::bit(32);

    /// What every device here offers besides its own bits.
    pub const COMMON: Self =
        Self(Self::RING_INDIRECT_DESC.0 | Self::RING_EVENT_IDX.0 | Self::VERSION_1.0);

    /// The set that holds bit `n` only; `n` must be below 64.
    #[must_use]
    pub const fn bit(n: u32) -> Self {
        Self(1 << n)
    }

    /// The set with exactly these bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// All bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every bit of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of both sets.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits that are in this set and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Bits `32 * page` to `32 * page + 31`, as the transport shows them (§4.2.2,
    /// `DeviceFeatures`); 0 for other pages.
    #[must_use]
    pub fn page(self, page: u32) -> u32 {
        let [a, b, c, d, e, f, g, h] = self.0.to_le_bytes();
        match page {
            0 => u32::from_le_bytes([a, b, c, d]),
            1 => u32::from_le_bytes([e, f, g, h]),
            _ => 0,
        }
    }

    /// This set with the 32 bits of `page` replaced; other pages are ignored.
    #[must_use]
    pub fn with_page(self, page: u32, value: u32) -> Self {
        let shift = match page {
            0 => 0,
            1 => 32,
            _ => return self,
        };
        Self(self.0 & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_round_trip() {
        let all = Features::from_bits(0x1234_5678_9abc_def0);
        let back = Features::NONE
            .with_page(0, all.page(0))
            .with_page(1, all.page(1));
        assert_eq!(back, all);
        assert_eq!(all.page(2), 0);
        assert_eq!(all.with_page(2, 7), all);
    }

    #[test]
    fn contains_needs_every_bit() {
        assert!(Features::COMMON.contains(Features::VERSION_1));
        assert!(!Features::VERSION_1.contains(Features::COMMON));
        assert!(
            !Features::COMMON
                .without(Features::VERSION_1)
                .contains(Features::VERSION_1)
        );
    }
}
