// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Guest memory that was private becomes shared with another process, while the guest is stopped.
//!
//! Guest memory starts private: the kernel is mapped from the node's page cache, and untouched pages cost
//! nothing. A file server must map it, so it moves into a file (a memfd) once there is one, piece by piece: what the guest
//! has is copied, then the file is mapped over the piece. Addresses stay, so KVM, the devices and their rings see no
//! difference; KVM drops its translations by itself as mappings change.
//!
//! Caller: with vCPUs and devices paused. A failure half-way leaves guest memory whole but part of it private, so the
//! caller must not give the file to anybody then, nor try again: what has moved has content without having pages.
#![expect(
    unsafe_code,
    reason = "copies from and maps over guest memory, by its host address"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use virtio_wire::vhost_user::Region;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::VmmError;
use crate::layout::{PAGE_BYTES, RamBlock};

/// How much is copied before its private pages are freed: the most that the move needs beyond what the guest has.
const PIECE_BYTES: u64 = 32 << 20;
/// Bytes of an entry of `/proc/<pid>/pagemap` (Linux `Documentation/admin-guide/mm/pagemap.rst`).
const ENTRY_BYTES: u64 = 8;
/// Of an entry: the page is in memory, or is swapped out.
const HAS_CONTENT: u64 = 1 << 63 | 1 << 62;

/// Where guest memory goes.
pub(crate) struct Target<'a> {
    /// An empty file as large as guest memory with all that can be plugged, which cannot shrink.
    pub(crate) file: &'a File,
    /// This process's `/proc/<pid>/pagemap`, opened by someone who may. It tells which pages have content; reading the
    /// others would cost a fault each.
    pub(crate) pagemap: &'a File,
    /// What is mapped from files, and so has content without having pages.
    pub(crate) from_files: &'a [RamBlock],
    /// Where memory can be plugged.
    pub(crate) pluggable: &'a Range<u64>,
}

/// Where guest memory goes in its file: what the VM started with, then all that can be plugged, whether it is or not.
pub(crate) fn regions(memory: &GuestMemoryMmap, pluggable: &Range<u64>) -> Vec<Region> {
    let mut regions = Vec::new();
    let mut offset = 0u64;
    let started_with = memory
        .iter()
        .filter(|region| !pluggable.contains(&region.start_addr().0));
    for region in started_with {
        regions.push(Region {
            address: region.start_addr().0,
            len: region.len(),
            offset,
        });
        offset = offset.saturating_add(region.len());
    }
    if !pluggable.is_empty() {
        regions.push(Region {
            address: pluggable.start,
            len: pluggable.end.saturating_sub(pluggable.start),
            offset,
        });
    }
    regions
}

/// The offset of pluggable memory in the file.
pub(crate) fn pluggable_offset(memory: &GuestMemoryMmap, pluggable: &Range<u64>) -> u64 {
    let regions = regions(memory, pluggable);
    let found = regions
        .iter()
        .find(|region| region.address == pluggable.start);
    found.map_or(0, |region| region.offset)
}

/// Moves all of guest memory, once.
///
/// # Errors
/// The file has another size, or the host is out of memory.
pub(crate) fn share(memory: &GuestMemoryMmap, target: &Target<'_>) -> Result<(), VmmError> {
    let regions = regions(memory, target.pluggable);
    let expected: u64 = regions.iter().map(|region| region.len).sum();
    let mut file = target.file;
    let len = file
        .seek(SeekFrom::End(0))
        .map_err(VmmError::host("find the size of the file for guest memory"))?;
    if len != expected {
        return Err(VmmError::Config {
            reason: format!("the file for guest memory has {len} bytes, guest memory {expected}"),
        });
    }
    for region in memory.iter() {
        let start = region.start_addr().0;
        let place = regions.iter().find(|place| {
            (place.address..place.address.saturating_add(place.len)).contains(&start)
        });
        let into = place.map_or(0, |place| start.saturating_sub(place.address));
        let region = Region {
            address: start,
            len: region.len(),
            offset: place.map_or(0, |place| place.offset.saturating_add(into)),
        };
        let mut done = 0;
        while done < region.len {
            let piece = Region {
                address: region.address.saturating_add(done),
                len: PIECE_BYTES.min(region.len.saturating_sub(done)),
                offset: region.offset.saturating_add(done),
            };
            move_piece(memory, target, &piece)
                .map_err(VmmError::host("share guest memory with the file server"))?;
            done = done.saturating_add(piece.len);
        }
    }
    Ok(())
}

