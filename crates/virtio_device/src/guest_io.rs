// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! System calls straight into and out of guest memory: no copy in between.
#![expect(
    unsafe_code,
    reason = "preadv and its kin take raw iovecs; vm-memory's safe ReadVolatile does one slice per call and has no offset"
)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory, Permissions};

use crate::{Buffers, DeviceError};

/// What a system call will do with guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The host reads guest memory.
    FromGuest,
    /// The host writes guest memory.
    IntoGuest,
}

/// A range of guest buffers, as system calls take it.
///
/// Invariant: each iovec lies within memory that is borrowed for `'m`, the guest's or, to be read only, the host's, so the
/// mapping outlives it. What is in guest memory may change at any time (the guest runs): nothing here turns
/// it into a reference.
pub struct IoSlices<'m> {
    iovecs: Vec<libc::iovec>,
    direction: Direction,
    memory: PhantomData<&'m ()>,
}

/// Most iovecs that the kernel takes in one call (`IOV_MAX`).
const IOV_MAX: usize = 1024;

impl<'m> IoSlices<'m> {
    /// `len` bytes of `buffers` from `offset`, cut off at their end.
    ///
    /// Pages about to be written are marked dirty now; a snapshot is taken only while workers are
    /// paused, so none is missed.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] if guest memory has gone.
    pub fn new<M: GuestMemory>(
        mem: &'m M,
        buffers: &Buffers,
        offset: u32,
        len: u32,
        direction: Direction,
    ) -> Result<Self, DeviceError> {
        let mut all = Self::empty(direction);
        all.iovecs.reserve(buffers.segments().len());
        all.append(mem, buffers, offset, len)?;
        Ok(all)
    }

    /// No bytes; to append to.
    #[must_use]
    pub fn empty(direction: Direction) -> Self {
        Self {
            iovecs: Vec::new(),
            direction,
            memory: PhantomData,
        }
    }

    /// Bytes of the host, to be written out before guest memory.
    #[must_use]
    pub fn host(bytes: &'m [u8]) -> Self {
        Self {
            iovecs: vec![libc::iovec {
                // Only read from: every call that writes through an iovec asks for the other direction.
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            }],
            direction: Direction::FromGuest,
            memory: PhantomData,
        }
    }

    /// Puts `len` bytes of `buffers` from `offset` behind it, so that one call goes over all; see [`IoSlices::new`].
    ///
    /// # Errors
    /// [`DeviceError::Memory`] if guest memory has gone.
    pub fn append<M: GuestMemory>(
        &mut self,
        mem: &'m M,
        buffers: &Buffers,
        offset: u32,
        len: u32,
    ) -> Result<(), DeviceError> {
        let access = match self.direction {
            Direction::FromGuest => Permissions::Read,
            Direction::IntoGuest => Permissions::Write,
        };
        let memory_error = |source| DeviceError::Memory { source };
        for segment in buffers.range(offset, len) {
            let slices = mem.get_slices(segment.addr, segment.len as usize, access);
            for slice in slices.map_err(memory_error)? {
                let slice = slice.map_err(memory_error)?;
                if self.direction == Direction::IntoGuest {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
                let guard = slice.ptr_guard_mut();
                self.iovecs.push(libc::iovec {
                    iov_base: guard.as_ptr().cast(),
                    iov_len: guard.len(),
                });
            }
        }
        Ok(())
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iovecs
            .iter()
            .fold(0usize, |sum, iovec| sum.saturating_add(iovec.iov_len))
    }

    /// Whether no byte is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills all of it from `fd` at `offset`.
    ///
    /// # Errors
    /// The call's own; [`io::ErrorKind::UnexpectedEof`] if the file ends early.
    pub fn fill_from_file(mut self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.require(Direction::IntoGuest)?;
        let mut at = to_off_t(offset)?;
        while !self.is_empty() {
            let (iovecs, count) = self.batch();
            // SAFETY: `iovecs` points to `count` iovecs, each within mapped guest memory for 'm (the type's
            // invariant); the kernel writes at most their lengths. `fd` is open for the borrow.
            let n = retry(|| unsafe { libc::preadv(fd.as_raw_fd(), iovecs, count, at) })?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at = advance_offset(at, n)?;
            self.advance(n);
        }
        Ok(())
    }

    /// Writes all of it to `fd` at `offset`.
    ///
    /// # Errors
    /// The call's own; [`io::ErrorKind::WriteZero`] if the file takes no more.
    pub fn drain_to_file(mut self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.require(Direction::FromGuest)?;
        let mut at = to_off_t(offset)?;
        while !self.is_empty() {
            let (iovecs, count) = self.batch();
            // SAFETY: as in `fill_from_file`; the kernel only reads.
            let n = retry(|| unsafe { libc::pwritev(fd.as_raw_fd(), iovecs, count, at) })?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at = advance_offset(at, n)?;
            self.advance(n);
        }
        Ok(())
    }

    /// One `readv` from a stream; returns the bytes read, 0 at its end.
    ///
    /// # Errors
    /// The call's own, [`io::ErrorKind::WouldBlock`] among them.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.require(Direction::IntoGuest)?;
        let (iovecs, count) = self.batch();
        // SAFETY: as in `fill_from_file`.
        let n = retry(|| unsafe { libc::readv(fd.as_raw_fd(), iovecs, count) })?;
        self.advance(n);
        Ok(n)
    }

