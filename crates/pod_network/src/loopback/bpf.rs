// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The program and the four calls of bpf(2) that it takes. Numbers are from the kernel's `include/uapi/linux/bpf.h`.
#![expect(unsafe_code, reason = "no library is as small as four calls of bpf(2)")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
/// As `enum bpf_attach_type` has it.
const BPF_SK_LOOKUP: u32 = 36;

/// None of the helpers that the program calls asks for the GPL.
const LICENSE: &[u8; 11] = b"Apache-2.0\0";

/// The bytes of a key and of a value, which is a descriptor.
const ENTRY_LEN: u32 = 4;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A `BPF_MAP_TYPE_SOCKMAP` with one place: how a program names a socket.
#[derive(Debug)]
pub(super) struct SocketTable(OwnedFd);

/// The members of `union bpf_attr` for a call, up to the last one that is set; the kernel takes the rest as zero.
trait Attributes {}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}
impl Attributes for MapCreate {}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}
impl Attributes for MapUpdate {}

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}
impl Attributes for ProgramLoad {}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}
impl Attributes for LinkCreate {}

impl SocketTable {
    /// An empty one.
    pub(super) fn new() -> io::Result<Self> {
        let request = MapCreate {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: ENTRY_LEN,
            value_size: ENTRY_LEN,
            max_entries: 1,
            map_flags: 0,
        };
        // SAFETY: the members are numbers.
        unsafe { descriptor(BPF_MAP_CREATE, &request) }.map(Self)
    }

    /// Puts a listening socket in; it leaves the table when it is closed.
    pub(super) fn put(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let key = 0_u32;
        let value = number(socket.as_raw_fd())?;
        let request = MapUpdate {
            map: number(self.0.as_raw_fd())?,
            padding: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        };
        // SAFETY: key and value are as long as the table's, and outlive the call, which reads them.
        unsafe { call(BPF_MAP_UPDATE_ELEM, &request) }.map(|_| ())
    }
}

