// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where everything is in guest-physical memory.
//!
//! ```text
//! 0x0000_0000  RAM
//!   0x0500       GDT of the 64-bit entry
//!   0x6000       PVH start info, then its memory map and module list
//!   0x7000       zero page of the 64-bit entry
//!   0x8ff0       stack of the 64-bit entry, growing down
//!   0x9000       page tables of the 64-bit entry
//!   0x20000      command line
//! 0x0009_fc00  reserved, backed by RAM
//!   0xf0000      MP table
//! 0x0010_0000  RAM: kernel where its program headers say, initramfs at the end of this block
//! 0xc000_0000  hole
//!   0xd000_0000  virtio-mmio windows, one page each
//!   0xfec0_0000  IOAPIC        0xfee0_0000  local APIC        0xfffb_d000  KVM's pages for real mode
//! 0x1_0000_0000  RAM that did not fit below the hole
//! next 2 GiB     what may be plugged while the VM runs
//! ```

use std::ops::Range;

use ids::Mib;
use virtio_device::mem::SLOT_BYTES;
use vm_memory::GuestAddress;

/// Page size.
pub const PAGE_BYTES: u64 = 4096;
/// Descriptors of the 64-bit entry.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info`; memory map and module list follow in the same page.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// `boot_params` of the 64-bit entry.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First stack pointer of the 64-bit entry.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Three pages of page tables for the 64-bit entry.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x20000);
/// The longest command line with its zero (Linux `COMMAND_LINE_SIZE` on x86).
pub const MAX_COMMAND_LINE_BYTES: usize = 2048;
/// End of the memory below the reserved BIOS area.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Where Linux looks for the MP floating pointer, page-aligned part of the BIOS area (Intel MP specification §4).
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Start of memory above the BIOS area.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// End of RAM below the hole.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio window.
pub const MMIO_START: u64 = 0xd000_0000;
/// Bytes between two windows.
pub const MMIO_STRIDE: u64 = 0x1000;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for itself, below 4 GiB and outside RAM.
pub const TSS: usize = 0xfffb_d000;
/// First interrupt line for devices: 0 to 4 are the timer, keyboard, cascade and UARTs of a PC.
pub const FIRST_GSI: u32 = 5;
/// Last input of the IOAPIC.
pub const LAST_GSI: u32 = 23;
/// The first window for disks; before it are vsock, console, rng and balloon, behind the disks the network cards.
pub const FIRST_DISK_SLOT: u16 = 4;
/// Lines that disks and network cards share.
const SHARED_LINES: u32 = LAST_GSI - FIRST_GSI + 1 - FIRST_DISK_SLOT as u32;
/// The most virtio devices: what the command line can declare.
pub const MAX_DEVICES: u16 = 40;
/// The least memory that a kernel and initramfs fit in.
pub const MIN_MEMORY: Mib = Mib(16);
/// The most memory: 1 TiB, what the smallest CPUs can address (40 bits).
pub const MAX_MEMORY: Mib = Mib(1 << 20);

/// One block of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamBlock {
    /// First byte.
    pub start: u64,
    /// Bytes, a multiple of a page.
    pub len: u64,
}

