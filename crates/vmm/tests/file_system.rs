// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A file system device that is attached to a running guest, of a few instructions, in a jailed VMM. Needs `/dev/kvm`.
#![expect(clippy::unwrap_used, reason = "helpers outside the test functions")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Vmm, config, files, pvh_kernel};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_testdriver::{Reply, Told, honest, run_back_end};
use virtio_wire::vhost_user::Request as VhostRequest;
use vmm::ExitCode;
use vmm::control::{Answer, Refusal, RefusalKind, Request};
use vmm::devices::registers;
use vmm::layout;

/// Where the guest counts.
const COUNTER: u32 = 0x20_0000;
/// Where the guest has its rings.
const RINGS: u32 = 0x30_0000;
const MEMORY_BYTES: u64 = 128 << 20;
/// A generous end of every wait.
const DEADLINE: Duration = Duration::from_secs(60);

/// `inc dword [COUNTER]; jmp` to it.
fn count() -> Vec<u8> {
    let [a, b, c, d] = COUNTER.to_le_bytes();
    vec![0xff, 0x05, a, b, c, d, 0xeb, 0xf8]
}

/// Waits until the first slot has a file system, brings it to life as a driver would, and counts.
fn drive() -> Vec<u8> {
    let base = u32::try_from(layout::window(layout::FIRST_DISK_SLOT)).unwrap();
    let at = |offset: u64| (base + u32::try_from(offset).unwrap()).to_le_bytes();
    // cmp dword [DeviceID], 26; jne back to it
    let mut code = [
        &[0x81, 0x3d][..],
        &at(registers::DEVICE_ID),
        &26u32.to_le_bytes(),
    ]
    .concat();
    code.extend([0x75, 0xf4]);
    let mut write = |offset: u64, value: u32| {
        code.extend([0xc7, 0x05]); // mov dword [register], value
        code.extend(at(offset));
        code.extend(value.to_le_bytes());
    };
    write(registers::STATUS, 1);
    write(registers::STATUS, 3);
    write(registers::DRIVER_FEATURES_SEL, 1);
    write(registers::DRIVER_FEATURES, 1);
    write(registers::STATUS, 11);
    for queue in 0..2 {
        let rings = RINGS + queue * 0x1_0000;
        write(registers::QUEUE_SEL, queue);
        write(registers::QUEUE_SIZE, 16);
        write(registers::QUEUE_DESC_LOW, rings);
        write(registers::QUEUE_DRIVER_LOW, rings + 0x1000);
        write(registers::QUEUE_DEVICE_LOW, rings + 0x2000);
        write(registers::QUEUE_READY, 1);
    }
    write(registers::STATUS, 15);
    code.extend(count());
    code
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Attaches a file system with this connection and this file for guest memory.
fn attach(vmm: &mut Vmm, connection: &UnixStream, memory: &File) -> Result<Answer, Refusal> {
    let pagemap = File::open(format!("/proc/{}/pagemap", vmm.child.id())).unwrap();
    let request = Request::AttachFileSystem {
        tag: "volumes".to_owned(),
    };
    let descriptors = [connection.as_fd(), memory.as_fd(), pagemap.as_fd()];
    vmm.call(request, &descriptors)
}

/// The guest's counter, in the file.
fn counter(memory: &File) -> u32 {
    let mut bytes = [0; 4];
    memory.read_exact_at(&mut bytes, COUNTER.into()).unwrap();
    u32::from_le_bytes(bytes)
}

fn start(code: &[u8]) -> Vmm {
    let (vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(code)));
    assert_eq!(result, Ok(Answer::Done));
    vmm
}

