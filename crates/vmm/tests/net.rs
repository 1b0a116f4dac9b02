// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A jailed VMM whose guest asks for its neighbour's MAC address over a pod's network and waits for the answer. Needs root
//! and `/dev/kvm`; the guest is a driver of a few stores, which runs on any KVM.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use common::{Vmm, config, files, pvh_kernel};
use network_testbed::Namespace;
use pod_network::{Metadata, PodNetwork};
use vmm::control::{Answer, NetworkConfig};

/// How long the guest may wait for its answer.
const DEADLINE: Duration = Duration::from_secs(60);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// The window of the first card: behind vsock, console, rng, balloon and 24 disk slots.
const WINDOW: u32 = 0xd000_0000 + 28 * 0x1000;

// Registers (virtio v1.3 §4.2.2).
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_SEL: u32 = 0x30;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const QUEUE_NOTIFY: u32 = 0x50;
const STATUS: u32 = 0x70;
const QUEUE_DESC: u32 = 0x80;
const QUEUE_AVAIL: u32 = 0x90;
const QUEUE_USED: u32 = 0xa0;

const RECEIVE: u32 = 0x20_0000;
const TRANSMIT: u32 = 0x21_0000;
// Parts of a queue, from where it begins.
const AVAIL: u32 = 0x1000;
const USED: u32 = 0x2000;
const BUFFER: u32 = 0x4000;
/// Bytes of the header before a frame.
const HEADER: u32 = 12;

/// Stores of constants, then a loop until a word has a value, then a triple fault.
struct Program(Vec<u8>);

impl Program {
    fn store(&mut self, address: u32, value: u32) {
        self.0.extend([0xc7, 0x05]); // mov dword [address], value
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
    }

    fn register(&mut self, offset: u32, value: u32) {
        self.store(WINDOW + offset, value);
    }

    fn bytes(&mut self, address: u32, bytes: &[u8]) {
        for (address, word) in (address..).step_by(4).zip(bytes.chunks(4)) {
            let mut padded = [0; 4];
            padded[..word.len()].copy_from_slice(word);
            self.store(address, u32::from_le_bytes(padded));
        }
    }

    /// A queue with one buffer in it.
    fn queue(&mut self, index: u32, at: u32, len: u32, flags: u32) {
        self.register(QUEUE_SEL, index);
        self.register(QUEUE_NUM, 16);
        for (register, part) in [(QUEUE_DESC, 0), (QUEUE_AVAIL, AVAIL), (QUEUE_USED, USED)] {
            self.register(register, at + part);
            self.register(register + 4, 0);
        }
        self.register(QUEUE_READY, 1);
        self.store(at, at + BUFFER);
        self.store(at + 4, 0);
        self.store(at + 8, len);
        self.store(at + 12, flags);
        self.store(at + AVAIL + 4, 0);
        self.store(at + AVAIL, 1 << 16); // one entry
    }

    fn wait_for(&mut self, address: u32, value: u32) {
        self.0.extend([0x81, 0x3d]); // cmp dword [address], value
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x75, 0xf4]); // jne to the comparison
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend([0x0f, 0x0b]); // ud2
        self.0
    }
}

fn asks_who_has_its_neighbours_address() -> Vec<u8> {
    let question = [
        &[0; HEADER as usize][..],
        &[0xff; 6],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &[10, 1, 2, 3],
        &[0; 6],
        &[10, 1, 2, 1],
    ]
    .concat();
    let mut program = Program(Vec::new());
    for status in [0, 1, 3] {
        program.register(STATUS, status);
    }
    // CSUM and GUEST_CSUM, so that the tap's offloads are set; VERSION_1.
    for (select, features) in [(0, 3), (1, 1)] {
        program.register(DRIVER_FEATURES_SEL, select);
        program.register(DRIVER_FEATURES, features);
    }
    program.register(STATUS, 0xb);
    program.bytes(TRANSMIT + BUFFER, &question);
    program.queue(0, RECEIVE, 2048, 2); // the device writes
    program.queue(1, TRANSMIT, u32::try_from(question.len()).unwrap(), 0);
    program.register(STATUS, 0xf);
    program.register(QUEUE_NOTIFY, 0);
    program.register(QUEUE_NOTIFY, 1);
    // An ARP reply: its type is 2 bytes behind the two addresses, its operation 6 bytes behind that.
    program.wait_for(
        RECEIVE + BUFFER + HEADER + 12,
        u32::from_le_bytes([8, 6, 0, 1]),
    );
    program.wait_for(
        RECEIVE + BUFFER + HEADER + 18,
        u32::from_le_bytes([6, 4, 0, 2]),
    );
    // The neighbour's MAC address, but for its first two bytes.
    program.wait_for(
        RECEIVE + BUFFER + HEADER + 24,
        u32::from_le_bytes([0, 0, 0, 1]),
    );
    program.end()
}

/// A pod's namespace, and its neighbour's at the other end of the veth pair; IPv4 alone, so that nobody speaks unasked.
fn pair() -> (Namespace, Namespace) {
    let (pod, neighbour) = (Namespace::new(), Namespace::new());
    for namespace in [&pod, &neighbour] {
        namespace.write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    }
    pod.ip("link add eth0 address 02:00:00:00:00:07 type veth peer name veth0 address 02:00:00:00:00:01");
    pod.give("veth0", &neighbour);
    neighbour.ip("link set veth0 up");
    neighbour.ip("addr add 10.1.2.1/24 dev veth0");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.1.2.3/24 dev eth0");
    (pod, neighbour)
}

#[test]
fn guest_speaks_to_its_neighbour_out_of_the_jail() {
    let (pod, neighbour) = pair();
    let (network, plan) = PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap();
    let mut files = files(&pvh_kernel(&asks_who_has_its_neighbours_address()));
    files.taps = plan.taps.into_iter().map(|tap| tap.tap).collect();
    let mut config = config();
    config.networks = vec![NetworkConfig {
        mac: MAC,
        mtu: 1500,
    }];
    let (mut vmm, result) = Vmm::start(&config, &files);
    assert_eq!(result, Ok(Answer::Done));
    drop(files); // as the driver's are: the tap is the VMM's alone
    let vmm_id = nix::unistd::Pid::from_raw(vmm.child.id().cast_signed());
    let (done, is_done) = mpsc::channel::<()>();
    // A guest that waits in vain is ended, and the test with it.
    let watchdog = thread::spawn(move || {
        if is_done.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout) {
            nix::sys::signal::kill(vmm_id, nix::sys::signal::SIGKILL).unwrap();
        }
    });
    let (code, text, _) = vmm.end();
    drop(done);
    watchdog.join().unwrap();
    assert_eq!((code, text.as_str()), (0, "the guest shut down"));
    let learnt = neighbour.ip("neigh show 10.1.2.3");
    assert!(learnt.contains("02:00:00:00:00:07"), "{learnt}");
    assert!(
        !pod.ip("link show").contains("coffer"),
        "the tap has gone with the VMM"
    );
    drop(network);
    assert!(!pod.run("tc", "qdisc show").contains("ingress"));
}
