// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Guest memory for tests.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Guest memory of `size` bytes from address 0, with an allocator that only goes up; clones share both.
#[derive(Clone)]
pub struct TestMemory {
    mem: Arc<GuestMemoryMmap>,
    next: Arc<AtomicU64>,
    size: u64,
}

impl TestMemory {
    /// Zeroed memory of `size` bytes; address 0 is never allocated.
    ///
    /// # Panics
    /// The host has no such memory.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let mem =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("map test memory");
        Self::of(mem, size)
    }

    /// The first `size` bytes of `file` as memory that other processes can share.
    ///
    /// # Panics
    /// The file is shorter, or cannot be mapped.
    #[must_use]
    pub fn shared(file: File, size: usize) -> Self {
        let range = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let mem = GuestMemoryMmap::from_ranges_with_files([range]).expect("map test memory");
        Self::of(mem, size)
    }

    fn of(mem: GuestMemoryMmap, size: usize) -> Self {
        Self {
            mem: Arc::new(mem),
            next: Arc::new(AtomicU64::new(0x1000)),
            size: size as u64,
        }
    }

    /// The memory, as devices take it.
    #[must_use]
    pub fn space(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(&self.mem)
    }

    /// `len` fresh bytes, aligned to `align` (a power of two).
    ///
    /// # Panics
    /// Memory is used up.
    pub fn alloc(&mut self, len: u64, align: u64) -> u64 {
        let addr = self.next.load(Ordering::Relaxed).next_multiple_of(align);
        assert!(addr + len <= self.size, "test memory is used up");
        self.next.store(addr + len, Ordering::Relaxed);
        addr
    }

    /// A fresh buffer that holds `data`.
    pub fn alloc_with(&mut self, data: &[u8]) -> u64 {
        let addr = self.alloc(data.len() as u64, 16);
        self.write(addr, data);
        addr
    }

    /// Writes `data` at `addr`.
    ///
    /// # Panics
    /// Outside memory.
    pub fn write(&self, addr: u64, data: &[u8]) {
        self.mem
            .write_slice(data, GuestAddress(addr))
            .expect("write test memory");
    }

    /// Reads `len` bytes from `addr`.
    ///
    /// # Panics
    /// Outside memory.
    #[must_use]
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem
            .read_slice(&mut data, GuestAddress(addr))
            .expect("read test memory");
        data
    }

    pub(crate) fn read_u16(&self, addr: u64) -> u16 {
        self.mem
            .read_obj::<u16>(GuestAddress(addr))
            .map(u16::from_le)
            .expect("read test memory")
    }

    pub(crate) fn read_u32(&self, addr: u64) -> u32 {
        self.mem
            .read_obj::<u32>(GuestAddress(addr))
            .map(u32::from_le)
            .expect("read test memory")
    }
}