    /// One `writev` to a stream; returns the bytes taken.
    ///
    /// # Errors
    /// The call's own, [`io::ErrorKind::WouldBlock`] among them.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.require(Direction::FromGuest)?;
        let (iovecs, count) = self.batch();
        // SAFETY: as in `fill_from_file`; the kernel only reads.
        let n = retry(|| unsafe { libc::writev(fd.as_raw_fd(), iovecs, count) })?;
        self.advance(n);
        Ok(n)
    }

    fn require(&self, direction: Direction) -> io::Result<()> {
        if self.direction == direction {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn batch(&self) -> (*const libc::iovec, libc::c_int) {
        let count = self.iovecs.len().min(IOV_MAX);
        (
            self.iovecs.as_ptr(),
            libc::c_int::try_from(count).unwrap_or(0),
        )
    }

    /// Leaves out the first `bytes` bytes of what is left.
    pub fn advance(&mut self, bytes: usize) {
        let mut left = bytes;
        let mut done = 0usize;
        for iovec in &mut self.iovecs {
            let step = left.min(iovec.iov_len);
            // SAFETY: `step` is at most the length, so the pointer stays within, or one past, the
            // same guest slice.
            iovec.iov_base = unsafe { iovec.iov_base.byte_add(step) };
            iovec.iov_len = iovec.iov_len.saturating_sub(step);
            left = left.saturating_sub(step);
            if iovec.iov_len > 0 {
                break;
            }
            done = done.saturating_add(1);
        }
        self.iovecs.drain(..done.min(self.iovecs.len()));
    }
}

/// Runs a call again while signals interrupt it; its result as bytes.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn to_off_t(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn advance_offset(at: libc::off_t, bytes: usize) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes)
        .ok()
        .and_then(|n| at.checked_add(n))
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::Segment;

    /// Two regions side by side: a buffer across their border takes two iovecs.
    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    fn buffers(segments: &[(u64, u32)]) -> Buffers {
        let mut all = Buffers::default();
        for &(addr, len) in segments {
            assert!(all.push(
                Segment {
                    addr: GuestAddress(addr),
                    len
                },
                u32::MAX
            ));
        }
        all
    }

    proptest! {
        #[test]
        fn file_round_trips_through_any_framing(
            segments in prop::collection::vec((0u64..0x1f00, 0u32..0x80), 1..6),
            offset in 0u32..0x40,
            at in 0u64..0x1000,
        ) {
            let mem = memory();
            let file = tempfile::tempfile().unwrap();
            let all = buffers(&segments);
            let len = all.len().saturating_sub(offset) as usize;
            let pattern: Vec<u8> = (0..0x2000).map(|i: u32| i.to_le_bytes()[0] ^ 0x5a).collect();
            mem.write_slice(&pattern, GuestAddress(0)).unwrap();
            let mut sent = vec![0; len];
            all.read_at(&mem, offset, &mut sent).unwrap();

            let out = IoSlices::new(&mem, &all, offset, u32::MAX, Direction::FromGuest).unwrap();
            prop_assert_eq!(out.len(), len);
            out.drain_to_file(file.as_fd(), at).unwrap();
            let into = buffers(&[(0x800, u32::try_from(len).unwrap())]);
            let back = IoSlices::new(&mem, &into, 0, u32::MAX, Direction::IntoGuest).unwrap();
            back.fill_from_file(file.as_fd(), at).unwrap();
            let mut got = vec![0; len];
            into.read_at(&mem, 0, &mut got).unwrap();
            prop_assert_eq!(got, sent);
        }
    }

    #[test]
    fn more_iovecs_than_one_call_takes_all_arrive_in_order() {
        let mem = memory();
        let pattern: Vec<u8> = (0..3000u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
        mem.write_slice(&pattern, GuestAddress(0)).unwrap();
        let single = |first: u64| buffers(&(0..3000).map(|i| (first + i, 1)).collect::<Vec<_>>());
        let file = tempfile::tempfile().unwrap();
        let from = single(0);
        let out = IoSlices::new(&mem, &from, 0, u32::MAX, Direction::FromGuest).unwrap();
        out.drain_to_file(file.as_fd(), 5).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3005);
        let into = single(0x1000);
        let back = IoSlices::new(&mem, &into, 0, u32::MAX, Direction::IntoGuest).unwrap();
        back.fill_from_file(file.as_fd(), 5).unwrap();
        let mut got = vec![0; 3000];
        mem.read_slice(&mut got, GuestAddress(0x1000)).unwrap();
        assert_eq!(got, pattern);
    }

    #[test]
    fn file_that_ends_early_is_an_error() {
        let mem = memory();
        let file = tempfile::tempfile().unwrap();
        let into = IoSlices::new(&mem, &buffers(&[(0, 16)]), 0, 16, Direction::IntoGuest).unwrap();
        let error = into.fill_from_file(file.as_fd(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn wrong_direction_is_refused_before_the_call() {
        let mem = memory();
        let file = tempfile::tempfile().unwrap();
        let all = buffers(&[(0, 16)]);
        let out = IoSlices::new(&mem, &all, 0, 16, Direction::FromGuest).unwrap();
        assert_eq!(
            out.fill_from_file(file.as_fd(), 0).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn stream_takes_what_it_can_and_the_rest_stays() {
        let mem = memory();
        mem.write_slice(b"hello world", GuestAddress(0xffb))
            .unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut out =
            IoSlices::new(&mem, &buffers(&[(0xffb, 11)]), 0, 11, Direction::FromGuest).unwrap();
        assert_eq!(out.write_to(ours.as_fd()).unwrap(), 11);
        assert!(out.is_empty());
        let mut got = [0; 11];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello world");
    }
}
