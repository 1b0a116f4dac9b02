// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Traditional memory balloon structures (virtio v1.3 §5.5).

use crate::WireError;
use crate::bytes::take_u32;

/// Bytes of a page, whatever the guest's own page size is (§5.5.6).
pub const PAGE_BYTES: u64 = 4096;
/// Index of the queue of pages the driver gives up (§5.5.2).
pub const INFLATE_QUEUE: u16 = 0;
/// Index of the queue of pages the driver takes back (§5.5.2).
pub const DEFLATE_QUEUE: u16 = 1;
/// Bytes of [`BalloonConfig`] on the wire without its optional fields (§5.5.4).
pub const CONFIG_BYTES: usize = 8;
/// Offset of `actual`, the only field that a driver may write here (§5.5.4).
pub const CONFIG_ACTUAL_OFFSET: u64 = 4;
/// Bytes of one page number in a request (§5.5.6).
pub const PFN_BYTES: u32 = 4;

/// Feature bits (§5.5.3).
pub mod feature {
    use crate::Features;

    /// The driver reports free pages on a queue of their own.
    pub const REPORTING: Features = Features::bit(5);
}

/// Configuration space (§5.5.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Pages that the host wants the driver to give up.
    pub num_pages: u32,
    /// Pages that the driver has given up.
    pub actual: u32,
}

impl BalloonConfig {
    /// As a driver reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CONFIG_BYTES] {
        let [n0, n1, n2, n3] = self.num_pages.to_le_bytes();
        let [a0, a1, a2, a3] = self.actual.to_le_bytes();
        [n0, n1, n2, n3, a0, a1, a2, a3]
    }
}

/// Guest address of the page whose number is at the start of `bytes` (§5.5.6: little-endian, in
/// units of 4096).
///
/// # Errors
/// Fewer than four bytes.
pub fn parse_page_address(mut bytes: &[u8]) -> Result<u64, WireError> {
    Ok(u64::from(take_u32(&mut bytes, "balloon page number")?) * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_number_becomes_an_address_without_overflow() {
        assert_eq!(parse_page_address(&[1, 0, 0, 0]), Ok(4096));
        assert_eq!(parse_page_address(&[0xff; 4]), Ok(0xffff_ffff * 4096));
        assert!(parse_page_address(&[1, 0, 0]).is_err());
    }

    #[test]
    fn config_is_target_then_actual() {
        let bytes = BalloonConfig {
            num_pages: 1,
            actual: 0x0200,
        }
        .to_bytes();
        assert_eq!(bytes, [1, 0, 0, 0, 0, 2, 0, 0]);
    }
}
