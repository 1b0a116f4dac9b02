// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where a block device's bytes live.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use virtio_wire::blk::Unmap;

use crate::IoSlices;

/// Bytes written at a time where the file system cannot zero a range itself.
const ZERO_CHUNK: usize = 64 << 10;

/// The storage behind a block device, and the seam at which tests inject errors and delays.
///
/// Caller: the device's workers, from several threads at once. Ranges are within `size` and
/// sector-aligned; the caller checks. Calls block. A failed call leaves the range undefined, and
/// the device usable.
pub trait DiskIo: Send + Sync {
    /// Bytes of the disk; constant.
    ///
    /// # Errors
    /// The host's.
    fn size(&self) -> io::Result<u64>;

    /// Fills `to` from `offset`.
    ///
    /// # Errors
    /// The host's; the disk ends early.
    fn read(&self, to: IoSlices<'_>, offset: u64) -> io::Result<()>;

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// The host's.
    fn write(&self, from: IoSlices<'_>, offset: u64) -> io::Result<()>;

    /// Makes every write that has completed durable.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// Gives storage back; the content becomes undefined. A disk that cannot does nothing.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: Unmap) -> io::Result<()>;
}

/// A raw image in a file, or a block device.
pub struct FileDisk {
    file: File,
}

impl FileDisk {
    /// Takes an open file; whether it may be written is decided by its open mode and by the device's access.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file }
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match fallocate(
                &self.file,
                mode | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            ) {
                Err(Errno::EINTR) => {}
                done => return done.map_err(io::Error::from),
            }
        }
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = [0u8; ZERO_CHUNK];
        let mut at = offset;
        let mut left = len;
        while left > 0 {
            let step = left.min(ZERO_CHUNK as u64);
            let step_bytes = usize::try_from(step).map_err(|_| io::ErrorKind::InvalidInput)?;
            let chunk = zeroes.get(..step_bytes).unwrap_or(&zeroes);
            self.file.write_all_at(chunk, at)?;
            at = at.checked_add(step).ok_or(io::ErrorKind::InvalidInput)?;
            left = left.saturating_sub(step);
        }
        Ok(())
    }
}

impl DiskIo for FileDisk {
    fn size(&self) -> io::Result<u64> {
        // The end, not the metadata: it is right for block devices too. All I/O names its offset,
        // so the position is free.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn read(&self, to: IoSlices<'_>, offset: u64) -> io::Result<()> {
        to.fill_from_file(self.file.as_fd(), offset)
    }

    fn write(&self, from: IoSlices<'_>, offset: u64) -> io::Result<()> {
        from.drain_to_file(self.file.as_fd(), offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len) {
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: Unmap) -> io::Result<()> {
        let zeroed = match unmap {
            Unmap::Allowed => self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len),
            Unmap::Forbidden => self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len),
        };
        match zeroed {
            Err(error) if is_unsupported(&error) => self.write_zero_bytes(offset, len),
            other => other,
        }
    }
}

/// The file system or device has no such operation, as opposed to having failed at it.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}
