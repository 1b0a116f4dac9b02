// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The network device from the driver's side, over a socket that keeps frames apart as a tap does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use ids::{Limit, Rate};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use proptest::prelude::*;
use virtio_testdriver::{ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::net::{GsoType, HEADER_BYTES, NetHeader, RECEIVE_QUEUE, TRANSMIT_QUEUE, feature};
use virtio_wire::{DeviceId, Features};

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{ChainFault, DeviceError, DeviceState, Event, Limiter, Progress, VirtioDevice, Worker};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

struct Socket {
    fd: OwnedFd,
    offloads: Mutex<Offloads>,
}

impl FrameIo for Socket {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = offloads;
        Ok(())
    }
}

struct Rig {
    mem: TestMemory,
    receive: TestDriver,
    transmit: TestDriver,
    net: Net,
    worker: Box<dyn Worker>,
    interrupt: Arc<TestInterrupt>,
    io: Arc<Socket>,
    network: OwnedFd,
    limits: NetLimits,
}

fn rig(features: Features) -> Rig {
    let mut mem = TestMemory::new(4 << 20);
    let receive = TestDriver::new(&mut mem, 16);
    let transmit = TestDriver::new(&mut mem, 16);
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (fd, network) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let io = Arc::new(Socket {
        fd,
        offloads: Mutex::default(),
    });
    let limits = NetLimits::default();
    let mut net = Net::new(NetOptions {
        io: Arc::clone(&io) as Arc<dyn FrameIo>,
        mac: MAC,
        mtu: 1500,
        limits: limits.clone(),
    })
    .unwrap();
    let interrupt = Arc::new(TestInterrupt::default());
    let queues = vec![queue_state(&receive), queue_state(&transmit)];
    let features = Features::COMMON | features;
    let worker = net
        .activate(activation(&mem, queues, features, &interrupt))
        .unwrap()
        .remove(0);
    Rig {
        mem,
        receive,
        transmit,
        net,
        worker,
        interrupt,
        io,
        network,
        limits,
    }
}