/// Has the kernel verify a program of type `sk_lookup`.
pub(super) fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let request = ProgramLoad {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: address(program.as_ptr()),
        license: address(LICENSE.as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"coffer_loopback\0",
        interface: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: the instructions are as many as the request says, the license ends with a zero; both outlive the call, which
    // reads them.
    unsafe { descriptor(BPF_PROG_LOAD, &request) }
}

/// Attaches a program to a network namespace until the link is closed.
pub(super) fn attach(program: &OwnedFd, namespace: &impl AsRawFd) -> io::Result<OwnedFd> {
    let request = LinkCreate {
        program: number(program.as_raw_fd())?,
        target: number(namespace.as_raw_fd())?,
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the members are numbers.
    unsafe { descriptor(BPF_LINK_CREATE, &request) }
}

/// A call that answers with a new descriptor; the kernel makes all of them close-on-exec.
///
/// # Safety
/// As [`call`]; `command` answers with a descriptor.
unsafe fn descriptor<A: Attributes>(command: libc::c_long, request: &A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word.
    let answer = unsafe { call(command, request)? };
    // SAFETY: the kernel has just made it for this caller, who has it nowhere else.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// bpf(2).
///
/// # Safety
/// `A` is what `command` takes, and what its addresses point to is as long as it says and lives through the call.
unsafe fn call<A: Attributes>(command: libc::c_long, request: &A) -> io::Result<RawFd> {
    // SAFETY: the pointer and the size are those of `request`, which the kernel reads.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *request, size_of::<A>()) };
    match RawFd::try_from(answer) {
        Ok(answer) if answer >= 0 => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}

fn address<T>(of: *const T) -> u64 {
    u64::try_from(of.addr()).unwrap_or_default()
}

fn number(descriptor: RawFd) -> io::Result<u32> {
    u32::try_from(descriptor).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The registers, as the instruction set's calling convention has them: `r0` is the answer, `r1` to `r5` are arguments, `r6`
/// to `r9` outlive calls, `r10` is the end of the stack.
mod program {
    use super::{Instruction, RawFd, SocketTable};
    use std::os::fd::AsRawFd;

    const R0: u8 = 0;
    const R1: u8 = 1;
    const R2: u8 = 2;
    const R3: u8 = 3;
    const R6: u8 = 6;
    const R7: u8 = 7;
    const R10: u8 = 10;

    // BPF_CLASS | BPF_SIZE or BPF_OP | BPF_MODE or BPF_SOURCE.
    const LOAD_WORD: u8 = 0x61;
    const LOAD_IMMEDIATE_64: u8 = 0x18;
    const STORE_WORD_IMMEDIATE: u8 = 0x62;
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const ADD_IMMEDIATE: u8 = 0x07;
    const AND_IMMEDIATE_32: u8 = 0x54;
    const JUMP_IF_EQUAL_32: u8 = 0x16;
    const JUMP_UNLESS_EQUAL_32: u8 = 0x56;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;

    /// The source of a [`LOAD_IMMEDIATE_64`] that names a map by its descriptor.
    const BPF_PSEUDO_MAP_FD: u8 = 1;

    // Helpers.
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;

    // Offsets in `struct bpf_sk_lookup`.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

    /// What the program answers whether or not it has chosen a socket: go on.
    const SK_PASS: i32 = 1;

    // Words of addresses are in network byte order, and the comparisons in the host's.
    const FIRST_BYTE: i32 = u32::from_be_bytes([0xff, 0, 0, 0]).to_be().cast_signed();
    const LOOPBACK_IP4: i32 = u32::from_be_bytes([127, 0, 0, 0]).to_be().cast_signed();
    const LOOPBACK_IP6: [i32; 4] = [
        0,
        0,
        0,
        u32::from_be_bytes([0, 0, 0, 1]).to_be().cast_signed(),
    ];

    /// Where an instruction jumps to that leaves the decision to the kernel.
    const PASS: i16 = i16::MIN;

    fn with(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
        Instruction {
            code,
            registers: destination | source.wrapping_shl(4),
            offset,
            immediate,
        }
    }

    /// The program; each [`PASS`] has become the distance to the end.
    pub(in super::super) fn loopback_to_listener(table: &SocketTable) -> Vec<Instruction> {
        let table: RawFd = table.0.as_raw_fd();
        let mut program = vec![
            with(MOVE, R6, R1, 0, 0),
            with(LOAD_WORD, R2, R6, PROTOCOL, 0),
            with(JUMP_UNLESS_EQUAL_32, R2, 0, PASS, libc::IPPROTO_TCP),
            with(LOAD_WORD, R2, R6, FAMILY, 0),
            // Over the eight instructions for IPv6, and the jump behind them.
            with(JUMP_IF_EQUAL_32, R2, 0, 9, libc::AF_INET),
        ];
        for (offset, word) in LOOPBACK_IP6.into_iter().enumerate() {
            let at = LOCAL_IP6.get(offset).copied().unwrap_or_default();
            program.push(with(LOAD_WORD, R2, R6, at, 0));
            program.push(with(JUMP_UNLESS_EQUAL_32, R2, 0, PASS, word));
        }
        program.extend([
            // r2 is the last word of ::1 here. Over the three instructions for IPv4.
            with(JUMP_IF_EQUAL_32, R2, 0, 3, LOOPBACK_IP6[3]),
            with(LOAD_WORD, R2, R6, LOCAL_IP4, 0),
            with(AND_IMMEDIATE_32, R2, 0, 0, FIRST_BYTE),
            with(JUMP_UNLESS_EQUAL_32, R2, 0, PASS, LOOPBACK_IP4),
            // r0 = the socket at key 0.
            with(STORE_WORD_IMMEDIATE, R10, 0, -4, 0),
            with(LOAD_IMMEDIATE_64, R1, BPF_PSEUDO_MAP_FD, 0, table),
            with(0, 0, 0, 0, 0),
            with(MOVE, R2, R10, 0, 0),
            with(ADD_IMMEDIATE, R2, 0, 0, -4),
            with(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
            with(JUMP_IF_EQUAL, R0, 0, PASS, 0),
            // It is chosen, and let go of.
            with(MOVE, R7, R0, 0, 0),
            with(MOVE, R1, R6, 0, 0),
            with(MOVE, R2, R7, 0, 0),
            with(MOVE_IMMEDIATE, R3, 0, 0, 0),
            with(CALL, 0, 0, 0, SK_ASSIGN),
            with(MOVE, R1, R7, 0, 0),
            with(CALL, 0, 0, 0, SK_RELEASE),
        ]);
        let end = program.len();
        for (at, instruction) in program.iter_mut().enumerate() {
            if instruction.offset == PASS {
                // A jump counts from the instruction behind it.
                let distance = end.saturating_sub(at).saturating_sub(1);
                instruction.offset = i16::try_from(distance).unwrap_or_default();
            }
        }
        program.extend([
            with(MOVE_IMMEDIATE, R0, 0, 0, SK_PASS),
            with(EXIT, 0, 0, 0, 0),
        ]);
        program
    }
}

pub(super) use program::loopback_to_listener;
