// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Network device structures (virtio v1.3 §5.1).

use crate::WireError;
use crate::bytes::{take, take_u16};

/// Index of the queue whose buffers the device fills with frames (§5.1.2).
pub const RECEIVE_QUEUE: u16 = 0;
/// Index of the queue whose buffers the device sends (§5.1.2).
pub const TRANSMIT_QUEUE: u16 = 1;
/// Bytes of [`NetConfig`] on the wire, up to the MTU (§5.1.4).
pub const CONFIG_BYTES: usize = 12;
/// Bytes of [`NetHeader`] under version 1, `num_buffers` included (§5.1.6).
pub const HEADER_BYTES: usize = 12;
/// [`HEADER_BYTES`] as lengths of guest buffers are counted.
pub const HEADER_LEN: u32 = 12;
/// Where `num_buffers` is in the header (§5.1.6).
pub const NUM_BUFFERS_OFFSET: u32 = 10;

/// Feature bits (§5.1.3).
pub mod feature {
    use crate::Features;

    /// The device takes frames whose checksum is to be completed.
    pub const CSUM: Features = Features::bit(0);
    /// The driver takes frames whose checksum is not complete.
    pub const GUEST_CSUM: Features = Features::bit(1);
    /// `mtu` is valid.
    pub const MTU: Features = Features::bit(3);
    /// `mac` is valid.
    pub const MAC: Features = Features::bit(5);
    /// The driver takes TCP over IPv4 in frames larger than the MTU.
    pub const GUEST_TSO4: Features = Features::bit(7);
    /// The driver takes TCP over IPv6 in frames larger than the MTU.
    pub const GUEST_TSO6: Features = Features::bit(8);
    /// The device takes TCP over IPv4 in frames larger than the MTU.
    pub const HOST_TSO4: Features = Features::bit(11);
    /// The device takes TCP over IPv6 in frames larger than the MTU.
    pub const HOST_TSO6: Features = Features::bit(12);
    /// A received frame may span several of the driver's buffers.
    pub const MRG_RXBUF: Features = Features::bit(15);
}

/// How a frame is to be cut into segments; an open enum (§5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GsoType(pub u8);

impl GsoType {
    /// Not at all.
    pub const NONE: Self = Self(0);
    /// TCP over IPv4.
    pub const TCPV4: Self = Self(1);
    /// TCP over IPv6.
    pub const TCPV6: Self = Self(4);
}

/// What precedes every frame (§5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// [`NetHeader::NEEDS_CSUM`] and bits that a driver leaves zero.
    pub flags: u8,
    /// How to cut the frame.
    pub gso_type: GsoType,
    /// Bytes of all headers, a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where checksumming begins.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
    /// In how many buffers a received frame lies.
    pub num_buffers: u16,
}

impl NetHeader {
    /// The checksum is to be completed (§5.1.6, `VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    pub const NEEDS_CSUM: u8 = 1;

    /// Reads a header off the front of `bytes`.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "virtio_net_hdr";
        let mut rest = bytes;
        let [flags, gso_type] = take(&mut rest, WHAT)?;
        Ok(Self {
            flags,
            gso_type: GsoType(gso_type),
            hdr_len: take_u16(&mut rest, WHAT)?,
            gso_size: take_u16(&mut rest, WHAT)?,
            csum_start: take_u16(&mut rest, WHAT)?,
            csum_offset: take_u16(&mut rest, WHAT)?,
            num_buffers: take_u16(&mut rest, WHAT)?,
        })
    }

    /// As it lies before a frame.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [
            self.flags,
            self.gso_type.0,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            n0,
            n1,
        ]
    }
}

/// Configuration space (§5.1.4); one queue pair, no status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// The card's address.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet.
    pub mtu: u16,
}

impl NetConfig {
    /// As a driver reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CONFIG_BYTES] {
        let [m0, m1, m2, m3, m4, m5] = self.mac;
        let [u0, u1] = self.mtu.to_le_bytes();
        // Status and number of queue pairs are valid only with features that are not offered.
        [m0, m1, m2, m3, m4, m5, 0, 0, 1, 0, u0, u1]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn config_is_mac_status_pairs_and_mtu() {
        let config = NetConfig {
            mac: [1, 2, 3, 4, 5, 6],
            mtu: 0x1234,
        };
        assert_eq!(
            config.to_bytes(),
            [1, 2, 3, 4, 5, 6, 0, 0, 1, 0, 0x34, 0x12]
        );
    }

    #[test]
    fn short_header_is_refused() {
        assert!(NetHeader::parse(&[0; HEADER_BYTES - 1]).is_err());
    }

    proptest! {
        #[test]
        fn header_survives_the_trip(bytes: [u8; HEADER_BYTES]) {
            prop_assert_eq!(NetHeader::parse(&bytes).unwrap().to_bytes(), bytes);
        }
    }
}
