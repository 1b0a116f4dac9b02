// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! VMs that are resized, with a guest of a few instructions, in a jailed VMM. Needs `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers outside the test functions"
)]

mod common;

use std::time::{Duration, Instant};

use common::{Vmm, config, files, pvh_kernel};
use vmm::ExitCode;
use vmm::control::{Answer, Config, Refusal, RefusalKind, Request, Size};
use vmm::devices::registers;
use vmm::layout;

/// Where the guest has its ring and its requests.
const DESCRIPTORS: u32 = 0x30_0000;
const AVAILABLE: u32 = 0x30_1000;
const USED: u32 = 0x30_2000;
const REQUEST: u32 = 0x30_3000;
const ANSWER: u32 = 0x30_4000;
/// The window of the memory device, behind the disk slots.
const WINDOW: u16 = layout::FIRST_DISK_SLOT + 24;
/// A generous end of every wait.
const DEADLINE: Duration = Duration::from_secs(60);

fn resizable() -> Config {
    Config {
        max_vcpus: 3,
        max_memory_mib: 1024,
        ..config()
    }
}

/// 32-bit code, put together.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    /// `mov dword [address], value`
    fn write(&mut self, address: u32, value: u32) {
        self.0.extend([0xc7, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
    }

    fn register(&mut self, offset: u64, value: u32) {
        let address = layout::window(WINDOW) + offset;
        self.write(u32::try_from(address).unwrap(), value);
    }

    /// `cmp dword [address], value`, and back to it while it differs.
    fn wait_for(&mut self, address: u32, value: u32) {
        self.0.extend([0x81, 0x3d]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x75, 0xf4]);
    }

    fn forever(&mut self) {
        self.0.extend([0xeb, 0xfe]);
    }
}

/// Waits for the memory device and brings it to life as a driver would, then sends these requests: type, first block,
/// blocks.
fn plugging(requests: &[(u32, u32, u32)]) -> Vec<u8> {
    let mut code = Code::default();
    let id = layout::window(WINDOW) + registers::DEVICE_ID;
    code.wait_for(u32::try_from(id).unwrap(), 24);
    code.register(registers::STATUS, 1);
    code.register(registers::STATUS, 3);
    code.register(registers::DRIVER_FEATURES_SEL, 1);
    code.register(registers::DRIVER_FEATURES, 1);
    code.register(registers::STATUS, 11);
    code.register(registers::QUEUE_SEL, 0);
    code.register(registers::QUEUE_SIZE, 16);
    code.register(registers::QUEUE_DESC_LOW, DESCRIPTORS);
    code.register(registers::QUEUE_DRIVER_LOW, AVAILABLE);
    code.register(registers::QUEUE_DEVICE_LOW, USED);
    code.register(registers::QUEUE_READY, 1);
    code.register(registers::STATUS, 15);
    // Descriptors: address, length, flags and the next one's index.
    for (at, value) in [
        (0, REQUEST),
        (8, 24),
        (12, 1 | 1 << 16),
        (16, ANSWER),
        (24, 10),
        (28, 2),
    ] {
        code.write(DESCRIPTORS + at, value);
    }
    for (index, (kind, block, blocks)) in (1u32..).zip(requests.iter().copied()) {
        code.write(REQUEST, kind);
        code.write(REQUEST + 8, block * (2 << 20));
        code.write(REQUEST + 12, 1); // from 4 GiB on
        code.write(REQUEST + 16, blocks);
        code.write(AVAILABLE, index << 16); // each entry of the ring is 0
        code.register(registers::QUEUE_NOTIFY, 0);
        code.wait_for(USED, index << 16);
    }
    code.forever();
    code.0
}

fn start(config: &Config, code: &[u8]) -> Vmm {
    let (vmm, result) = Vmm::start(config, &files(&pvh_kernel(code)));
    assert_eq!(result, Ok(Answer::Done));
    vmm
}

fn resize(vmm: &mut Vmm, vcpus: u8, memory_mib: u32) -> Result<Size, Refusal> {
    match vmm.call(Request::Resize { vcpus, memory_mib }, &[])? {
        Answer::Size(size) => Ok(size),
        other => panic!("{other:?}"),
    }
}

