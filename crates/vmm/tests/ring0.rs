// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The VMM process with guests of a few instructions, which run on any KVM. Needs `/dev/kvm`.

mod common;

use std::os::unix::process::ExitStatusExt;

use common::{Vmm, config, files, pvh_kernel};
use vmm::ExitCode;
use vmm::control::{Answer, RefusalKind, Request};

/// Writes 0x42 to port 0xf4 and faults without handlers: a triple fault.
const WRITE_AND_RESET: &[u8] = &[0xb0, 0x42, 0xe6, 0xf4, 0x0f, 0x0b];
/// Runs for ever.
const SPIN: &[u8] = &[0xeb, 0xfe];

#[test]
fn guest_that_resets_itself_ends_the_vm_with_code_0() {
    let (mut vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(WRITE_AND_RESET)));
    assert_eq!(result, Ok(Answer::Done));
    let (code, text, status) = vmm.end();
    assert_eq!((code, status.code()), (0, Some(0)));
    assert_eq!(text, "the guest shut down");
}

#[test]
fn last_words_at_the_serial_port_are_in_the_console() {
    // mov dx, 0x3f8; then mov al, byte and out dx, al for each; ud2.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in [b'o', 0x01, b'h', b'\r', b'\n'] {
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend([0x0f, 0x0b]);
    let (mut vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(&code)));
    assert_eq!(result, Ok(Answer::Done));
    let (_, text, console) = vmm.last_words();
    assert_eq!(
        (text.as_str(), console.as_str()),
        ("the guest shut down", "oh\n")
    );
}

#[test]
fn triple_fault_without_a_word_says_where_it_was() {
    let (mut vmm, _) = Vmm::start(&config(), &files(&pvh_kernel(WRITE_AND_RESET)));
    let (_, _, console) = vmm.last_words();
    assert!(console.starts_with("triple fault; rip 0x"), "{console}");
}

#[test]
fn kernel_without_pvh_starts_in_long_mode_with_a_zero_page() {
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0xf8, 0x03,                            // mov dx, 0x3f8
        0x81, 0xbe, 0x02, 0x02, 0, 0, b'H', b'd', b'r', b'S', // cmp dword [rsi + 0x202], "HdrS"
        0x75, 0x0f,                                        // jne to the end
        0x48, 0xb8, 0, 0, 0, 0, b'L', b'L', b'L', b'L',    // mov rax, what no 32-bit register holds
        0x48, 0xc1, 0xe8, 0x20,                            // shr rax, 32
        0xee,                                              // out dx, al
        0x0f, 0x0b,                                        // ud2
    ];
    let mut kernel = pvh_kernel(&code);
    let note = kernel.windows(4).position(|bytes| bytes == b"Xen\0");
    kernel[note.unwrap()] = b'x';
    let (mut vmm, result) = Vmm::start(&config(), &files(&kernel));
    assert_eq!(result, Ok(Answer::Done));
    assert_eq!(vmm.last_words().2, "L");
}

#[test]
fn control_socket_closed_ends_a_spinning_vm() {
    let (mut vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(SPIN)));
    assert_eq!(result, Ok(Answer::Done));
    drop(vmm.socket.take());
    assert_eq!(
        vmm.child.wait().unwrap().code(),
        Some(ExitCode::Orphaned as i32)
    );
}

#[test]
fn control_socket_closed_before_the_configuration_ends_the_process() {
    let mut vmm = Vmm::spawn();
    drop(vmm.socket.take());
    assert_eq!(
        vmm.child.wait().unwrap().code(),
        Some(ExitCode::Orphaned as i32)
    );
}

#[test]
fn program_started_by_hand_says_who_starts_it() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_coffer-vmm"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(ExitCode::Usage as i32));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("containerd-shim-coffer-v2"), "{text}");
}

