// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One queue, from the driver's side (virtio v1.3 §2.7.13, §2.7.14).

use std::collections::VecDeque;

use crate::{ChainBuilder, DESC_INDIRECT, DESC_NEXT, TestMemory};

const DESCRIPTOR_BYTES: u64 = 16;

/// Where a queue's parts are, as the driver tells the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that the device has finished.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub written: u32,
}

/// The driver of one queue: rings in test memory, free descriptors, positions.
pub struct TestDriver {
    mem: TestMemory,
    rings: RingAddresses,
    free: VecDeque<u16>,
    avail_index: u16,
    used_index: u16,
}

impl TestDriver {
    /// Lays out rings of `size` entries in `mem`.
    pub fn new(mem: &mut TestMemory, size: u16) -> Self {
        let n = u64::from(size);
        let rings = RingAddresses {
            size,
            desc_table: mem.alloc(DESCRIPTOR_BYTES * n, 16),
            avail_ring: mem.alloc(6 + 2 * n, 2),
            used_ring: mem.alloc(6 + 8 * n, 4),
        };
        Self {
            mem: mem.clone(),
            rings,
            free: (0..size).collect(),
            avail_index: 0,
            used_index: 0,
        }
    }

    /// Starts at another position than 0 in both rings, as after `index` requests; before the first `add`.
    pub fn start_at(&mut self, index: u16) {
        self.used_index = index;
        self.set_avail_index(index);
        self.mem
            .write(self.rings.used_ring + 2, &index.to_le_bytes());
    }

    /// Where the rings are.
    #[must_use]
    pub fn rings(&self) -> RingAddresses {
        self.rings
    }

    /// Writes the chain's descriptors and makes it available; returns its head.
    ///
    /// # Panics
    /// The chain has no buffer, or descriptors are used up.
    pub fn add(&mut self, mem: &mut TestMemory, chain: &ChainBuilder) -> u16 {
        let head = self.stage(mem, chain);
        self.publish(head);
        head
    }

    /// Writes the chain's descriptors, without making it available; returns its head.
    ///
    /// # Panics
    /// The chain has no buffer, or descriptors are used up.
    pub fn stage(&mut self, mem: &mut TestMemory, chain: &ChainBuilder) -> u16 {
        let count = chain.buffers.len();
        assert!(count > 0, "a chain has at least one buffer");
        if chain.indirect {
            let table = mem.alloc(DESCRIPTOR_BYTES * count as u64, 16);
            for (i, buffer) in chain.buffers.iter().enumerate() {
                let more = i + 1 < count;
                let flags = if more {
                    buffer.flags | DESC_NEXT
                } else {
                    buffer.flags
                };
                let next = if more { index_u16(i + 1) } else { 0 };
                self.write_descriptor_at(
                    table + DESCRIPTOR_BYTES * i as u64,
                    buffer.addr,
                    buffer.len,
                    flags,
                    next,
                );
            }
            let head = self.take_descriptor();
            let len = u32::try_from(count).expect("few descriptors") * 16;
            self.write_descriptor(head, table, len, DESC_INDIRECT, 0);
            return head;
        }
        let indexes: Vec<u16> = (0..count).map(|_| self.take_descriptor()).collect();
        for (i, buffer) in chain.buffers.iter().enumerate() {
            let next = indexes.get(i + 1).copied();
            let flags = if next.is_some() {
                buffer.flags | DESC_NEXT
            } else {
                buffer.flags
            };
            self.write_descriptor(
                indexes[i],
                buffer.addr,
                buffer.len,
                flags,
                next.unwrap_or(0),
            );
        }
        indexes[0]
    }

    /// Makes `head` available (virtio v1.3 §2.7.13), whatever it names.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_index % self.rings.size);
        self.mem
            .write(self.rings.avail_ring + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_index = self.avail_index.wrapping_add(1);
        self.set_avail_index(self.avail_index);
    }

    /// Sets `avail.idx`, whatever it says.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        self.mem
            .write(self.rings.avail_ring + 2, &index.to_le_bytes());
    }

    /// Writes descriptor `index`, whatever it says.
    pub fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.rings.desc_table + DESCRIPTOR_BYTES * u64::from(index);
        self.write_descriptor_at(at, addr, len, flags, next);
    }

    /// The next finished chain; its descriptors are free again.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.mem.read_u16(self.rings.used_ring + 2) == self.used_index {
            return None;
        }
        let at = self.rings.used_ring + 4 + 8 * u64::from(self.used_index % self.rings.size);
        let used = Used {
            head: self.mem.read_u32(at),
            written: self.mem.read_u32(at + 4),
        };
        self.used_index = self.used_index.wrapping_add(1);
        self.release(u16::try_from(used.head).expect("the device gives back what it got"));
        Some(used)
    }

    /// All finished chains.
    pub fn drain_used(&mut self) -> Vec<Used> {
        std::iter::from_fn(|| self.pop_used()).collect()
    }

    /// `avail.used_event`: after which used entry the driver wants an interrupt (virtio v1.3 §2.7.7).
    pub fn set_used_event(&self, value: u16) {
        let at = self.rings.avail_ring + 4 + 2 * u64::from(self.rings.size);
        self.mem.write(at, &value.to_le_bytes());
    }

    /// `used.avail_event`: after which available entry the device wants a kick (§2.7.10).
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        self.mem
            .read_u16(self.rings.used_ring + 4 + 8 * u64::from(self.rings.size))
    }

    /// `used.flags`; 1 means no kicks (§2.7.10).
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.mem.read_u16(self.rings.used_ring)
    }

    /// Descriptors that no chain uses.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    fn take_descriptor(&mut self) -> u16 {
        self.free.pop_front().expect("descriptors are used up")
    }

    fn release(&mut self, head: u16) {
        let mut index = head;
        for _ in 0..self.rings.size {
            let at = self.rings.desc_table + DESCRIPTOR_BYTES * u64::from(index);
            let flags = self.mem.read_u16(at + 12);
            self.free.push_back(index);
            if flags & DESC_NEXT == 0 {
                break;
            }
            index = self.mem.read_u16(at + 14);
        }
    }

    fn write_descriptor_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.mem.write(at, &addr.to_le_bytes());
        self.mem.write(at + 8, &len.to_le_bytes());
        self.mem.write(at + 12, &flags.to_le_bytes());
        self.mem.write(at + 14, &next.to_le_bytes());
    }
}

fn index_u16(index: usize) -> u16 {
    u16::try_from(index).expect("few descriptors")
}
