// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The buffers of one direction of a descriptor chain.

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::DeviceError;

/// One contiguous guest-physical buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub addr: GuestAddress,
    /// Bytes; never zero in a [`Buffers`].
    pub len: u32,
}

/// Guest buffers that read as one byte sequence, whatever their borders (virtio v1.3 §2.7.4.1: no
/// assumption on framing).
///
/// Invariant: the lengths add up to `len` without overflow; segments were inside guest memory when
/// the chain was taken.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    len: u32,
}

impl Buffers {
    /// Total bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is no byte at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers, in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The pieces that make up `len` bytes from `offset`, cut off at the end.
    pub fn range(&self, offset: u32, len: u32) -> impl Iterator<Item = Segment> + '_ {
        let mut skip = offset;
        let mut left = len;
        self.segments.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len);
            skip = skip.saturating_sub(skipped);
            let taken = segment.len.saturating_sub(skipped).min(left);
            left = left.saturating_sub(taken);
            let addr = GuestAddress(segment.addr.0.checked_add(u64::from(skipped))?);
            (taken > 0).then_some(Segment { addr, len: taken })
        })
    }

    /// Copies from `offset` into `to`; returns how many bytes there were to copy.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] if guest memory has gone.
    pub fn read_at<M: GuestMemory>(
        &self,
        mem: &M,
        offset: u32,
        to: &mut [u8],
    ) -> Result<usize, DeviceError> {
        let mut rest = to;
        let mut copied = 0usize;
        for segment in self.range(offset, u32::try_from(rest.len()).unwrap_or(u32::MAX)) {
            let Some((now, later)) = rest.split_at_mut_checked(segment.len as usize) else {
                break;
            };
            mem.read_slice(now, segment.addr)
                .map_err(|source| DeviceError::Memory { source })?;
            copied = copied.saturating_add(now.len());
            rest = later;
        }
        Ok(copied)
    }

    /// Copies `from` to `offset`; returns how many bytes there was room for.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] if guest memory has gone.
    pub fn write_at<M: GuestMemory>(
        &self,
        mem: &M,
        offset: u32,
        from: &[u8],
    ) -> Result<usize, DeviceError> {
        let mut rest = from;
        let mut copied = 0usize;
        for segment in self.range(offset, u32::try_from(rest.len()).unwrap_or(u32::MAX)) {
            let Some((now, later)) = rest.split_at_checked(segment.len as usize) else {
                break;
            };
            mem.write_slice(now, segment.addr)
                .map_err(|source| DeviceError::Memory { source })?;
            copied = copied.saturating_add(now.len());
            rest = later;
        }
        Ok(copied)
    }

    /// Adds a buffer; false if the total would exceed `max`. A buffer without bytes adds nothing.
    pub(crate) fn push(&mut self, segment: Segment, max: u32) -> bool {
        let Some(len) = self.len.checked_add(segment.len).filter(|len| *len <= max) else {
            return false;
        };
        self.len = len;
        if segment.len > 0 {
            self.segments.push(segment);
        }
        true
    }

    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn buffers(lens: &[u32]) -> Buffers {
        let mut all = Buffers::default();
        let mut addr = 0;
        for &len in lens {
            assert!(all.push(
                Segment {
                    addr: GuestAddress(addr),
                    len
                },
                u32::MAX
            ));
            addr += u64::from(len) + 3; // a gap, so that a border missed shows
        }
        all
    }

    proptest! {
        #[test]
        fn any_framing_reads_back_what_was_written(
            lens in prop::collection::vec(0u32..50, 0..8),
            offset in 0u32..200,
            data in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mem = memory();
            let all = buffers(&lens);
            let room = all.len().saturating_sub(offset).min(u32::try_from(data.len()).unwrap()) as usize;
            prop_assert_eq!(all.write_at(&mem, offset, &data).unwrap(), room);
            let mut back = vec![0; data.len()];
            prop_assert_eq!(all.read_at(&mem, offset, &mut back).unwrap(), room);
            prop_assert_eq!(&back[..room], &data[..room]);
        }
    }

    #[test]
    fn total_at_cap_fits_and_one_past_does_not() {
        let mut all = Buffers::default();
        assert!(all.push(
            Segment {
                addr: GuestAddress(0),
                len: 10
            },
            10
        ));
        assert!(!all.push(
            Segment {
                addr: GuestAddress(0),
                len: 1
            },
            10
        ));
        assert!(!all.push(
            Segment {
                addr: GuestAddress(0),
                len: u32::MAX
            },
            u32::MAX
        ));
        assert_eq!(all.len(), 10);
    }
}
