// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Guest memory: private anonymous pages that cost nothing until touched, with files mapped over them.
#![expect(unsafe_code, reason = "maps files over guest memory with MAP_FIXED")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::VmmError;
use crate::layout::{PAGE_BYTES, RamBlock};

/// Guests up to this size get small pages. Huge ones make an idle guest of 256 MiB 7 MiB larger (32.5 instead of 25.6 MiB):
/// a guest that boots touches a little of many 2 MiB blocks. Larger guests have what the host's setting gives them.
const SMALL_PAGES_UP_TO: u64 = 1 << 30;

/// Maps the guest's RAM.
///
/// # Errors
/// [`VmmError::Host`] if the address space or the overcommit limit does not allow it.
pub fn map_ram(blocks: &[RamBlock]) -> Result<GuestMemoryMmap, VmmError> {
    let ranges: Vec<(GuestAddress, usize)> = blocks
        .iter()
        .map(|block| {
            let len = usize::try_from(block.len).unwrap_or(usize::MAX);
            (GuestAddress(block.start), len)
        })
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| VmmError::Host {
        operation: "map guest memory",
        source: io::Error::other(error),
    })?;
    for region in memory.iter() {
        prepare(region, pages(blocks))?;
    }
    Ok(memory)
}

/// How large the pages of guest memory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// 4 KiB.
    Small,
    /// As the host's settings have it.
    Host,
}

/// The pages of a guest that starts with these blocks.
pub(crate) fn pages(blocks: &[RamBlock]) -> Pages {
    let total: u64 = blocks.iter().map(|block| block.len).sum();
    if total <= SMALL_PAGES_UP_TO {
        Pages::Small
    } else {
        Pages::Host
    }
}

/// Maps `len` bytes more for the guest, at `address` for it: private, or a part of a shared file.
///
/// # Errors
/// The host's.
pub(crate) fn map_more(
    address: GuestAddress,
    len: u64,
    pages: Pages,
    file: Option<FileOffset>,
) -> io::Result<GuestRegionMmap> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let flags = if file.is_some() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    let mut builder = MmapRegionBuilder::new(len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags | libc::MAP_NORESERVE);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping = builder.build().map_err(io::Error::other)?;
    let region = GuestRegionMmap::new(mapping, address)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    prepare(&region, pages).map_err(io::Error::other)?;
    Ok(region)
}

fn prepare(region: &GuestRegionMmap, pages: Pages) -> Result<(), VmmError> {
    // A core file would hold the tenant's memory.
    advise(region, libc::MADV_DONTDUMP)?;
    match pages {
        Pages::Small => small_pages(region),
        Pages::Host => Ok(()),
    }
}

