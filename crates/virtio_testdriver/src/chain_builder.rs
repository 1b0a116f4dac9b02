// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Descriptor chains.

use crate::{DESC_WRITE, TestMemory};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Descriptor flags; NEXT is added where a successor follows.
    pub flags: u16,
}

/// Collects buffers for [`crate::TestDriver::add`].
#[derive(Clone, Debug, Default)]
pub struct ChainBuilder {
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) indirect: bool,
}

impl ChainBuilder {
    /// A chain without buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a buffer that the device reads, filled with `data`.
    #[must_use]
    pub fn readable(self, mem: &mut TestMemory, data: &[u8]) -> Self {
        let addr = mem.alloc_with(data);
        self.raw(addr, len_u32(data.len()), 0)
    }

    /// Adds a fresh buffer of `len` bytes that the device writes.
    #[must_use]
    pub fn writable(self, mem: &mut TestMemory, len: usize) -> Self {
        let addr = mem.alloc(len as u64, 16);
        self.raw(addr, len_u32(len), DESC_WRITE)
    }

    /// Adds a buffer as it is given, sane or not.
    #[must_use]
    pub fn raw(mut self, addr: u64, len: u32, flags: u16) -> Self {
        self.buffers.push(Buffer { addr, len, flags });
        self
    }

    /// Puts the buffers into an indirect table (virtio v1.3 §2.7.5.3).
    #[must_use]
    pub fn indirect(mut self) -> Self {
        self.indirect = true;
        self
    }

    /// The buffers added so far.
    #[must_use]
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).expect("a buffer's length fits 32 bits")
}
