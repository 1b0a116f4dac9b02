// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One descriptor chain, read from guest memory once and validated.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use crate::{Buffers, ChainFault, Segment};

/// Bytes of a descriptor (virtio v1.3 §2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;

/// The buffers of one request: first those the device reads, then those it writes.
///
/// Reused from request to request, so that serving a queue allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    /// What the driver sent.
    pub readable: Buffers,
    /// Where the driver wants the answer.
    pub writable: Buffers,
}

/// Where a chain starts and what it may hold.
#[derive(Clone, Copy)]
pub(crate) struct ChainRules {
    pub(crate) table: GuestAddress,
    pub(crate) queue_size: u16,
    pub(crate) indirect: bool,
    pub(crate) max_bytes: u32,
}

impl Chain {
    /// Index of the first descriptor: what the used ring names.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes of both directions.
    #[must_use]
    pub fn total_len(&self) -> u32 {
        self.readable.len().saturating_add(self.writable.len())
    }

    /// Replaces the content with the chain at `head`.
    ///
    /// Walks at most `queue_size` descriptors in all (virtio v1.3 §2.7.5.3.1), so a loop ends as
    /// [`ChainFault::TooLong`].
    pub(crate) fn load<M: GuestMemory>(
        &mut self,
        mem: &M,
        rules: &ChainRules,
        head: u16,
    ) -> Result<(), ChainFault> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut table = Table {
            addr: rules.table,
            size: u32::from(rules.queue_size),
        };
        let mut nested = false;
        let mut next = head;
        // The descriptor that names the table is no part of the chain's length: Linux fills a table as long as the queue.
        let mut left = rules.queue_size;
        loop {
            let descriptor = table.read(mem, next)?;
            if descriptor.refers_to_indirect_table() {
                // §2.7.5.3.1: only if negotiated, never nested, never followed by more.
                if !rules.indirect || nested || descriptor.has_next() {
                    return Err(ChainFault::BadIndirect);
                }
                table = Table::indirect(&descriptor)?;
                nested = true;
                next = 0;
                continue;
            }
            left = left.checked_sub(1).ok_or(ChainFault::TooLong)?;
            self.push(mem, &descriptor, rules.max_bytes)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            next = descriptor.next();
        }
    }

    fn push<M: GuestMemory>(
        &mut self,
        mem: &M,
        descriptor: &Descriptor,
        max: u32,
    ) -> Result<(), ChainFault> {
        let segment = Segment {
            addr: descriptor.addr(),
            len: descriptor.len(),
        };
        let (side, access, left) = if descriptor.is_write_only() {
            (
                &mut self.writable,
                Permissions::Write,
                max.saturating_sub(self.readable.len()),
            )
        } else if self.writable.is_empty() {
            (&mut self.readable, Permissions::Read, max)
        } else {
            return Err(ChainFault::BadOrder);
        };
        if !side.push(segment, left) {
            return Err(ChainFault::TooManyBytes);
        }
        if segment.len > 0 && !mem.check_range(segment.addr, segment.len as usize, access) {
            return Err(ChainFault::OutsideMemory);
        }
        Ok(())
    }
}

struct Table {
    addr: GuestAddress,
    size: u32,
}

impl Table {
    fn indirect(descriptor: &Descriptor) -> Result<Self, ChainFault> {
        let len = descriptor.len();
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainFault::BadIndirect);
        }
        Ok(Self {
            addr: descriptor.addr(),
            size: len / DESCRIPTOR_BYTES,
        })
    }

    fn read<M: GuestMemory>(&self, mem: &M, index: u16) -> Result<Descriptor, ChainFault> {
        if u32::from(index) >= self.size {
            return Err(ChainFault::BadIndex);
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let addr = self
            .addr
            .checked_add(offset)
            .ok_or(ChainFault::OutsideMemory)?;
        mem.read_obj(addr).map_err(|_| ChainFault::OutsideMemory)
    }
}