/// A kernel without huge pages (`EINVAL`) has nothing else.
fn small_pages(region: &GuestRegionMmap) -> Result<(), VmmError> {
    match advise(region, libc::MADV_NOHUGEPAGE) {
        Err(VmmError::Host { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn advise(region: &GuestRegionMmap, advice: libc::c_int) -> Result<(), VmmError> {
    let len = usize::try_from(region.len()).unwrap_or(0);
    // SAFETY: the range is a whole mapping that `region` owns; the advice does not change its content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
    match result {
        0 => Ok(()),
        _ => Err(VmmError::host("advise on guest memory")(
            io::Error::last_os_error(),
        )),
    }
}

/// Puts `len` bytes of `file` from `offset` at `address`, as a copy: for what the guest is going to write to.
///
/// # Errors
/// The range is not in guest memory, or the file is shorter.
pub(crate) fn copy_file(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    check_ranges(memory, address, file, offset, len)?;
    copy(memory, address, file, offset, len)
}

/// The same, with whole pages as private mappings where file and memory are aligned alike: for what the guest reads.
///
/// # Errors
/// Those of [`copy_file`].
pub(crate) fn map_file(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let file_end = check_ranges(memory, address, file, offset, len)?;
    let outside = || io::Error::from(io::ErrorKind::InvalidData);
    let first_page = offset
        .checked_next_multiple_of(PAGE_BYTES)
        .ok_or_else(outside)?;
    let pages_end = file_end & !(PAGE_BYTES - 1);
    let aligned = address.0 % PAGE_BYTES == offset % PAGE_BYTES;
    if !aligned
        || first_page >= pages_end
        || !map_pages(memory, address, file, offset, first_page..pages_end)
    {
        return copy(memory, address, file, offset, len);
    }
    copy(
        memory,
        address,
        file,
        offset,
        first_page.saturating_sub(offset),
    )?;
    let tail = address
        .0
        .checked_add(pages_end.saturating_sub(offset))
        .ok_or_else(outside)?;
    copy(
        memory,
        GuestAddress(tail),
        file,
        pages_end,
        file_end.saturating_sub(pages_end),
    )
}

/// Gives where the range ends in the file.
fn check_ranges(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<u64> {
    let outside = || io::Error::new(io::ErrorKind::InvalidData, "outside guest memory or file");
    let file_end = offset.checked_add(len).ok_or_else(outside)?;
    if file.metadata()?.len() < file_end {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let bytes = usize::try_from(len).map_err(|_| outside())?;
    if GuestMemoryBackend::check_range(memory, address, bytes) {
        Ok(file_end)
    } else {
        Err(outside())
    }
}

/// Maps the file's bytes `pages` to where they belong if byte `offset` belongs at `address`; false if that cannot be done.
fn map_pages(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    file: &File,
    offset: u64,
    pages: std::ops::Range<u64>,
) -> bool {
    let Some(start) = address.0.checked_add(pages.start.saturating_sub(offset)) else {
        return false;
    };
    let len = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(usize::MAX);
    let Ok(slice) = memory.get_slice(GuestAddress(start), len) else {
        return false;
    };
    let Ok(file_offset) = libc::off_t::try_from(pages.start) else {
        return false;
    };
    let host = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the slice proves that host..host+len is one mapping of guest memory, which lives at least as long as
    // `memory`; start and length are whole pages. Guest memory is only ever accessed as volatile bytes, so exchanging
    // the pages behind it breaks no reference.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            file_offset,
        )
    };
    // A core file leaves these out too: what the guest writes here is its own.
    // SAFETY: the range is the mapping that was just made; the advice does not change its content.
    mapped == host.cast() && unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTDUMP) } == 0
}

/// Copies with a buffer on the stack, through `pread`: the file's own position belongs to others.
fn copy(
    memory: &GuestMemoryMmap,
    mut address: GuestAddress,
    file: &File,
    mut offset: u64,
    mut len: u64,
) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = [0; 16384];
    while len > 0 {
        let now = usize::try_from(len).map_or(buffer.len(), |len| len.min(buffer.len()));
        let chunk = buffer.get_mut(..now).unwrap_or_default();
        file.read_exact_at(chunk, offset)?;
        memory
            .write_slice(chunk, address)
            .map_err(io::Error::other)?;
        let now = now as u64;
        (offset, len) = (offset.saturating_add(now), len.saturating_sub(now));
        address = GuestAddress(address.0.saturating_add(now));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use ids::Mib;
    use proptest::prelude::*;

    use super::*;
    use crate::layout;

    fn file(len: usize) -> (File, Vec<u8>) {
        let content: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        (file, content)
    }

    proptest! {
        #[test]
        fn any_alignment_loads_the_same_bytes(offset in 0u64..9000, at in 0u64..9000, len in 0u64..20000) {
            let (file, content) = file(40000);
            for load in [map_file, copy_file] {
                let memory = map_ram(&layout::ram_blocks(Mib(1))).unwrap();
                load(&memory, GuestAddress(0x4000 + at), &file, offset, len).unwrap();
                let mut loaded = vec![0xff; usize::try_from(len).unwrap() + 1];
                memory.read_slice(&mut loaded, GuestAddress(0x4000 + at)).unwrap();
                let start = usize::try_from(offset).unwrap();
                prop_assert_eq!(&loaded[..loaded.len() - 1], &content[start..start + loaded.len() - 1]);
                prop_assert_eq!(loaded[loaded.len() - 1], 0, "nothing after the end");
            }
        }
    }

    #[test]
    fn guest_writes_do_not_reach_the_file() {
        let memory = map_ram(&layout::ram_blocks(Mib(1))).unwrap();
        let (file, content) = file(8192);
        map_file(&memory, GuestAddress(0), &file, 0, 8192).unwrap();
        memory.write_slice(&[0xee; 8192], GuestAddress(0)).unwrap();
        let mut back = vec![0; 8192];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        assert_eq!(back, content);
    }

    #[test]
    fn short_file_and_small_memory_are_errors() {
        let memory = map_ram(&layout::ram_blocks(Mib(1))).unwrap();
        let (file, _) = file(100);
        for load in [map_file, copy_file] {
            assert!(load(&memory, GuestAddress(0), &file, 0, 101).is_err());
            assert!(load(&memory, GuestAddress((1 << 20) - 99), &file, 0, 100).is_err());
            assert!(load(&memory, GuestAddress(0), &file, u64::MAX, 100).is_err());
        }
    }
}
