// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block device structures (virtio v1.3 §5.2).

use crate::bytes::{take, take_u32, take_u64};
use crate::{Features, WireError};

/// Bytes of a sector, the unit of every address on the wire (§5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of the header that starts a request (§5.2.6).
pub const HEADER_BYTES: u32 = 16;
/// Bytes of one range of a discard or write-zeroes request (§5.2.6).
pub const RANGE_BYTES: u32 = 16;
/// Bytes of the answer to [`RequestType::GET_ID`] (§5.2.6).
pub const ID_BYTES: usize = 20;
/// Bytes of [`BlkConfig`] on the wire, up to the secure-erase fields (§5.2.4).
pub const CONFIG_BYTES: usize = 60;
/// Offset of `writeback`, the only field that a driver may write (§5.2.4).
pub const CONFIG_WRITEBACK_OFFSET: u64 = 32;

/// Feature bits (§5.2.3).
pub mod feature {
    use crate::Features;

    /// `size_max` is valid.
    pub const SIZE_MAX: Features = Features::bit(1);
    /// `seg_max` is valid.
    pub const SEG_MAX: Features = Features::bit(2);
    /// The device is read-only.
    pub const RO: Features = Features::bit(5);
    /// `blk_size` is valid.
    pub const BLK_SIZE: Features = Features::bit(6);
    /// Flush requests are understood.
    pub const FLUSH: Features = Features::bit(9);
    /// `topology` is valid.
    pub const TOPOLOGY: Features = Features::bit(10);
    /// The driver may switch `writeback`.
    pub const CONFIG_WCE: Features = Features::bit(11);
    /// `num_queues` is valid.
    pub const MQ: Features = Features::bit(12);
    /// Discard requests are understood.
    pub const DISCARD: Features = Features::bit(13);
    /// Write-zeroes requests are understood.
    pub const WRITE_ZEROES: Features = Features::bit(14);
}

/// What a request asks for; an open enum (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestType(pub u32);

impl RequestType {
    /// Read.
    pub const IN: Self = Self(0);
    /// Write.
    pub const OUT: Self = Self(1);
    /// Make earlier writes durable.
    pub const FLUSH: Self = Self(4);
    /// Tell the serial number.
    pub const GET_ID: Self = Self(8);
    /// The content of ranges is not needed any more.
    pub const DISCARD: Self = Self(11);
    /// Ranges shall read as zeroes.
    pub const WRITE_ZEROES: Self = Self(13);
}

/// How a request ended; an open enum (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestStatus(pub u8);

impl RequestStatus {
    /// Done.
    pub const OK: Self = Self(0);
    /// Failed.
    pub const IOERR: Self = Self(1);
    /// Not understood.
    pub const UNSUPP: Self = Self(2);
}

/// The start of every request (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkRequest {
    /// What is asked.
    pub kind: RequestType,
    /// First sector; meaningless for requests without an address.
    pub sector: u64,
}

impl BlkRequest {
    /// Reads type, reserved word and sector.
    ///
    /// # Errors
    /// Fewer than [`HEADER_BYTES`] bytes.
    pub fn parse(mut bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "block request header";
        let kind = RequestType(take_u32(&mut bytes, WHAT)?);
        take::<4>(&mut bytes, WHAT)?;
        Ok(Self {
            kind,
            sector: take_u64(&mut bytes, WHAT)?,
        })
    }

    /// As a driver sends it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES as usize] {
        let [a, b, c, d] = self.kind.0.to_le_bytes();
        let [s0, s1, s2, s3, s4, s5, s6, s7] = self.sector.to_le_bytes();
        [a, b, c, d, 0, 0, 0, 0, s0, s1, s2, s3, s4, s5, s6, s7]
    }
}

/// Whether the device may give up the storage behind a range it zeroes (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// The range may become a hole.
    Allowed,
    /// The range stays allocated.
    Forbidden,
}

/// One range of a discard or write-zeroes request (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Flag word: bit 0 is unmap, the others are reserved.
    pub flags: u32,
}

impl SectorRange {
    /// Reads one range.
    ///
    /// # Errors
    /// Fewer than [`RANGE_BYTES`] bytes.
    pub fn parse(mut bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "discard or write-zeroes range";
        Ok(Self {
            sector: take_u64(&mut bytes, WHAT)?,
            sectors: take_u32(&mut bytes, WHAT)?,
            flags: take_u32(&mut bytes, WHAT)?,
        })
    }

    /// As a driver sends it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; RANGE_BYTES as usize] {
        let mut bytes = [0; RANGE_BYTES as usize];
        let fields = self.sector.to_le_bytes().into_iter();
        let fields = fields
            .chain(self.sectors.to_le_bytes())
            .chain(self.flags.to_le_bytes());
        bytes
            .iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        bytes
    }

    /// The unmap flag; `None` if reserved flags are set (§5.2.6.2: such a request is UNSUPP).
    #[must_use]
    pub fn unmap(self) -> Option<Unmap> {
        match self.flags {
            0 => Some(Unmap::Forbidden),
            1 => Some(Unmap::Allowed),
            _ => None,
        }
    }
}

