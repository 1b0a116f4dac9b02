// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Units and small numbers that must not be mixed up.

use std::fmt;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// A number of mebibytes (2^20 bytes). `u32` mebibytes always fit in `u64` bytes, so the conversion is total.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mib(pub u32);

impl From<Mib> for Bytes {
    fn from(mib: Mib) -> Self {
        Self(u64::from(mib.0) << 20)
    }
}

impl Bytes {
    /// The mebibytes that hold this many bytes, rounded up; `None` past [`u32::MAX`] MiB.
    pub fn to_mib_ceil(self) -> Option<Mib> {
        u32::try_from(self.0.div_ceil(1 << 20)).ok().map(Mib)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// A number of virtual CPUs, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuCount(std::num::NonZeroU8);

impl VcpuCount {
    /// One virtual CPU.
    pub const ONE: Self = Self(std::num::NonZeroU8::MIN);

    /// `None` if `count` is zero.
    pub fn new(count: u8) -> Option<Self> {
        std::num::NonZeroU8::new(count).map(Self)
    }

    /// The count.
    pub fn get(self) -> u8 {
        self.0.get()
    }
}

/// The vsock address of a guest. 0, 1 and 2 are the hypervisor, local and host addresses (virtio v1.3 §5.10.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestCid(u32);

impl GuestCid {
    /// The address every Coffer guest has: a user-space vsock device knows only its own guest, so one value serves.
    pub const DEFAULT: Self = Self(3);

    /// `None` for the reserved addresses 0 to 2 and for `VMADDR_CID_ANY`.
    pub fn new(cid: u32) -> Option<Self> {
        (cid > 2 && cid != u32::MAX).then_some(Self(cid))
    }

    /// The address.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A vsock port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VsockPort(pub u32);

impl fmt::Display for VsockPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Tells two users of one id apart: a second exec named `e` is not the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one. It would take centuries of one exec a nanosecond to come round.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mebibytes_convert_to_bytes_without_loss() {
        assert_eq!(
            Bytes::from(Mib(u32::MAX)),
            Bytes(u64::from(u32::MAX) * 1024 * 1024)
        );
    }

    #[test]
    fn bytes_round_up_to_mebibytes() {
        assert_eq!(Bytes(0).to_mib_ceil(), Some(Mib(0)));
        assert_eq!(Bytes(1).to_mib_ceil(), Some(Mib(1)));
        assert_eq!(Bytes(1 << 20).to_mib_ceil(), Some(Mib(1)));
        assert_eq!(Bytes(u64::MAX).to_mib_ceil(), None);
    }

    #[test]
    fn reserved_guest_addresses_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            assert_eq!(GuestCid::new(cid), None);
        }
        assert_eq!(GuestCid::new(3), Some(GuestCid::DEFAULT));
    }
}