/// A back end that keeps to the protocol, and what it is told.
fn honest_back_end() -> (UnixStream, Receiver<Told>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (send, told) = channel();
    let _ = run_back_end(theirs, move |message| {
        let _ = send.send(message.clone());
        honest(message)
    });
    (ours, told)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn running_guest_goes_on_in_memory_that_others_see() {
    let mut vmm = start(&count());
    let memory = memfd(MEMORY_BYTES);
    let (connection, _told) = honest_back_end();
    let answer = attach(&mut vmm, &connection, &memory);
    let device = format!("virtio-mmio.{}", layout::FIRST_DISK_SLOT);
    assert_eq!(answer, Ok(Answer::Attached { device }));
    let before = counter(&memory);
    wait_until("the guest counts in the file", || {
        counter(&memory) != before
    });
    // The code it runs came from a file that was mapped over private memory.
    let mut code = [0; 8];
    memory
        .read_exact_at(&mut code, layout::HIGH_MEMORY)
        .unwrap();
    assert_eq!(code, count().as_slice());
    let again = attach(&mut vmm, &connection, &memory);
    assert_eq!(again.unwrap_err().kind, RefusalKind::Conflict);
}

#[test]
fn guest_that_drives_it_reaches_the_server_and_ends_with_it() {
    let mut vmm = start(&drive());
    let memory = memfd(MEMORY_BYTES);
    let (connection, theirs) = UnixStream::pair().unwrap();
    let (send, live) = channel();
    let (hang_up, hung_up) = channel::<()>();
    let mut enabled = 0;
    let back_end = run_back_end(theirs, move |told| {
        enabled += u32::from(told.request == VhostRequest::SET_VRING_ENABLE);
        if enabled == 2 && told.request == VhostRequest::SET_VRING_ENABLE {
            send.send(()).unwrap();
            let _ = hung_up.recv();
            return Reply::HangUp;
        }
        honest(told)
    });
    attach(&mut vmm, &connection, &memory).unwrap();
    live.recv_timeout(DEADLINE).unwrap();
    let addresses = {
        drop(hang_up);
        let told = back_end.join().unwrap();
        let queue = told
            .iter()
            .filter(|told| told.request == VhostRequest::SET_VRING_ADDR);
        let first = |told: &Told| u32::from_le_bytes(told.payload[8..12].try_into().unwrap());
        queue.map(first).collect::<Vec<_>>()
    };
    assert_eq!(addresses, [RINGS, RINGS + 0x1_0000]);
    let (code, text, status) = vmm.end();
    assert_eq!(code, ExitCode::FileServer as u8, "{text}");
    assert_eq!(status.code(), Some(ExitCode::FileServer as i32));
    assert!(
        text.starts_with("the pod's shared directories are lost: fs cannot"),
        "{text}"
    );
}

#[test]
fn server_that_dies_later_ends_the_vm_and_the_reason_is_told() {
    let mut vmm = start(&drive());
    let memory = memfd(MEMORY_BYTES);
    let (connection, told) = honest_back_end();
    let server = connection.try_clone().unwrap();
    attach(&mut vmm, &connection, &memory).unwrap();
    let live = |told: &Told| told.request == VhostRequest::SET_VRING_ENABLE;
    for _ in 0..2 {
        while !live(&told.recv_timeout(DEADLINE).unwrap()) {}
    }
    let before = counter(&memory);
    wait_until("the guest goes on", || counter(&memory) != before);
    server.shutdown(std::net::Shutdown::Both).unwrap();
    let (code, text, _) = vmm.end();
    assert_eq!(code, ExitCode::FileServer as u8, "{text}");
}

#[test]
fn server_that_does_not_come_to_terms_leaves_the_vm_as_it_was() {
    let mut vmm = start(&count());
    let memory = memfd(MEMORY_BYTES);
    let (connection, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let refused = attach(&mut vmm, &connection, &memory);
    assert_eq!(refused.unwrap_err().kind, RefusalKind::Failed);
    assert_eq!(counter(&memory), 0, "nothing has moved");
    let (connection, _told) = honest_back_end();
    attach(&mut vmm, &connection, &memory).unwrap();
    wait_until("the guest counts in the file", || counter(&memory) != 0);
}

#[test]
fn file_of_another_size_is_refused_and_the_guest_goes_on() {
    let mut vmm = start(&count());
    let (connection, _told) = honest_back_end();
    let refused = attach(&mut vmm, &connection, &memfd(4096));
    assert_eq!(refused.unwrap_err().kind, RefusalKind::Config);
    assert!(matches!(vmm.call(Request::Dump, &[]), Ok(Answer::Text(_))));
}

#[test]
fn paused_vm_stays_paused() {
    let mut vmm = start(&count());
    assert_eq!(vmm.call(Request::Pause, &[]), Ok(Answer::Done));
    let memory = memfd(MEMORY_BYTES);
    let (connection, _told) = honest_back_end();
    attach(&mut vmm, &connection, &memory).unwrap();
    let before = counter(&memory);
    assert!(matches!(vmm.call(Request::Dump, &[]), Ok(Answer::Text(_))));
    assert_eq!(counter(&memory), before);
    assert_eq!(vmm.call(Request::Resume, &[]), Ok(Answer::Done));
    wait_until("the guest counts again", || counter(&memory) != before);
}
