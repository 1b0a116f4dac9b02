// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a kernel and an initramfs to a guest whose boot processor can start.
//!
//! Two protocols: PVH (32-bit, start info) and Linux's 64-bit entry (zero page). PVH is taken if the kernel has it.
//! What the kernel does not write to is mapped privately from its file, whole pages of it: it is shared with the host's
//! page cache and with every other VM. Its writable segments and the initramfs, which it overwrites when it frees it, are
//! copied: a page that is read from a mapping and then written to is three exits and a copy, with the guest waiting.

pub mod cmdline;
pub mod elf;
pub mod mptable;
pub mod registers;
mod tables;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ids::VcpuCount;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::VmmError;
use crate::layout::{self, RamBlock};
use crate::memory::{copy_file, map_file};

/// Where the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, start info in EBX.
    Pvh(u32),
    /// Long mode, zero page in RSI.
    Linux64(u64),
}

/// Which entry to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootProtocol {
    /// PVH if the kernel has it, else the 64-bit entry.
    #[default]
    Auto,
    /// The 64-bit entry, whatever the kernel has.
    Linux64,
}

/// What a guest is booted from.
pub struct BootSource<'a> {
    /// An uncompressed ELF kernel.
    pub kernel: &'a File,
    /// An uncompressed cpio archive; none if it is empty.
    pub initramfs: &'a File,
    /// Which entry to take.
    pub protocol: BootProtocol,
    /// The command line with its zero.
    pub command_line: &'a [u8],
    /// CPUs for the MP table: all that there can be.
    pub vcpus: VcpuCount,
}

/// What the tables tell the kernel.
struct BootInfo {
    initramfs: Option<RamBlock>,
    usable: Vec<RamBlock>,
    command_line_bytes: u32,
}

/// Puts everything the kernel needs into `memory`; says where it starts, and what is mapped from files.
///
/// # Errors
/// Kernel or initramfs cannot be read, are not what they should be, or do not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    blocks: &[RamBlock],
    source: &BootSource<'_>,
) -> Result<(Entry, Vec<RamBlock>), VmmError> {
    let mut from_files = Vec::new();
    let (entry, kernel_end) = load_kernel(memory, blocks, source, &mut from_files)?;
    let info = BootInfo {
        initramfs: load_initramfs(memory, blocks, source.initramfs, kernel_end)?,
        usable: layout::usable_ranges(blocks),
        command_line_bytes: u32::try_from(source.command_line.len()).unwrap_or(0),
    };
    write_tables(memory, source, entry, &info).map_err(|_| too_large("the boot data", blocks))?;
    Ok((entry, from_files))
}

fn write_tables(
    memory: &GuestMemoryMmap,
    source: &BootSource<'_>,
    entry: Entry,
    info: &BootInfo,
) -> Result<(), GuestMemoryError> {
    memory.write_slice(source.command_line, layout::COMMAND_LINE)?;
    memory.write_slice(&mptable::build(source.vcpus), layout::MP_TABLE)?;
    match entry {
        Entry::Pvh(_) => tables::write_start_info(memory, info),
        Entry::Linux64(_) => {
            tables::write_zero_page(memory, info)?;
            tables::write_long_mode(memory)
        }
    }
}

fn too_large(what: &'static str, blocks: &[RamBlock]) -> VmmError {
    VmmError::TooLarge {
        what,
        memory_mib: blocks.iter().map(|block| block.len >> 20).sum(),
    }
}

fn read_kernel(file: &File, offset: u64, bytes: &mut [u8]) -> Result<(), VmmError> {
    file.read_exact_at(bytes, offset)
        .map_err(|source| VmmError::Artifact {
            operation: "read the guest kernel",
            source,
        })
}

