// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `linux.resources.devices` as a BPF program on the container's cgroup (cgroup-v2.rst, "Device controller").
//!
//! The rules are read as cgroup v1's device controller applied them: the last one that matches an access decides, and an
//! access that no rule matches is denied. After the spec's rules come those for the default devices, as in runc.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::Error;

/// The most rules of a spec: far more than devices in a pod, and some 30 000 instructions of a program's million.
pub(super) const MAX_RULES: usize = 4096;

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// A rule; `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    access: u32,
    major: Option<u32>,
    minor: Option<u32>,
}

const fn allow(kind: u32, access: u32, major: Option<u32>, minor: Option<u32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        access,
        major,
        minor,
    }
}

/// runc's `AllowedDevices`: making any device file, and using those that each container has.
const DEFAULTS: [Rule; 11] = [
    allow(CHAR, MKNOD, None, None),
    allow(BLOCK, MKNOD, None, None),
    allow(CHAR, ALL, Some(1), Some(3)),
    allow(CHAR, ALL, Some(1), Some(5)),
    allow(CHAR, ALL, Some(1), Some(7)),
    allow(CHAR, ALL, Some(1), Some(8)),
    allow(CHAR, ALL, Some(1), Some(9)),
    allow(CHAR, ALL, Some(5), Some(0)),
    allow(CHAR, ALL, Some(5), Some(1)),
    allow(CHAR, ALL, Some(5), Some(2)),
    allow(CHAR, ALL, Some(136), None),
];

/// Puts the spec's rules in force for the cgroup whose directory is `cgroup`.
///
/// # Errors
/// [`Error::Resource`] for rules that are none, and if the kernel takes no such program.
pub(super) fn attach(cgroup: impl AsFd, rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
    let failed =
        |step: &str, error: std::io::Error| Error::resource("devices", format!("{step}: {error}"));
    let program = program(&parse(rules)?);
    let program = load(&program).map_err(|error| failed("loading the device program", error))?;
    attach_program(cgroup.as_fd().as_raw_fd(), &program)
        .map_err(|error| failed("attaching the device program", error))
}

fn parse(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, Error> {
    if rules.len() > MAX_RULES {
        return Err(Error::resource(
            "devices",
            format!("{} rules, at most {MAX_RULES} are allowed", rules.len()),
        ));
    }
    rules
        .iter()
        .map(parse_one)
        .chain(DEFAULTS.into_iter().map(Ok))
        .collect()
}

fn parse_one(rule: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        Some(LinuxDeviceType::P) => return Err(Error::resource("devices", "a FIFO is no device")),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => {
                return Err(Error::resource(
                    "devices",
                    format!("{other:?} is no access, only r, w and m are"),
                ));
            }
        };
    }
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| Error::resource("devices", format!("{value} is no device number"))),
    };
    // v1: "a" stands for every type, number and access at once.
    Ok(match kind {
        None => Rule {
            allow: rule.allow(),
            kind,
            access: ALL,
            major: None,
            minor: None,
        },
        Some(_) => Rule {
            allow: rule.allow(),
            kind,
            access,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
        },
    })
}

/// An instruction as the kernel lays it out (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: u32,
}

// linux/bpf_common.h, linux/bpf.h
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5e; // BPF_JMP32 | BPF_JNE | BPF_X
const JUMP_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

// Registers: 1 is the context and later scratch, the others hold the access at hand.
const RESULT: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: (from << 4) | to,
        offset,
        immediate,
    }
}

fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access in the upper half of the first word, type in the lower; major; minor.
    let mut code = vec![
        instruction(LOAD_WORD, KIND, SCRATCH, 0, 0),
        instruction(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        instruction(LOAD_WORD, MINOR, SCRATCH, 8, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(AND, KIND, 0, 0, 0xffff),
    ];
    for rule in rules.iter().rev() {
        code.extend(rule_code(rule));
        if (rule.kind, rule.major, rule.minor, rule.access) == (None, None, None, ALL) {
            // It decides whatever is left; the verifier refuses code that nothing reaches.
            return code;
        }
    }
    code.extend(verdict(false));
    code
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [
        instruction(MOVE, RESULT, 0, 0, allow.into()),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// Tests that jump past the verdict when the rule does not match.
fn rule_code(rule: &Rule) -> Vec<Instruction> {
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push(instruction(JUMP_NOT_EQUAL, KIND, 0, 0, kind));
    }
    if rule.access != ALL {
        tests.push(instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
        tests.push(instruction(AND, SCRATCH, 0, 0, rule.access));
        // All of an access must be allowed; any of it may be denied.
        tests.push(if rule.allow {
            instruction(JUMP_NOT_EQUAL_REGISTER, SCRATCH, ACCESS, 0, 0)
        } else {
            instruction(JUMP_EQUAL, SCRATCH, 0, 0, 0)
        });
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            tests.push(instruction(JUMP_NOT_EQUAL, register, 0, 0, number));
        }
    }
    tests.extend(verdict(rule.allow));
    let len = tests.len();
    for (at, one) in tests.iter_mut().enumerate() {
        if matches!(
            one.code,
            JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER | JUMP_EQUAL
        ) {
            // At most seven tests and two instructions of the verdict.
            one.offset =
                i16::try_from(len.saturating_sub(at).saturating_sub(1)).unwrap_or(i16::MAX);
        }
    }
    tests
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups above and below are run as well.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The front of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The front of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len())
            .map_err(|_| std::io::ErrorKind::InvalidInput)?,
        instructions: address(program.as_ptr()),
        license: address(c"Apache-2.0".as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let descriptor = bpf(BPF_PROG_LOAD, &attributes)?;
    #[expect(unsafe_code, reason = "a descriptor that the kernel has just made")]
    // SAFETY: BPF_PROG_LOAD gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn attach_program(cgroup: RawFd, program: &OwnedFd) -> std::io::Result<()> {
    let number =
        |descriptor: RawFd| u32::try_from(descriptor).map_err(|_| std::io::ErrorKind::InvalidInput);
    let attributes = AttachAttributes {
        target: number(cgroup)?,
        program: number(program.as_raw_fd())?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(|_| ())
}

fn address<T>(pointer: *const T) -> u64 {
    // A pointer of a 64-bit kernel's program.
    u64::try_from(pointer.addr()).unwrap_or(0)
}

#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn bpf<T>(command: libc::c_int, attributes: &T) -> std::io::Result<RawFd> {
    // SAFETY: `attributes` is one of the two structs above, which the kernel reads for `command` in its given size, and
    // what it points to (instructions, licence) outlives the call in the callers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(|_| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn run(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut registers = [0_u32; 6];
        let mut at = 0_usize;
        loop {
            let one = code[at];
            let (to, from) = (
                usize::from(one.registers & 15),
                usize::from(one.registers >> 4),
            );
            let jump = match one.code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(one.offset).unwrap() / 4];
                    false
                }
                MOVE => {
                    registers[to] = one.immediate;
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                AND => {
                    registers[to] &= one.immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= one.immediate;
                    false
                }
                JUMP_NOT_EQUAL => registers[to] != one.immediate,
                JUMP_NOT_EQUAL_REGISTER => registers[to] != registers[from],
                JUMP_EQUAL => registers[to] == one.immediate,
                EXIT => return registers[0] != 0,
                other => panic!("{other:#x}"),
            };
            at += 1 + if jump {
                usize::try_from(one.offset).unwrap()
            } else {
                0
            };
        }
    }

    fn compiled(json: serde_json::Value) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        program(&parse(&rules).unwrap())
    }

    #[test]
    fn containerds_rules_allow_the_default_devices_alone() {
        let code = compiled(serde_json::json!([{"allow": false, "access": "rwm"}]));
        assert!(run(&code, CHAR, READ | WRITE, 1, 3));
        assert!(run(&code, CHAR, READ | WRITE, 136, 7));
        assert!(run(&code, BLOCK, MKNOD, 254, 0));
        assert!(!run(&code, BLOCK, READ, 254, 0));
        assert!(!run(&code, CHAR, READ, 1, 1));
    }

    #[test]
    fn no_rules_deny_what_is_not_default() {
        let code = compiled(serde_json::json!([]));
        assert!(run(&code, CHAR, READ, 1, 8));
        assert!(!run(&code, BLOCK, READ, 8, 0));
    }

    #[test]
    fn last_match_wins_and_access_is_weighed() {
        let code = compiled(serde_json::json!([
            {"allow": false},
            {"allow": true, "type": "b", "major": 8, "access": "rw"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"}
        ]));
        assert!(run(&code, BLOCK, READ | WRITE, 8, 0));
        assert!(run(&code, BLOCK, READ, 8, 1));
        assert!(!run(&code, BLOCK, READ | WRITE, 8, 1));
        assert!(!run(&code, BLOCK, READ, 9, 0));
        assert!(!run(&code, CHAR, READ, 8, 0));
    }

    #[test]
    fn privileged_container_may_everything() {
        let code = compiled(serde_json::json!([{"allow": true, "type": "a", "access": "rwm"}]));
        assert!(run(&code, BLOCK, ALL, 8, 0));
        assert!(run(&code, CHAR, WRITE, 1, 1));
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            serde_json::json!([{"allow": true, "type": "p"}]),
            serde_json::json!([{"allow": true, "type": "c", "access": "x"}]),
            serde_json::json!([{"allow": true, "type": "c", "major": -5}]),
        ] {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
            parse(&rules).unwrap_err();
        }
    }
}
