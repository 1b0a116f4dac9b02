// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the boot processor starts with.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::Entry;
use crate::layout;

const CR0_PE_ET: u64 = 0x11;
const CR0_PG: u64 = 0x8000_0000;
const CR4_PAE: u64 = 0x20;
const EFER_LME_LMA: u64 = 0x500;
const RFLAGS_RESERVED: u64 = 2;

const FLAT: kvm_segment = kvm_segment {
    base: 0,
    limit: 0xffff_ffff,
    selector: 0,
    type_: 0,
    present: 1,
    dpl: 0,
    db: 1,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};

/// General registers at `entry`.
#[must_use]
pub fn general(entry: Entry) -> kvm_regs {
    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        // Xen `docs/misc/pvh.pandoc`: EBX holds the start info.
        Entry::Pvh(address) => {
            regs.rip = u64::from(address);
            regs.rbx = layout::START_INFO.0;
        }
        // Linux `boot.rst`, 64-bit boot protocol: RSI holds the zero page.
        Entry::Linux64(address) => {
            regs.rip = address;
            regs.rsi = layout::ZERO_PAGE.0;
            regs.rsp = layout::BOOT_STACK.0;
            regs.rbp = layout::BOOT_STACK.0;
        }
    }
    regs
}

/// Segments and control registers at `entry`, over what `sregs` had at reset.
#[must_use]
pub fn special(entry: Entry, mut sregs: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        ..FLAT
    };
    let code = kvm_segment {
        selector: 0x10,
        type_: 11,
        ..FLAT
    };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        db: 0,
        s: 0,
        g: 0,
        ..FLAT
    };
    sregs.cr0 = CR0_PE_ET;
    match entry {
        Entry::Pvh(_) => {
            sregs.cs = code;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
        Entry::Linux64(_) => {
            sregs.cs = kvm_segment {
                db: 0,
                l: 1,
                ..code
            };
            sregs.gdt.base = layout::GDT.0;
            sregs.gdt.limit = 31;
            sregs.cr3 = layout::PAGE_TABLES.0;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME_LMA;
        }
    }
    sregs
}