impl RamBlock {
    /// The byte after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// The RAM of a guest: one block, or two around the hole.
#[must_use]
pub fn ram_blocks(memory: Mib) -> Vec<RamBlock> {
    let total = ids::Bytes::from(memory).0;
    let low = total.min(HOLE_START);
    let mut blocks = vec![RamBlock { start: 0, len: low }];
    if total > low {
        blocks.push(RamBlock {
            start: HOLE_END,
            len: total.saturating_sub(low),
        });
    }
    blocks
}

/// What may be plugged starts at such a border: Linux adds memory by up to as much to a guest that has 64 GiB and more
/// (`MAX_BLOCK_SIZE` in its `arch/x86/mm/init_64.c`).
const PLUGGABLE_ALIGN: u64 = 2 << 30;

/// Where memory can be plugged into a guest that starts with `memory` and may grow to `max`: whole slots, none if it may
/// not grow.
#[must_use]
pub fn pluggable(memory: Mib, max: Mib) -> Range<u64> {
    let end = ram_blocks(memory).last().map_or(0, RamBlock::end);
    let start = end.max(HOLE_END).next_multiple_of(PLUGGABLE_ALIGN);
    let growth = ids::Bytes::from(Mib(max.0.saturating_sub(memory.0))).0;
    let room = ids::Bytes::from(MAX_MEMORY).0.saturating_sub(start);
    let len = growth.next_multiple_of(SLOT_BYTES).min(room);
    start..start.saturating_add(len)
}

/// What the guest may use freely of `blocks`: everything but the BIOS area.
#[must_use]
pub fn usable_ranges(blocks: &[RamBlock]) -> Vec<RamBlock> {
    let mut usable = vec![RamBlock {
        start: 0,
        len: LOW_MEMORY_END,
    }];
    for block in blocks {
        let start = block
            .start
            .max(if block.start == 0 { HIGH_MEMORY } else { 0 });
        usable.push(RamBlock {
            start,
            len: block.end().saturating_sub(start),
        });
    }
    usable
}

/// First byte of the window of device `index`.
#[must_use]
pub fn window(index: u16) -> u64 {
    MMIO_START.saturating_add(u64::from(index).saturating_mul(MMIO_STRIDE))
}

/// The device and the offset that an address belongs to; `None` outside all windows.
#[must_use]
pub fn device_at(address: u64) -> Option<(u16, u64)> {
    let offset = address.checked_sub(MMIO_START)?;
    let index = u16::try_from(offset / MMIO_STRIDE).ok()?;
    (index < MAX_DEVICES).then_some((index, offset % MMIO_STRIDE))
}

/// The interrupt line of device `index`: the first devices have one each, all behind them share the rest.
#[must_use]
pub fn gsi(index: u16) -> u32 {
    let index = u32::from(index);
    let own = u32::from(FIRST_DISK_SLOT);
    let offset = match index.checked_sub(own) {
        None => index,
        Some(slot) => own.saturating_add(slot % SHARED_LINES),
    };
    FIRST_GSI.saturating_add(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_block_without_the_bios_area() {
        let blocks = ram_blocks(Mib(128));
        assert_eq!(
            blocks,
            [RamBlock {
                start: 0,
                len: 128 << 20
            }]
        );
        let usable = usable_ranges(&blocks);
        assert_eq!(usable[0].end(), LOW_MEMORY_END);
        assert_eq!((usable[1].start, usable[1].end()), (HIGH_MEMORY, 128 << 20));
    }

    #[test]
    fn memory_at_the_hole_stays_below_and_one_mebibyte_more_goes_above() {
        assert_eq!(ram_blocks(Mib(3072)).len(), 1);
        let blocks = ram_blocks(Mib(3073));
        assert_eq!(
            blocks[1],
            RamBlock {
                start: HOLE_END,
                len: 1 << 20
            }
        );
        assert_eq!(usable_ranges(&blocks).len(), 3);
        let most: u64 = ram_blocks(MAX_MEMORY).iter().map(|block| block.len).sum();
        assert_eq!(most, 1 << 40);
    }

    #[test]
    fn pluggable_memory_is_whole_slots_behind_all_ram() {
        assert!(pluggable(Mib(512), Mib(512)).is_empty());
        let one = pluggable(Mib(512), Mib(513));
        assert_eq!((one.start, one.end), (4 << 30, (4 << 30) + SLOT_BYTES));
        let large = pluggable(Mib(5000), Mib(10_000));
        assert_eq!(
            (large.start, large.end - large.start),
            (6 << 30, 40 * SLOT_BYTES)
        );
        let most = pluggable(Mib(512), MAX_MEMORY);
        assert_eq!(most.end, 1 << 40);
        assert!(pluggable(MAX_MEMORY, MAX_MEMORY).is_empty());
    }

    #[test]
    fn windows_are_in_the_hole_and_map_back() {
        for index in 0..MAX_DEVICES {
            let start = window(index);
            assert!(start >= HOLE_START && start + MMIO_STRIDE <= u64::from(IOAPIC));
            assert_eq!(device_at(start), Some((index, 0)));
            assert_eq!(device_at(start + 0xfff), Some((index, 0xfff)));
        }
        assert_eq!(device_at(MMIO_START - 1), None);
        assert_eq!(device_at(window(MAX_DEVICES)), None);
        assert_eq!(device_at(u64::MAX), None);
    }

    #[test]
    fn first_devices_have_lines_of_their_own_and_disks_share_the_rest() {
        assert_eq!((gsi(0), gsi(3), gsi(4), gsi(18), gsi(19)), (5, 8, 9, 23, 9));
        assert!((0..MAX_DEVICES).all(|i| (FIRST_GSI..=LAST_GSI).contains(&gsi(i))));
    }
}