#[test]
fn killed_vmm_leaves_its_socket_closed() {
    let (mut vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(SPIN)));
    assert_eq!(result, Ok(Answer::Done));
    vmm.child.kill().unwrap();
    assert_eq!(vmm.receive(), None);
    assert_eq!(vmm.child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn bad_kernels_are_refused_with_a_reason() {
    let mut not_elf = pvh_kernel(SPIN);
    not_elf[0] = 0;
    let mut cut = pvh_kernel(&[0x90; 8192]);
    cut.truncate(0x1800);
    let mut high = pvh_kernel(SPIN);
    high[64 + 24..64 + 32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    for (kernel, reason) in [
        (Vec::new(), "read the guest kernel"),
        (not_elf, "not a little-endian 64-bit ELF"),
        (cut, "load the guest kernel"),
        (high, "does not fit into guest memory"),
    ] {
        let (mut vmm, result) = Vmm::start(&config(), &files(&kernel));
        let refusal = result.unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Artifact);
        assert!(refusal.text.contains(reason), "{}", refusal.text);
        let (code, _, status) = vmm.end();
        assert_eq!(code, ExitCode::Artifact as u8);
        assert_eq!(status.code(), Some(i32::from(code)));
    }
}

#[test]
fn impossible_configurations_are_refused_with_what_is_possible() {
    let mut none = config();
    none.vcpus = 0;
    let mut many = config();
    many.vcpus = 65;
    let mut little = config();
    little.memory_mib = 15;
    let mut slots = config();
    slots.disk_slots = 37;
    for (config, reason) in [
        (none, "1 to 64"),
        (many, "1 to 64"),
        (little, "16 MiB to"),
        (slots, "at most 36"),
    ] {
        let (_vmm, result) = Vmm::start(&config, &files(&pvh_kernel(SPIN)));
        let refusal = result.unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Config);
        assert!(refusal.text.contains(reason), "{}", refusal.text);
    }
}

#[test]
fn message_that_is_none_ends_the_process() {
    let mut vmm = Vmm::spawn();
    let socket = vmm.socket.as_ref().unwrap();
    socket
        .send(&"hello", &[], nix::sys::socket::MsgFlags::empty())
        .unwrap();
    let (code, text, _) = vmm.end();
    assert_eq!(code, ExitCode::Config as u8);
    assert!(text.contains("control message cannot be read"), "{text}");
}

/// Writes a running number to every word of all register windows and beyond, reading each back, and resets.
const GARBAGE: &[u8] = &[
    0xbf, 0x00, 0x00, 0x00, 0xd0, // mov edi, 0xd0000000
    0x89, 0x07, // mov [edi], eax
    0x8b, 0x0f, // mov ecx, [edi]
    0x05, 0xb9, 0x79, 0x37, 0x9e, // add eax, 0x9e3779b9
    0x83, 0xc7, 0x04, // add edi, 4
    0x81, 0xff, 0x00, 0xe0, 0x01, 0xd0, // cmp edi, 0xd001e000
    0x72, 0xec, // jb to the first write
    0x0f, 0x0b, // ud2
];

#[test]
fn guest_that_writes_garbage_to_every_register_only_ends_itself() {
    let (mut vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(GARBAGE)));
    assert_eq!(result, Ok(Answer::Done));
    let (code, text, _) = vmm.end();
    assert_eq!((code, text.as_str()), (0, "the guest shut down"));
}

#[test]
fn several_vcpus_start_pause_and_resume() {
    let mut config = config();
    config.vcpus = 3;
    let (mut vmm, result) = Vmm::start(&config, &files(&pvh_kernel(SPIN)));
    assert_eq!(result, Ok(Answer::Done));
    for _ in 0..20 {
        assert_eq!(vmm.call(Request::Pause, &[]), Ok(Answer::Done));
        assert_eq!(vmm.call(Request::Resume, &[]), Ok(Answer::Done));
    }
    let Ok(Answer::Text(dump)) = vmm.call(Request::Dump, &[]) else {
        panic!("no dump")
    };
    assert!(dump.contains("\"vcpus\":3"), "{dump}");
}
