// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the kernel reads first: PVH start info (Xen `public/arch-x86/hvm/start_info.h`) or the zero page
//! (Linux `Documentation/arch/x86/zero-page.rst` and `boot.rst`).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::BootInfo;
use crate::layout::{self, PAGE_BYTES};

const START_MAGIC: u64 = 0x336e_c578;
const START_VERSION: u64 = 1;
/// Where the memory map is, in the page of the start info.
const MEMORY_MAP: GuestAddress = GuestAddress(layout::START_INFO.0 + 0x100);
/// Where the module list is.
const MODULE_LIST: GuestAddress = GuestAddress(layout::START_INFO.0 + 0x80);
const TYPE_RAM: u32 = 1;

/// Writes the start info with its memory map and module list.
pub(super) fn write_start_info(
    memory: &GuestMemoryMmap,
    info: &BootInfo,
) -> Result<(), GuestMemoryError> {
    let modules = u64::from(info.initramfs.is_some());
    let ranges = info.usable.len() as u64;
    let start_info: [u64; 7] = [
        START_MAGIC | START_VERSION << 32,
        modules << 32, // no flags
        MODULE_LIST.0,
        layout::COMMAND_LINE.0,
        0, // no RSDP: there is no ACPI
        MEMORY_MAP.0,
        ranges,
    ];
    memory.write_obj(start_info, layout::START_INFO)?;
    if let Some(initramfs) = info.initramfs {
        memory.write_obj([initramfs.start, initramfs.len, 0, 0], MODULE_LIST)?;
    }
    let mut at = MEMORY_MAP.0;
    for range in &info.usable {
        let entry: [u64; 3] = [range.start, range.len, u64::from(TYPE_RAM)];
        memory.write_obj(entry, GuestAddress(at))?;
        at = at.saturating_add(24);
    }
    Ok(())
}

/// Writes the zero page.
pub(super) fn write_zero_page(
    memory: &GuestMemoryMmap,
    info: &BootInfo,
) -> Result<(), GuestMemoryError> {
    let at = |offset: u64| GuestAddress(layout::ZERO_PAGE.0.saturating_add(offset));
    memory.write_obj(u8::try_from(info.usable.len()).unwrap_or(0), at(0x1e8))?; // e820_entries
    memory.write_obj(0xaa55u16, at(0x1fe))?; // boot_flag
    memory.write_slice(b"HdrS", at(0x202))?;
    memory.write_obj(0x020fu16, at(0x206))?; // protocol 2.15
    memory.write_obj(0xffu8, at(0x210))?; // type_of_loader: undefined
    memory.write_obj(1u8, at(0x211))?; // loadflags: loaded high
    memory.write_obj(0x100_0000u32, at(0x230))?; // kernel_alignment
    if let Some(initramfs) = info.initramfs {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        memory.write_obj(low(initramfs.start), at(0x218))?;
        memory.write_obj(low(initramfs.len), at(0x21c))?;
    }
    memory.write_obj(
        u32::try_from(layout::COMMAND_LINE.0).unwrap_or(0),
        at(0x228),
    )?;
    memory.write_obj(info.command_line_bytes.saturating_sub(1), at(0x238))?; // cmdline_size
    let mut entry = 0x2d0;
    for range in &info.usable {
        memory.write_obj([range.start, range.len], at(entry))?;
        memory.write_obj(TYPE_RAM, at(entry.saturating_add(16)))?;
        entry = entry.saturating_add(20);
    }
    Ok(())
}

/// Present and writable.
const TABLE_FLAGS: u64 = 0x3;
/// Present, writable, 2 MiB.
const LARGE_PAGE_FLAGS: u64 = 0x83;

/// Flat segments of the 64-bit entry: `__BOOT_CS` is 0x10, `__BOOT_DS` 0x18.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes page tables that map the first GiB one to one, and descriptors.
pub(super) fn write_long_mode(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pml4 = layout::PAGE_TABLES;
    let pdpt = GuestAddress(pml4.0.saturating_add(PAGE_BYTES));
    let pd = GuestAddress(pdpt.0.saturating_add(PAGE_BYTES));
    memory.write_obj(pdpt.0 | TABLE_FLAGS, pml4)?;
    memory.write_obj(pd.0 | TABLE_FLAGS, pdpt)?;
    let mut entries = [0u8; 4096];
    for (entry, page) in entries.chunks_exact_mut(8).zip(0u64..) {
        entry.copy_from_slice(&(page << 21 | LARGE_PAGE_FLAGS).to_le_bytes());
    }
    memory.write_slice(&entries, pd)?;
    memory.write_obj(GDT, layout::GDT)
}
