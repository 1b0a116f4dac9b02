// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a descriptor chain to a request that is safe to run (virtio v1.3 §5.2.6).

use virtio_wire::Features;
use virtio_wire::blk::{
    BlkRequest, HEADER_BYTES, ID_BYTES, RANGE_BYTES, RequestStatus, RequestType, SECTOR_BYTES,
    SectorRange, Unmap, feature,
};
use vm_memory::GuestMemory;

use super::{Access, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS};
use crate::{Chain, ChainFault, DeviceError};

/// What the driver may do: decided once, at activation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) capacity: u64,
    pub(super) access: Access,
    pub(super) features: Features,
}

/// A range of the disk, in bytes; within the disk and sector-aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A checked request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the chain's writable buffers, but for the status byte.
    Read {
        offset: u64,
        len: u32,
    },
    /// Write the chain's readable buffers from [`HEADER_BYTES`] on.
    Write {
        offset: u64,
        len: u32,
    },
    Flush,
    GetId,
    Discard(Vec<ByteRange>),
    WriteZeroes(Vec<(ByteRange, Unmap)>),
    /// Nothing to do but to say so.
    Refused(RequestStatus),
}

impl Request {
    /// The bytes that it reads or writes, for limits; discards and zeroes are holes, which cost none.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => u64::from(*len),
            _ => 0,
        }
    }
}

/// Where the status byte is: the last writable one, whatever the framing (§2.7.4.1).
pub(super) fn status_offset(chain: &Chain) -> Result<u32, ChainFault> {
    chain
        .writable
        .len()
        .checked_sub(1)
        .ok_or(ChainFault::BadLayout)
}

/// Reads header and ranges once, and checks everything against `limits`.
///
/// An error means that the chain cannot carry a request at all; a request that must fail is
/// [`Request::Refused`].
pub(super) fn parse<M: GuestMemory>(
    mem: &M,
    chain: &Chain,
    limits: &Limits,
) -> Result<Result<Request, ChainFault>, DeviceError> {
    let data_in = match status_offset(chain) {
        Ok(data_in) => data_in,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut header = [0; HEADER_BYTES as usize];
    let got = chain.readable.read_at(mem, 0, &mut header)?;
    let Ok(header) = BlkRequest::parse(header.split_at_checked(got).map_or(&[], |(head, _)| head))
    else {
        return Ok(Err(ChainFault::BadLayout));
    };
    let data_out = chain.readable.len().saturating_sub(HEADER_BYTES);
    let io = |len: u32| limits.range(header.sector, u64::from(len));
    let request = match header.kind {
        RequestType::IN => match io(data_in) {
            Some(range) => Request::Read {
                offset: range.offset,
                len: data_in,
            },
            None => Request::Refused(RequestStatus::IOERR),
        },
        // §5.2.6.2: a read-only device MUST fail writes with IOERR and write nothing.
        RequestType::OUT => match io(data_out) {
            Some(range) if limits.access == Access::ReadWrite => Request::Write {
                offset: range.offset,
                len: data_out,
            },
            _ => Request::Refused(RequestStatus::IOERR),
        },
        RequestType::FLUSH => Request::Flush,
        RequestType::GET_ID if data_in as usize >= ID_BYTES => Request::GetId,
        RequestType::GET_ID => Request::Refused(RequestStatus::IOERR),
        RequestType::DISCARD if limits.may(feature::DISCARD) => {
            let ranges = read_ranges(mem, chain, limits, MAX_DISCARD_SECTORS)?;
            match ranges {
                // §5.2.6.2: unmap is for write-zeroes only.
                Ok(ranges) if ranges.iter().any(|(_, unmap)| *unmap == Unmap::Allowed) => {
                    Request::Refused(RequestStatus::UNSUPP)
                }
                Ok(ranges) => {
                    Request::Discard(ranges.into_iter().map(|(range, _)| range).collect())
                }
                Err(status) => Request::Refused(status),
            }
        }
        RequestType::WRITE_ZEROES if limits.may(feature::WRITE_ZEROES) => {
            match read_ranges(mem, chain, limits, MAX_WRITE_ZEROES_SECTORS)? {
                Ok(ranges) => Request::WriteZeroes(ranges),
                Err(status) => Request::Refused(status),
            }
        }
        _ => Request::Refused(RequestStatus::UNSUPP),
    };
    Ok(Ok(request))
}

type Ranges = Vec<(ByteRange, Unmap)>;

fn read_ranges<M: GuestMemory>(
    mem: &M,
    chain: &Chain,
    limits: &Limits,
    max_sectors: u32,
) -> Result<Result<Ranges, RequestStatus>, DeviceError> {
    let bytes = chain.readable.len().saturating_sub(HEADER_BYTES);
    let count = bytes / RANGE_BYTES;
    if !bytes.is_multiple_of(RANGE_BYTES) || count == 0 || count > MAX_RANGES {
        return Ok(Err(RequestStatus::IOERR));
    }
    let mut raw = [0; (MAX_RANGES * RANGE_BYTES) as usize];
    let got = chain.readable.read_at(mem, HEADER_BYTES, &mut raw)?;
    let (raw, _) = raw.split_at_checked(got).unwrap_or_default();
    let check = |raw: &[u8]| {
        let range = SectorRange::parse(raw).map_err(|_| RequestStatus::IOERR)?;
        // §5.2.6.2: reserved flags make the request UNSUPP.
        let unmap = range.unmap().ok_or(RequestStatus::UNSUPP)?;
        if range.sectors > max_sectors {
            return Err(RequestStatus::IOERR);
        }
        let bytes = u64::from(range.sectors).saturating_mul(SECTOR_BYTES);
        limits
            .range(range.sector, bytes)
            .map(|range| (range, unmap))
            .ok_or(RequestStatus::IOERR)
    };
    Ok(raw.chunks_exact(RANGE_BYTES as usize).map(check).collect())
}

impl Limits {
    /// The bytes from `sector` on, if they are whole sectors within the disk.
    fn range(&self, sector: u64, len: u64) -> Option<ByteRange> {
        let offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset.checked_add(len)?;
        let fits =
            len.is_multiple_of(SECTOR_BYTES) && end <= self.capacity.saturating_mul(SECTOR_BYTES);
        fits.then_some(ByteRange { offset, len })
    }

    /// Whether a request that changes data is negotiated and allowed.
    fn may(&self, feature: Features) -> bool {
        self.access == Access::ReadWrite && self.features.contains(feature)
    }
}
