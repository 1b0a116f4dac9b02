// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Memory device structures (virtio v1.3 §5.15).

use crate::WireError;
use crate::bytes::{take, take_u16, take_u64};

/// Index of the only queue (§5.15.2).
pub const REQUEST_QUEUE: u16 = 0;
/// Bytes of [`MemConfig`] on the wire (§5.15.4).
pub const CONFIG_BYTES: usize = 56;
/// Bytes of [`MemRequest`] on the wire (§5.15.6).
pub const REQUEST_BYTES: usize = 24;
/// Bytes of [`MemResponse`] on the wire (§5.15.6).
pub const RESPONSE_BYTES: usize = 10;

/// Feature bits (§5.15.3).
pub mod feature {
    use crate::Features;

    /// The driver must not touch unplugged memory at all.
    pub const UNPLUGGED_INACCESSIBLE: Features = Features::bit(1);
}

/// Configuration space (§5.15.4), all in bytes; there is no NUMA node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemConfig {
    /// Size and alignment of a block.
    pub block_size: u64,
    /// Where the region starts in guest-physical memory.
    pub addr: u64,
    /// Size of the region.
    pub region_size: u64,
    /// What of it the driver may ask for.
    pub usable_region_size: u64,
    /// How much is plugged.
    pub plugged_size: u64,
    /// How much the host wants to be plugged.
    pub requested_size: u64,
}

impl MemConfig {
    /// As a driver reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        // The second field is the node, without VIRTIO_MEM_F_ACPI_PXM not valid, and padding.
        let fields = [
            self.block_size,
            0,
            self.addr,
            self.region_size,
            self.usable_region_size,
            self.plugged_size,
            self.requested_size,
        ];
        for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// What a driver asks for (§5.15.6); an open enum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemRequest {
    /// Plug these blocks.
    Plug(BlockRange),
    /// Unplug these blocks.
    Unplug(BlockRange),
    /// Unplug all blocks.
    UnplugAll,
    /// Say what these blocks are.
    State(BlockRange),
    /// Nothing that the specification knows.
    Unknown(u16),
}

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// Guest-physical address of the first.
    pub addr: u64,
    /// How many.
    pub blocks: u16,
}

impl MemRequest {
    /// A request from the bytes of its buffer.
    ///
    /// # Errors
    /// Fewer than [`REQUEST_BYTES`].
    pub fn parse(mut bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "memory device request";
        let mut bytes: &[u8] = &take::<REQUEST_BYTES>(&mut bytes, WHAT)?;
        let kind = take_u16(&mut bytes, WHAT)?;
        take::<6>(&mut bytes, WHAT)?;
        let range = BlockRange {
            addr: take_u64(&mut bytes, WHAT)?,
            blocks: take_u16(&mut bytes, WHAT)?,
        };
        Ok(match kind {
            0 => Self::Plug(range),
            1 => Self::Unplug(range),
            2 => Self::UnplugAll,
            3 => Self::State(range),
            other => Self::Unknown(other),
        })
    }

    /// As a driver writes it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; REQUEST_BYTES] {
        let none = BlockRange { addr: 0, blocks: 0 };
        let (kind, range) = match self {
            Self::Plug(range) => (0, range),
            Self::Unplug(range) => (1, range),
            Self::UnplugAll => (2, none),
            Self::State(range) => (3, range),
            Self::Unknown(kind) => (kind, none),
        };
        let mut bytes = [0; REQUEST_BYTES];
        let fields = [u64::from(kind), range.addr, u64::from(range.blocks)];
        for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// What the device answers (§5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemResponse {
    /// Done.
    Ack,
    /// Not now: it would exceed the requested size.
    Nack,
    /// The device cannot at the moment.
    Busy,
    /// The request is wrong.
    Error,
    /// The answer to [`MemRequest::State`].
    State(BlockState),
}

/// What blocks are (§5.15.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// All plugged.
    Plugged,
    /// All unplugged.
    Unplugged,
    /// Some of each.
    Mixed,
}

impl MemResponse {
    /// As a driver reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(BlockState::Plugged) => (0, 0),
            Self::State(BlockState::Unplugged) => (0, 1),
            Self::State(BlockState::Mixed) => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn config_fields_are_where_the_specification_has_them() {
        let config = MemConfig {
            block_size: 1,
            addr: 2,
            region_size: 3,
            usable_region_size: 4,
            plugged_size: 5,
            requested_size: 6,
        };
        let bytes = config.to_bytes();
        let at = |offset: usize| bytes[offset];
        assert_eq!([at(0), at(8), at(16), at(24)], [1, 0, 2, 3]);
        assert_eq!([at(32), at(40), at(48)], [4, 5, 6]);
    }

    #[test]
    fn request_is_type_padding_address_count() {
        let mut bytes = [0xee; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&[1, 0]);
        bytes[8..16].copy_from_slice(&[0, 0, 0x20, 0, 1, 0, 0, 0]);
        bytes[16..18].copy_from_slice(&[2, 1]);
        let range = BlockRange {
            addr: 0x1_0020_0000,
            blocks: 0x102,
        };
        assert_eq!(MemRequest::parse(&bytes), Ok(MemRequest::Unplug(range)));
        assert!(MemRequest::parse(&bytes[..23]).is_err());
    }

    #[test]
    fn state_is_an_acknowledgement_with_a_state() {
        let mixed = MemResponse::State(BlockState::Mixed).to_bytes();
        assert_eq!(mixed, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(MemResponse::Error.to_bytes()[0], 3);
    }

    proptest! {
        #[test]
        fn any_request_survives(kind in 0u16..6, addr: u64, blocks: u16) {
            let mut bytes = [0; REQUEST_BYTES];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&addr.to_le_bytes());
            bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
            let request = MemRequest::parse(&bytes).unwrap();
            prop_assert_eq!(MemRequest::parse(&request.to_bytes()), Ok(request));
        }
    }
}