impl Rig {
    fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.net), name)
    }

    /// A frame that arrives at the tap.
    fn arrive(&self, frame: &[u8]) {
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        send(self.network.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
    }

    /// What the guest has sent.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        match recv(self.network.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(len) => {
                bytes.truncate(len);
                Some(bytes)
            }
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn buffer(&mut self, len: usize) -> u64 {
        let chain = ChainBuilder::new().writable(&mut self.mem, len);
        self.receive.add(&mut self.mem, &chain);
        chain.buffers()[0].addr
    }

    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        let bytes = [&header.to_bytes()[..], frame].concat();
        let chain = ChainBuilder::new().readable(&mut self.mem, &bytes);
        self.transmit.add(&mut self.mem, &chain);
        kick(&mut *self.worker, TRANSMIT_QUEUE).unwrap();
    }

    /// Whether something would wake the worker.
    fn is_readable(&self) -> bool {
        let sources = self.worker.sources();
        let mut fds = [PollFd::new(sources[0].1, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[test]
fn config_space_is_mac_and_mtu() {
    let rig = rig(Features::NONE);
    let mut config = [0xff; 14];
    VirtioDevice::<Space>::read_config(&rig.net, 0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[10..], [0xdc, 5, 0, 0]);
    assert_eq!(VirtioDevice::<Space>::kind(&rig.net), DeviceId::NET);
}

#[test]
fn frame_from_the_guest_goes_out_with_its_header_whatever_the_framing() {
    let mut rig = rig(feature::CSUM);
    let header = NetHeader {
        flags: NetHeader::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 16,
        ..NetHeader::default()
    };
    let body = frame(60);
    let bytes = [&header.to_bytes()[..], &body].concat();
    let chain = ChainBuilder::new()
        .readable(&mut rig.mem, &bytes[..5])
        .readable(&mut rig.mem, &bytes[5..20])
        .readable(&mut rig.mem, &bytes[20..]);
    rig.transmit.add(&mut rig.mem, &chain);
    kick(&mut *rig.worker, TRANSMIT_QUEUE).unwrap();
    assert_eq!(rig.sent().unwrap(), bytes);
    assert_eq!(rig.transmit.drain_used().len(), 1);
    assert_eq!(
        (rig.counter("sent_frames"), rig.counter("sent_bytes")),
        (1, 60)
    );
    assert_eq!(rig.interrupt.take_used(TRANSMIT_QUEUE), 1);
}

#[test]
fn header_that_asks_for_what_was_not_negotiated_loses_the_frame_and_nothing_else() {
    let mut rig = rig(feature::CSUM | feature::HOST_TSO4);
    let gso = |gso_type| NetHeader {
        gso_type,
        ..NetHeader::default()
    };
    let flags = NetHeader {
        flags: 2,
        ..NetHeader::default()
    };
    for header in [gso(GsoType::TCPV6), gso(GsoType(3)), flags] {
        rig.send(header, &frame(60));
        assert_eq!(rig.sent(), None);
    }
    rig.send(NetHeader::default(), &frame(13));
    assert_eq!(rig.sent(), None);
    assert_eq!(rig.counter("refused_frames"), 4);
    assert_eq!(rig.transmit.drain_used().len(), 4);
    rig.send(gso(GsoType::TCPV4), &frame(14));
    assert!(rig.sent().is_some());
}

#[test]
fn frame_that_the_tap_does_not_take_is_dropped_and_given_back() {
    let mut rig = rig(Features::NONE);
    let (_, other) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    rig.network = other; // the device's peer is closed
    nix::sys::signal::sigprocmask(
        nix::sys::signal::SigmaskHow::SIG_BLOCK,
        Some(&nix::sys::signal::Signal::SIGPIPE.into()),
        None,
    )
    .unwrap();
    rig.send(NetHeader::default(), &frame(60));
    assert_eq!(rig.counter("dropped_frames"), 1);
    assert_eq!(rig.transmit.drain_used().len(), 1);
}

#[test]
fn received_frame_lies_in_one_buffer_that_says_so() {
    let mut rig = rig(Features::NONE);
    let addr = rig.buffer(2048);
    rig.arrive(&frame(100));
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    let used = rig.receive.drain_used();
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].written, 112);
    let header = NetHeader {
        num_buffers: 1,
        ..NetHeader::default()
    };
    assert_eq!(rig.mem.read(addr, 12), header.to_bytes());
    assert_eq!(rig.mem.read(addr + 12, 100), frame(100));
    assert_eq!(rig.interrupt.take_used(RECEIVE_QUEUE), 1);
}

#[test]
fn large_frame_spans_mergeable_buffers_and_what_is_left_serves_the_next() {
    let mut rig = rig(feature::MRG_RXBUF);
    let addrs: Vec<u64> = (0..4).map(|_| rig.buffer(1000)).collect();
    rig.arrive(&frame(1400));
    rig.arrive(&frame(60));
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    let used: Vec<u32> = rig
        .receive
        .drain_used()
        .iter()
        .map(|used| used.written)
        .collect();
    assert_eq!(used, [1000, 412, 72]);
    assert_eq!(rig.mem.read(addrs[0] + 10, 2), [2, 0]);
    let whole = [
        rig.mem.read(addrs[0] + 12, 988),
        rig.mem.read(addrs[1], 412),
    ]
    .concat();
    assert_eq!(whole, frame(1400));
    assert_eq!(rig.mem.read(addrs[2] + 12, 60), frame(60));
}

#[test]
fn guest_without_buffers_causes_no_wakes_and_its_next_kick_fetches_what_waits() {
    let mut rig = rig(Features::NONE);
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    rig.arrive(&frame(60));
    assert!(!rig.is_readable(), "the worker would spin");
    rig.buffer(2048);
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    assert_eq!(rig.receive.drain_used().len(), 1);
    assert!(!rig.is_readable());
    rig.buffer(2048);
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    rig.arrive(&frame(60));
    assert!(rig.is_readable(), "the worker would sleep");
    assert_eq!(rig.worker.handle(Event::Source(0)).unwrap(), Progress::Idle);
    assert_eq!(rig.receive.drain_used().len(), 1);
    assert!(rig.counter("starved") >= 1);
}

#[test]
fn tap_that_ends_is_let_go() {
    let mut rig = rig(Features::NONE);
    rig.buffer(2048);
    drop(std::mem::replace(
        &mut rig.network,
        std::fs::File::open("/dev/null").unwrap().into(),
    ));
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    assert_eq!(rig.counter("host_errors"), 1);
    assert!(!rig.is_readable());
}

#[test]
fn buffer_smaller_than_a_frame_is_a_broken_chain() {
    for (features, len, fits) in [
        (Features::NONE, 1530, true),
        (Features::NONE, 1529, false),
        (feature::MRG_RXBUF, 12, true),
        (feature::MRG_RXBUF, 11, false),
        (feature::GUEST_TSO4, 65_562, true),
        (feature::GUEST_TSO4, 65_561, false),
    ] {
        let mut rig = rig(features);
        rig.buffer(len);
        let result = kick(&mut *rig.worker, RECEIVE_QUEUE);
        let broken = matches!(
            result,
            Err(DeviceError::Chain {
                fault: ChainFault::BadLayout,
                ..
            })
        );
        assert_eq!(!broken, fits, "{len} bytes");
    }
}

#[test]
fn readable_receive_buffer_is_a_broken_chain() {
    let mut rig = rig(feature::MRG_RXBUF);
    let chain = ChainBuilder::new()
        .readable(&mut rig.mem, &[0; 16])
        .writable(&mut rig.mem, 2048);
    rig.receive.add(&mut rig.mem, &chain);
    assert!(kick(&mut *rig.worker, RECEIVE_QUEUE).is_err());
}

#[test]
fn chain_past_the_cap_is_a_broken_chain() {
    let mut rig = rig(Features::NONE);
    let chain = ChainBuilder::new().raw(0x1000, MAX_CHAIN_BYTES + 1, DESC_WRITE);
    rig.receive.add(&mut rig.mem, &chain);
    assert!(matches!(
        kick(&mut *rig.worker, RECEIVE_QUEUE),
        Err(DeviceError::Chain {
            fault: ChainFault::TooManyBytes,
            ..
        })
    ));
}

#[test]
fn offloads_follow_the_features_and_segmentation_needs_checksums() {
    let guest = |features| *rig(features).io.offloads.lock().unwrap();
    assert_eq!(guest(Features::NONE), Offloads::default());
    assert_eq!(guest(feature::GUEST_TSO4), Offloads::default());
    assert_eq!(
        guest(feature::GUEST_TSO6 | feature::GUEST_CSUM),
        Offloads {
            checksum: Offload::Guest,
            tcp4: Offload::Host,
            tcp6: Offload::Guest,
        }
    );
}

#[test]
fn pause_puts_back_buffers_taken_ahead_and_a_restored_device_uses_them() {
    let mut rig = rig(feature::MRG_RXBUF);
    for _ in 0..3 {
        rig.buffer(1000);
    }
    rig.arrive(&frame(60));
    kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
    assert_eq!(rig.receive.drain_used().len(), 1);
    let positions = rig.worker.pause();
    assert_eq!(positions[0].1.next_avail, 1);
    assert_eq!(positions[0].1.next_used, 1);

    let state = VirtioDevice::<Space>::save(&rig.net);
    let mut restored = Net::new(NetOptions {
        io: Arc::clone(&rig.io) as Arc<dyn FrameIo>,
        mac: MAC,
        mtu: 1500,
        limits: Default::default(),
    })
    .unwrap();
    VirtioDevice::<Space>::restore(&mut restored, &state).unwrap();
    let queues = positions.into_iter().map(|(_, state)| state).collect();
    let features = Features::COMMON | feature::MRG_RXBUF;
    let mut worker = restored
        .activate(activation(&rig.mem, queues, features, &rig.interrupt))
        .unwrap()
        .remove(0);
    rig.arrive(&frame(100));
    kick(&mut *worker, RECEIVE_QUEUE).unwrap();
    let used = rig.receive.drain_used();
    assert_eq!(
        used.iter().map(|used| used.written).collect::<Vec<_>>(),
        [112]
    );
}

#[test]
fn state_of_another_device_is_refused() {
    let mut rig = rig(Features::NONE);
    let foreign: DeviceState = serde_json::from_str(r#"{"Console":{"version":1}}"#).unwrap();
    assert!(VirtioDevice::<Space>::restore(&mut rig.net, &foreign).is_err());
    let newer: DeviceState = serde_json::from_str(r#"{"Net":{"version":2}}"#).unwrap();
    assert!(VirtioDevice::<Space>::restore(&mut rig.net, &newer).is_err());
}

proptest! {
    /// Whatever the sizes of buffers and frames: frames arrive whole, in order, each once.
    #[test]
    fn frames_arrive_whole_and_in_order(
        sizes in prop::collection::vec(1usize..4000, 1..40),
        buffer in 12usize..3000,
    ) {
        let mut rig = rig(feature::MRG_RXBUF);
        let mut waiting = std::collections::VecDeque::new();
        let mut got = Vec::new();
        let mut open: Option<(u16, Vec<u8>)> = None;
        for size in &sizes {
            rig.arrive(&frame(*size));
            let needed = size.saturating_add(12).div_ceil(buffer).saturating_add(4000 / buffer + 1);
            for _ in 0..needed.min(400) {
                if rig.receive.free_descriptors() == 0 {
                    break;
                }
                let addr = rig.buffer(buffer);
                waiting.push_back(addr);
            }
            kick(&mut *rig.worker, RECEIVE_QUEUE).unwrap();
            for used in rig.receive.drain_used() {
                let addr = waiting.pop_front().unwrap();
                let bytes = rig.mem.read(addr, used.written as usize);
                let (left, mut whole) = match open.take() {
                    None => (u16::from_le_bytes([bytes[10], bytes[11]]), Vec::new()),
                    Some(part) => part,
                };
                whole.extend(bytes);
                if left == 1 {
                    got.push(whole[12..].to_vec());
                } else {
                    open = Some((left - 1, whole));
                }
            }
        }
        prop_assert!(open.is_none(), "a frame was given in part");
        let expected: Vec<Vec<u8>> = sizes.iter().take(got.len()).map(|size| frame(*size)).collect();
        // A ring of 16 small buffers holds no frame of 1500 bytes: then none comes.
        prop_assert!(buffer < 100 || got.len() == sizes.len());
        // The longest frame that the MTU allows is all that is kept room for.
        for (got, expected) in got.iter().zip(&expected) {
            prop_assert_eq!(got.as_slice(), &expected[..got.len()]);
            prop_assert!(got.len() == expected.len() || expected.len() > 1518);
        }
    }
}

/// A limit that is in debt for the rest of any test.
fn exhaust(limiter: &Limiter) {
    limiter.set(Limit {
        bytes: Rate::new(1000),
        operations: None,
    });
    limiter.took(100_000_000);
}

#[test]
fn frames_over_the_limit_wait_in_the_queue_and_go_when_it_is_lifted() {
    let mut rig = rig(Features::NONE);
    exhaust(&rig.limits.egress);
    let bytes = [&NetHeader::default().to_bytes()[..], &frame(60)].concat();
    for _ in 0..3 {
        let chain = ChainBuilder::new().readable(&mut rig.mem, &bytes);
        rig.transmit.add(&mut rig.mem, &chain);
    }
    let event = Event::Queue(TRANSMIT_QUEUE);
    let progress = rig.worker.handle(event).unwrap();
    assert!(matches!(progress, Progress::Later(wait) if wait.as_secs() > 1000));
    assert_eq!(rig.sent(), None);
    assert!(rig.transmit.drain_used().is_empty());
    rig.limits.egress.set(Limit::default());
    assert_eq!(rig.worker.handle(event).unwrap(), Progress::Idle);
    for _ in 0..3 {
        assert_eq!(rig.sent().unwrap(), bytes);
    }
    // An empty queue waits for a kick, limit or no limit.
    exhaust(&rig.limits.egress);
    assert_eq!(rig.worker.handle(event).unwrap(), Progress::Idle);
}

#[test]
fn frames_over_the_limit_wait_in_the_tap_and_wake_nobody() {
    let mut rig = rig(Features::NONE);
    rig.buffer(2048);
    rig.buffer(2048);
    let progress = rig.worker.handle(Event::Queue(RECEIVE_QUEUE)).unwrap();
    assert_eq!(progress, Progress::Idle);
    rig.arrive(&frame(60));
    assert!(rig.is_readable());
    exhaust(&rig.limits.ingress);
    let progress = rig.worker.handle(Event::Source(0)).unwrap();
    assert!(matches!(progress, Progress::Later(_)), "{progress:?}");
    assert!(!rig.is_readable());
    assert!(rig.receive.drain_used().is_empty());
    rig.limits.ingress.set(Limit::default());
    assert_eq!(rig.worker.handle(Event::Source(0)).unwrap(), Progress::Idle);
    assert_eq!(rig.receive.drain_used().len(), 1);
}

#[test]
fn each_way_has_its_own_limit_and_counts_without_the_header() {
    let mut rig = rig(Features::NONE);
    let limit = Limit {
        bytes: Rate::new(1).map(|rate| rate.with_burst(61.try_into().unwrap())),
        operations: None,
    };
    exhaust(&rig.limits.ingress);
    rig.limits.egress.set(limit);
    rig.send(NetHeader::default(), &frame(60));
    assert!(rig.sent().is_some());
    // One token is left.
    rig.send(NetHeader::default(), &frame(60));
    assert!(rig.sent().is_some());
    assert!(rig.limits.egress.wait().is_some());
}