fn move_piece(memory: &GuestMemoryMmap, target: &Target<'_>, piece: &Region) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let len = usize::try_from(piece.len).map_err(invalid)?;
    let slice = memory
        .get_slice(GuestAddress(piece.address), len)
        .map_err(io::Error::other)?;
    let guard = slice.ptr_guard_mut();
    let host = guard.as_ptr();
    for (start, bytes) in runs(target, piece, host as u64)? {
        let into = usize::try_from(start).map_err(invalid)?;
        let bytes = usize::try_from(bytes).map_err(invalid)?;
        let at = piece.offset.saturating_add(start);
        // SAFETY: the run lies within the slice, which is mapped guest memory; nobody writes to it, because the caller
        // has stopped vCPUs and devices, and no other process has it yet.
        let content = unsafe { std::slice::from_raw_parts(host.wrapping_add(into), bytes) };
        target.file.write_all_at(content, at)?;
    }
    let offset = libc::off_t::try_from(piece.offset).map_err(invalid)?;
    // SAFETY: the slice proves that host..host+len is one mapping of guest memory, which lives at least as long as
    // `memory`; start and length are whole pages. Guest memory is only ever accessed as volatile bytes, so exchanging
    // the pages behind it breaks no reference. The new pages have the content of the old.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
            target.file.as_raw_fd(),
            offset,
        )
    };
    if mapped != host.cast() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range is what was just mapped; the advice does not change its content.
    match unsafe { libc::madvise(mapped, len, libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The runs of pages of `piece` that have content: start within the piece, and length.
fn runs(target: &Target<'_>, piece: &Region, host: u64) -> io::Result<Vec<(u64, u64)>> {
    let pages = piece.len / PAGE_BYTES;
    let mut entries = vec![0; usize::try_from(pages.saturating_mul(ENTRY_BYTES)).unwrap_or(0)];
    let at = (host / PAGE_BYTES).saturating_mul(ENTRY_BYTES);
    target.pagemap.read_exact_at(&mut entries, at)?;
    let (entries, _) = entries.as_chunks::<8>();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (page, entry) in (0u64..).zip(entries) {
        let start = page.saturating_mul(PAGE_BYTES);
        let address = piece.address.saturating_add(start);
        let has_content =
            u64::from_le_bytes(*entry) & HAS_CONTENT != 0 || is_from_file(target, address);
        match runs.last_mut() {
            _ if !has_content => {}
            Some((run, len)) if run.saturating_add(*len) == start => {
                *len = len.saturating_add(PAGE_BYTES);
            }
            _ => runs.push((start, PAGE_BYTES)),
        }
    }
    Ok(runs)
}

fn is_from_file(target: &Target<'_>, page: u64) -> bool {
    let end = page.saturating_add(PAGE_BYTES);
    let overlaps = |block: &RamBlock| block.start < end && page < block.end();
    target.from_files.iter().any(overlaps)
}

#[cfg(test)]
mod tests {
    use ids::Mib;
    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::Bytes;

    use super::*;
    use crate::layout;
    use crate::memory::{map_file, map_ram};

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn content_moves_and_later_writes_are_seen_on_both_sides() {
        let blocks = layout::ram_blocks(Mib(72));
        let memory = map_ram(&blocks).unwrap();
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&[7; 9000], 0).unwrap();
        let from_file = RamBlock {
            start: 0x10_0000,
            len: 9000,
        };
        map_file(&memory, GuestAddress(from_file.start), &image, 0, 9000).unwrap();
        for address in [0, 0x5000, (32 << 20) - 2, 71 << 20, (72 << 20) - 4] {
            memory.write_slice(b"here", GuestAddress(address)).unwrap();
        }
        let file = memfd(72 << 20);
        let target = Target {
            file: &file,
            pagemap: &File::open("/proc/self/pagemap").unwrap(),
            from_files: &[from_file],
            pluggable: &(0..0),
        };
        share(&memory, &target).unwrap();
        assert_eq!(regions(&memory, &(0..0)).len(), 1);
        let mut bytes = [0; 4];
        for address in [0, 0x5000, (32 << 20) - 2, 71 << 20, (72 << 20) - 4] {
            file.read_exact_at(&mut bytes, address).unwrap();
            assert_eq!(&bytes, b"here", "{address:#x} in the file");
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            assert_eq!(&bytes, b"here", "{address:#x} in memory");
        }
        let mut image = vec![0; 9001];
        file.read_exact_at(&mut image, from_file.start).unwrap();
        assert_eq!((image[0], image[8999], image[9000]), (7, 7, 0));
        memory.write_slice(b"more", GuestAddress(0x9000)).unwrap();
        file.read_exact_at(&mut bytes, 0x9000).unwrap();
        assert_eq!(&bytes, b"more");
        file.write_all_at(b"back", 0x9000).unwrap();
        memory.read_slice(&mut bytes, GuestAddress(0x9000)).unwrap();
        assert_eq!(&bytes, b"back");
    }

    #[test]
    fn plugged_memory_goes_behind_the_rest_at_its_place_in_the_region() {
        let pluggable = (4 << 30)..(4 << 30) + (64 << 20);
        let ranges = [(0, 4 << 20), ((4 << 30) + (32 << 20), 16 << 20)];
        let ranges = ranges.map(|(start, len)| (GuestAddress(start), len));
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let plugged = GuestAddress((4 << 30) + (32 << 20) + 8192);
        memory.write_slice(b"plugged", plugged).unwrap();
        let file = memfd(68 << 20);
        let target = Target {
            file: &file,
            pagemap: &File::open("/proc/self/pagemap").unwrap(),
            from_files: &[],
            pluggable: &pluggable,
        };
        share(&memory, &target).unwrap();
        assert_eq!(pluggable_offset(&memory, &pluggable), 4 << 20);
        assert_eq!(regions(&memory, &pluggable).len(), 2);
        let mut bytes = [0; 7];
        file.read_exact_at(&mut bytes, (36 << 20) + 8192).unwrap();
        assert_eq!(&bytes, b"plugged");
        memory.write_slice(b"changed", plugged).unwrap();
        file.read_exact_at(&mut bytes, (36 << 20) + 8192).unwrap();
        assert_eq!(&bytes, b"changed");
    }

    #[test]
    fn untouched_memory_costs_nothing_after_the_move_either() {
        let memory = map_ram(&layout::ram_blocks(Mib(64))).unwrap();
        memory.write_slice(&[1; 4096], GuestAddress(0)).unwrap();
        let file = memfd(64 << 20);
        let target = Target {
            file: &file,
            pagemap: &File::open("/proc/self/pagemap").unwrap(),
            from_files: &[],
            pluggable: &(0..0),
        };
        share(&memory, &target).unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert_eq!(blocks * 512, 4096);
    }

    #[test]
    fn file_of_another_size_is_refused() {
        let memory = map_ram(&layout::ram_blocks(Mib(1))).unwrap();
        let file = memfd(4096);
        let target = Target {
            file: &file,
            pagemap: &File::open("/proc/self/pagemap").unwrap(),
            from_files: &[],
            pluggable: &(0..0),
        };
        assert!(matches!(
            share(&memory, &target),
            Err(VmmError::Config { .. })
        ));
    }
}
