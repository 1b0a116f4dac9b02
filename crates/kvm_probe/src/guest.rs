// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The probe guest: 132 bytes that enter long mode, drop to CPL 3 and come back with SYSCALL.
//!
//! ```text
//! protected mode ─> long mode ──out 0x10──> iretq ─> CPL 3 ──out 0x23──> syscall ─> CPL 0 ──out 0x30──> hlt
//! ```
//! The low two bits of the last two marks are the CPL that the guest read from CS; IOPL is 3 throughout, so that a
//! SYSCALL that does not change the CPL can still say so.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Guest memory, from address 0.
pub(crate) const MEMORY_BYTES: usize = 0x10000;
/// Where the guest writes its marks.
pub(crate) const MARK_PORT: u16 = 0xf4;
/// In long mode at CPL 0.
pub(crate) const MARK_LONG_MODE: u8 = 0x10;
/// After `iretq` to CPL 3; the low bits are the CPL.
pub(crate) const MARK_USER: u8 = 0x20;
/// After `syscall`; the low bits are the CPL.
pub(crate) const MARK_SYSCALL: u8 = 0x30;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const CODE: u64 = 0x8000;

/// Present, writable, user (Intel SDM volume 3, §4.5).
const PAGE_FLAGS: u64 = 0x7;
/// Page size bit of a page directory entry: 2 MiB.
const PAGE_LARGE: u64 = 0x80;

/// Flat descriptors. SYSCALL takes CS 0x10 and SS 0x18; the `iretq` frame names 0x33 and 0x2b.
const GDT_ENTRIES: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff, // 0x08: 32-bit code
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code
    0x00cf_9300_0000_ffff, // 0x18: data
    0x00cf_fb00_0000_ffff, // 0x20: 32-bit user code, where SYSRET's selectors count from
    0x00cf_f300_0000_ffff, // 0x28: user data
    0x00af_fb00_0000_ffff, // 0x30: 64-bit user code
];

#[rustfmt::skip]
const PROGRAM: [u8; 132] = [
    // 32-bit: paging and long mode on
    0xb8, 0x00, 0x10, 0x00, 0x00,       // mov eax, PML4
    0x0f, 0x22, 0xd8,                   // mov cr3, eax
    0x0f, 0x20, 0xe0,                   // mov eax, cr4
    0x83, 0xc8, 0x20,                   // or eax, PAE
    0x0f, 0x22, 0xe0,                   // mov cr4, eax
    0xb9, 0x80, 0x00, 0x00, 0xc0,       // mov ecx, MSR_EFER
    0x0f, 0x32,                         // rdmsr
    0x0d, 0x01, 0x01, 0x00, 0x00,       // or eax, SCE | LME
    0x0f, 0x30,                         // wrmsr
    0x0f, 0x20, 0xc0,                   // mov eax, cr0
    0x0d, 0x00, 0x00, 0x00, 0x80,       // or eax, PG
    0x0f, 0x22, 0xc0,                   // mov cr0, eax
    0xea, 0x31, 0x80, 0x00, 0x00, 0x10, 0x00, // jmp 0x10:0x8031
    // 64-bit, 0x8031
    0xb0, MARK_LONG_MODE,               // mov al, MARK_LONG_MODE
    0xe6, 0xf4,                         // out 0xf4, al
    0xb9, 0x81, 0x00, 0x00, 0xc0,       // mov ecx, MSR_STAR
    0x31, 0xc0,                         // xor eax, eax
    0xba, 0x10, 0x00, 0x20, 0x00,       // mov edx, 0x00200010
    0x0f, 0x30,                         // wrmsr
    0xb9, 0x82, 0x00, 0x00, 0xc0,       // mov ecx, MSR_LSTAR
    0xb8, 0x79, 0x80, 0x00, 0x00,       // mov eax, 0x8079
    0x31, 0xd2,                         // xor edx, edx
    0x0f, 0x30,                         // wrmsr
    0xb9, 0x84, 0x00, 0x00, 0xc0,       // mov ecx, MSR_FMASK
    0x31, 0xc0,                         // xor eax, eax
    0x0f, 0x30,                         // wrmsr
    0x6a, 0x2b,                         // push user data
    0x68, 0x00, 0x70, 0x00, 0x00,       // push stack
    0x68, 0x02, 0x30, 0x00, 0x00,       // push rflags: IOPL 3
    0x6a, 0x33,                         // push user code
    0x68, 0x6f, 0x80, 0x00, 0x00,       // push 0x806f
    0x48, 0xcf,                         // iretq
    // CPL 3, 0x806f
    0x8c, 0xc8,                         // mov eax, cs
    0x24, 0x03,                         // and al, 3
    0x0c, MARK_USER,                    // or al, MARK_USER
    0xe6, 0xf4,                         // out 0xf4, al
    0x0f, 0x05,                         // syscall
    // CPL 0, 0x8079
    0x8c, 0xc8,                         // mov eax, cs
    0x24, 0x03,                         // and al, 3
    0x0c, MARK_SYSCALL,                 // or al, MARK_SYSCALL
    0xe6, 0xf4,                         // out 0xf4, al
    0xf4,                               // hlt
    0xeb, 0xfd,                         // jmp to the hlt
];

/// Writes page tables, descriptors and program.
pub(crate) fn load(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | PAGE_FLAGS, GuestAddress(PML4))?;
    memory.write_obj(PD | PAGE_FLAGS, GuestAddress(PDPT))?;
    memory.write_obj(PAGE_FLAGS | PAGE_LARGE, GuestAddress(PD))?;
    memory.write_obj(GDT_ENTRIES, GuestAddress(GDT))?;
    memory.write_slice(&PROGRAM, GuestAddress(CODE))
}

/// 32-bit protected mode with flat segments, as PVH starts a kernel.
pub(crate) fn special_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        ..flat
    };
    sregs.cs = kvm_segment {
        selector: 0x08,
        type_: 11,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 55;
    sregs.cr0 = 0x11; // PE and ET
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs
}

/// At the program's start.
pub(crate) fn registers() -> kvm_regs {
    kvm_regs {
        rip: CODE,
        rsp: 0x7000,
        rflags: 2,
        ..Default::default()
    }
}