/// Loads the kernel; answers its entry and the first address after it.
fn load_kernel(
    memory: &GuestMemoryMmap,
    blocks: &[RamBlock],
    source: &BootSource<'_>,
    from_files: &mut Vec<RamBlock>,
) -> Result<(Entry, u64), VmmError> {
    let mut bytes = [0; elf::HEADER_BYTES];
    read_kernel(source.kernel, 0, &mut bytes)?;
    let header = elf::parse_header(&bytes)?;
    let mut pvh_entry = None;
    let mut kernel_end = 0;
    for index in 0..u64::from(header.table_entries) {
        let mut bytes = [0; elf::PROGRAM_HEADER_BYTES];
        let at = index
            .checked_mul(elf::PROGRAM_HEADER_BYTES as u64)
            .and_then(|offset| header.table_offset.checked_add(offset));
        let bad = VmmError::NotAKernel {
            reason: "its program headers are outside the file",
        };
        read_kernel(source.kernel, at.ok_or(bad)?, &mut bytes)?;
        match elf::parse_program_header(&bytes) {
            Some(
                segment @ elf::Segment::Load {
                    address,
                    file_bytes,
                    writable,
                    ..
                },
            ) => {
                if !writable {
                    from_files.push(RamBlock {
                        start: address,
                        len: file_bytes,
                    });
                }
                kernel_end = load_segment(memory, blocks, source.kernel, segment)?.max(kernel_end);
            }
            Some(elf::Segment::Note { offset, bytes }) => {
                let mut notes =
                    vec![0; usize::try_from(bytes.min(elf::MAX_NOTE_BYTES)).unwrap_or(0)];
                read_kernel(source.kernel, offset, &mut notes)?;
                pvh_entry = pvh_entry.or(elf::find_pvh_entry(&notes));
            }
            None => {}
        }
    }
    let entry = match (source.protocol, pvh_entry) {
        (BootProtocol::Auto, Some(entry)) => Entry::Pvh(entry),
        _ => Entry::Linux64(header.entry),
    };
    let address = match entry {
        Entry::Pvh(address) => u64::from(address),
        Entry::Linux64(address) => address,
    };
    if !(layout::HIGH_MEMORY..kernel_end).contains(&address) {
        return Err(VmmError::NotAKernel {
            reason: "its entry is not inside what it loads",
        });
    }
    Ok((entry, kernel_end))
}

fn load_segment(
    memory: &GuestMemoryMmap,
    blocks: &[RamBlock],
    file: &File,
    segment: elf::Segment,
) -> Result<u64, VmmError> {
    let elf::Segment::Load {
        offset,
        address,
        file_bytes,
        memory_bytes,
        writable,
    } = segment
    else {
        return Ok(0);
    };
    if memory_bytes == 0 {
        return Ok(0);
    }
    if address < layout::HIGH_MEMORY || file_bytes > memory_bytes {
        return Err(VmmError::NotAKernel {
            reason: "a segment is below 1 MiB, or larger in the file than in memory",
        });
    }
    let low_end = blocks.first().map_or(0, RamBlock::end);
    let end = address
        .checked_add(memory_bytes)
        .filter(|end| *end <= low_end)
        .ok_or_else(|| too_large("the guest kernel", blocks))?;
    let load = if writable { copy_file } else { map_file };
    load(memory, GuestAddress(address), file, offset, file_bytes).map_err(|source| {
        VmmError::Artifact {
            operation: "load the guest kernel",
            source,
        }
    })?;
    Ok(end)
}

/// Loads the initramfs at the end of the first block of RAM; `None` if it is empty.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    blocks: &[RamBlock],
    file: &File,
    kernel_end: u64,
) -> Result<Option<RamBlock>, VmmError> {
    let failed = |source: io::Error| VmmError::Artifact {
        operation: "load the initramfs",
        source,
    };
    let len = file.metadata().map_err(failed)?.len();
    if len == 0 {
        return Ok(None);
    }
    let start = blocks
        .first()
        .map_or(0, RamBlock::end)
        .checked_sub(len)
        .map(|start| start & !(layout::PAGE_BYTES - 1))
        .filter(|start| *start >= kernel_end)
        .ok_or_else(|| too_large("the initramfs", blocks))?;
    copy_file(memory, GuestAddress(start), file, 0, len).map_err(failed)?;
    Ok(Some(RamBlock { start, len }))
}