/// Configuration space (§5.2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkConfig {
    /// Size of the device in sectors of 512 bytes.
    pub capacity: u64,
    /// Largest segment, in bytes.
    pub size_max: u32,
    /// Most segments of one request.
    pub seg_max: u32,
    /// Preferred block size, in bytes.
    pub blk_size: u32,
    /// Logical blocks per physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Suggested smallest request, in logical blocks.
    pub min_io_size: u16,
    /// Suggested request, in logical blocks.
    pub opt_io_size: u32,
    /// 1: writes are cached until a flush; 0: they are durable when done.
    pub writeback: u8,
    /// Request queues.
    pub num_queues: u16,
    /// Most sectors of one discard range.
    pub max_discard_sectors: u32,
    /// Most ranges of one discard request.
    pub max_discard_seg: u32,
    /// Granularity of discards, in sectors.
    pub discard_sector_alignment: u32,
    /// Most sectors of one write-zeroes range.
    pub max_write_zeroes_sectors: u32,
    /// Most ranges of one write-zeroes request.
    pub max_write_zeroes_seg: u32,
    /// 1: a write-zeroes request may unmap.
    pub write_zeroes_may_unmap: u8,
}

impl BlkConfig {
    /// As a driver reads it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut fields = Vec::with_capacity(CONFIG_BYTES);
        fields.extend(self.capacity.to_le_bytes());
        fields.extend(self.size_max.to_le_bytes());
        fields.extend(self.seg_max.to_le_bytes());
        fields.extend([0; 4]); // geometry: not offered
        fields.extend(self.blk_size.to_le_bytes());
        fields.extend([self.physical_block_exp, 0]); // alignment_offset 0
        fields.extend(self.min_io_size.to_le_bytes());
        fields.extend(self.opt_io_size.to_le_bytes());
        fields.extend([self.writeback, 0]);
        fields.extend(self.num_queues.to_le_bytes());
        fields.extend(self.max_discard_sectors.to_le_bytes());
        fields.extend(self.max_discard_seg.to_le_bytes());
        fields.extend(self.discard_sector_alignment.to_le_bytes());
        fields.extend(self.max_write_zeroes_sectors.to_le_bytes());
        fields.extend(self.max_write_zeroes_seg.to_le_bytes());
        fields.extend([self.write_zeroes_may_unmap, 0, 0, 0]);
        let mut bytes = [0; CONFIG_BYTES];
        bytes
            .iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        bytes
    }
}

/// Features that change what data a device keeps: never offered on a read-only one.
pub const WRITE_FEATURES: Features = feature::FLUSH
    .union(feature::CONFIG_WCE)
    .union(feature::DISCARD)
    .union(feature::WRITE_ZEROES);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_request_header_round_trips(kind: u32, sector: u64) {
            let request = BlkRequest { kind: RequestType(kind), sector };
            prop_assert_eq!(BlkRequest::parse(&request.to_bytes()), Ok(request));
        }

        #[test]
        fn any_range_round_trips(sector: u64, sectors: u32, flags: u32) {
            let range = SectorRange { sector, sectors, flags };
            prop_assert_eq!(SectorRange::parse(&range.to_bytes()), Ok(range));
        }
    }

    #[test]
    fn header_one_byte_short_is_refused() {
        let bytes = BlkRequest {
            kind: RequestType::IN,
            sector: 1,
        }
        .to_bytes();
        assert!(matches!(
            BlkRequest::parse(&bytes[..15]),
            Err(WireError::Short { .. })
        ));
        assert!(matches!(
            SectorRange::parse(&bytes[..15]),
            Err(WireError::Short { .. })
        ));
    }

    #[test]
    fn reserved_range_flags_are_not_an_unmap_answer() {
        let range = |flags| SectorRange {
            sector: 0,
            sectors: 1,
            flags,
        };
        assert_eq!(range(0).unmap(), Some(Unmap::Forbidden));
        assert_eq!(range(1).unmap(), Some(Unmap::Allowed));
        assert_eq!(range(3).unmap(), None);
    }

    #[test]
    fn config_fields_are_at_their_offsets() {
        // Offsets counted by hand from the struct in §5.2.4.
        let config = BlkConfig {
            capacity: 0x0102_0304_0506_0708,
            size_max: 9,
            seg_max: 10,
            blk_size: 4096,
            physical_block_exp: 3,
            min_io_size: 8,
            opt_io_size: 256,
            writeback: 1,
            num_queues: 4,
            max_discard_sectors: 11,
            max_discard_seg: 12,
            discard_sector_alignment: 13,
            max_write_zeroes_sectors: 14,
            max_write_zeroes_seg: 15,
            write_zeroes_may_unmap: 1,
        };
        let bytes = config.to_bytes();
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        assert_eq!(bytes[0], 8);
        assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (9, 10, 4096));
        assert_eq!((bytes[24], bytes[26], u32_at(28)), (3, 8, 256));
        assert_eq!((bytes[32], bytes[34]), (1, 4));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (11, 12, 13));
        assert_eq!((u32_at(48), u32_at(52), bytes[56]), (14, 15, 1));
    }
}
