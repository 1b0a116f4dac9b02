// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Device ids (virtio v1.3 §5).

use std::fmt;

/// What kind of device a transport slot holds; an open enum (virtio v1.3 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

impl DeviceId {
    /// No device here: the driver ignores the slot (virtio v1.3 §4.2.2, `DeviceID`).
    pub const NONE: Self = Self(0);
    /// Network card (§5.1).
    pub const NET: Self = Self(1);
    /// Block device (§5.2).
    pub const BLOCK: Self = Self(2);
    /// Console (§5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy source (§5.4).
    pub const RNG: Self = Self(4);
    /// Traditional memory balloon (§5.5).
    pub const BALLOON: Self = Self(5);
    /// Socket device (§5.10).
    pub const VSOCK: Self = Self(19);
    /// Memory device (§5.15).
    pub const MEM: Self = Self(24);
    /// File system (§5.11).
    pub const FS: Self = Self(26);

    /// The name used in logs and errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NONE => "none",
            Self::NET => "net",
            Self::BLOCK => "block",
            Self::CONSOLE => "console",
            Self::RNG => "rng",
            Self::BALLOON => "balloon",
            Self::VSOCK => "vsock",
            Self::MEM => "mem",
            Self::FS => "fs",
            _ => "unknown",
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_id_keeps_its_number() {
        assert_eq!(DeviceId(77).0, 77);
        assert_eq!(DeviceId(77).to_string(), "unknown");
    }
}