/// Asks for a size until the memory is `expected`.
fn resize_until(vmm: &mut Vmm, memory_mib: u32, expected: u32) {
    let end = Instant::now() + DEADLINE;
    loop {
        let size = resize(vmm, 1, memory_mib).unwrap();
        if size.memory_mib == expected {
            return;
        }
        assert!(Instant::now() < end, "{size:?}");
        std::thread::yield_now();
    }
}

#[test]
fn plugged_memory_is_counted_and_what_goes_beyond_is_not_plugged() {
    // 4 blocks; one more than was asked for; two slots where one is due; 3 of the 4 back.
    let requests = [(0, 0, 4), (0, 4, 1), (0, 64, 1), (1, 1, 3)];
    let mut vmm = start(&resizable(), &plugging(&requests[..3]));
    resize_until(&mut vmm, 136, 136);
    let Ok(Answer::Text(dump)) = vmm.call(Request::Dump, &[]) else {
        panic!("no dump");
    };
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(dump["size"]["plugged_bytes"], 8 << 20);
    let size = resize(&mut vmm, 1, 128).unwrap();
    assert_eq!(size.memory_mib, 136, "a guest that unplugs nothing");
    assert_eq!(size.device, Some(format!("virtio-mmio.{WINDOW}")));

    let mut vmm = start(&resizable(), &plugging(&requests));
    resize_until(&mut vmm, 136, 130);
}

#[test]
fn spare_vcpus_are_made_in_the_jail_and_stay() {
    let mut code = Code::default();
    code.forever();
    let mut vmm = start(&resizable(), &code.0);
    let threads = |vmm: &Vmm| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.child.id())).unwrap();
        // KVM has threads of its own in the process.
        let names = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.starts_with("vcpu")).count()
    };
    // A thread takes its name when it first runs.
    let end = Instant::now() + DEADLINE;
    while threads(&vmm) < 3 {
        assert!(Instant::now() < end, "{} threads", threads(&vmm));
        std::thread::yield_now();
    }
    for (asked, made) in [(1, 1), (3, 3), (1, 3), (2, 3)] {
        let size = resize(&mut vmm, asked, 128).unwrap();
        assert_eq!((size.vcpus, size.memory_mib), (made, 128));
        assert_eq!(size.device, None, "no memory was asked for");
    }
    assert_eq!(threads(&vmm), 3, "none is made in the jail");
    assert_eq!(vmm.call(Request::Pause, &[]), Ok(Answer::Done));
    assert_eq!(vmm.call(Request::Resume, &[]), Ok(Answer::Done));
}

#[test]
fn size_that_the_vm_was_not_started_to_become_is_refused_and_it_goes_on() {
    let mut code = Code::default();
    code.forever();
    let mut vmm = start(&resizable(), &code.0);
    for (vcpus, memory) in [(0, 128), (4, 128), (1, 1025), (1, 8), (u8::MAX, u32::MAX)] {
        let refused = resize(&mut vmm, vcpus, memory).unwrap_err();
        assert_eq!(refused.kind, RefusalKind::Config, "{refused:?}");
    }
    assert_eq!(resize(&mut vmm, 3, 1024).unwrap().memory_mib, 128);
    let mut fixed = start(&config(), &code.0);
    resize(&mut fixed, 2, 128).unwrap_err();
    resize(&mut fixed, 1, 129).unwrap_err();
    assert_eq!(resize(&mut fixed, 1, 64).unwrap().memory_mib, 128);
}

#[test]
fn guest_that_ends_as_it_sees_the_device_is_told_after_the_resize() {
    let mut code = Code::default();
    let id = layout::window(WINDOW) + registers::DEVICE_ID;
    code.wait_for(u32::try_from(id).unwrap(), 24);
    code.0.extend([0xb0, 0xfe, 0xe6, 0x64]); // mov al, 0xfe; out 0x64, al: a reset
    code.forever();
    let mut vmm = start(&resizable(), &code.0);
    assert_eq!(resize(&mut vmm, 1, 256).unwrap().memory_mib, 128);
    assert_eq!(vmm.end().0, ExitCode::Guest as u8);
}
