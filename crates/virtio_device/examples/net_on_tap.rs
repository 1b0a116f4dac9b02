// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The network device on a pod's tap, beside plain `readv` and `writev` on the same tap: nanoseconds of one thread for a
//! frame, the median of rounds that take turns. Needs root. `cargo run --release -p virtio_device --example net_on_tap`
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a measurement, not a product"
)]

use std::io::{IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Instant;

use network_testbed::Namespace;
use nix::sys::uio::{readv, writev};
use pod_network::{Metadata, PodNetwork};
use virtio_device::net::{FrameIo, Net, NetOptions, Tap};
use virtio_device::{Activation, Event, Interrupt, Progress, QueueState, VirtioDevice, Worker};
use virtio_testdriver::{ChainBuilder, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::net::{HEADER_BYTES, RECEIVE_QUEUE, TRANSMIT_QUEUE, feature};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const QUEUE_SIZE: u16 = 256;
/// Frames in a round: as many as fit the queue, with room for the receive buffers taken ahead.
const BATCH: usize = 128;
const ROUNDS: usize = 400;

/// What a Linux guest takes of the card's offer.
const LINUX: Features = Features::NONE
    .union(feature::MRG_RXBUF)
    .union(feature::CSUM)
    .union(feature::GUEST_CSUM)
    .union(feature::GUEST_TSO4)
    .union(feature::GUEST_TSO6);

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_used_queue(&self, _: u16) {}
    fn signal_config_change(&self) {}
}

struct Rig {
    mem: TestMemory,
    receive: TestDriver,
    transmit: TestDriver,
    worker: Box<dyn Worker>,
    tap: Arc<Tap>,
    neighbour: UdpSocket,
}

fn state(driver: &TestDriver) -> QueueState {
    let rings = driver.rings();
    QueueState {
        size: rings.size,
        ready: true,
        desc_table: rings.desc_table,
        avail_ring: rings.avail_ring,
        used_ring: rings.used_ring,
        ..QueueState::default()
    }
}

fn handle(worker: &mut dyn Worker, queue: u16) {
    while worker.handle(Event::Queue(queue)).unwrap() == Progress::More {}
}

fn rig(tap: Tap, neighbour: UdpSocket) -> Rig {
    let mut mem = TestMemory::new(64 << 20);
    let receive = TestDriver::new(&mut mem, QUEUE_SIZE);
    let transmit = TestDriver::new(&mut mem, QUEUE_SIZE);
    let tap = Arc::new(tap);
    let mut net = Net::new(NetOptions {
        io: Arc::clone(&tap) as Arc<dyn FrameIo>,
        mac: MAC,
        mtu: 1500,
        limits: Default::default(),
    })
    .unwrap();
    let activation = Activation {
        memory: mem.space(),
        queues: vec![state(&receive), state(&transmit)],
        features: Features::COMMON | LINUX,
        interrupt: Arc::new(NoInterrupt),
    };
    let worker = net.activate(activation).unwrap().remove(0);
    Rig {
        mem,
        receive,
        transmit,
        worker,
        tap,
        neighbour,
    }
}

/// A UDP datagram to an address that the neighbour does not have, which its kernel drops early.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = [
        &[0; HEADER_BYTES][..],
        &[2, 0, 0, 0, 0, 1],
        &MAC,
        &[
            8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 2, 3, 10, 1, 2, 250,
        ],
    ]
    .concat();
    frame.resize(HEADER_BYTES + len, 0x5a);
    frame
}

fn per_frame(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e9 / BATCH as f64
}

impl Rig {
    fn plain_send(&self, frame: &[u8]) -> f64 {
        let begin = Instant::now();
        let (header, body) = frame.split_at(HEADER_BYTES);
        for _ in 0..BATCH {
            let slices = [IoSlice::new(header), IoSlice::new(body)];
            writev(self.tap.descriptor(), &slices).unwrap();
        }
        per_frame(begin)
    }

    fn device_send(&mut self, chain: &ChainBuilder) -> f64 {
        for _ in 0..BATCH {
            self.transmit.add(&mut self.mem, chain);
        }
        let begin = Instant::now();
        handle(&mut *self.worker, TRANSMIT_QUEUE);
        let time = per_frame(begin);
        assert_eq!(self.transmit.drain_used().len(), BATCH);
        time
    }

    /// Puts frames with `len` bytes into the tap's queue.
    fn fill(&self, len: usize) {
        let payload = vec![0x5a; len - 42];
        for _ in 0..BATCH {
            self.neighbour.send_to(&payload, "10.1.2.3:9").unwrap();
        }
    }

    fn plain_receive(&self, len: usize) -> f64 {
        self.fill(len);
        let (mut header, mut body) = ([0; HEADER_BYTES], vec![0; 65_536]);
        let begin = Instant::now();
        for _ in 0..BATCH {
            let mut slices = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut body)];
            readv(self.tap.descriptor(), &mut slices).unwrap();
        }
        per_frame(begin)
    }

    fn device_receive(&mut self, buffer: &ChainBuilder, len: usize) -> f64 {
        while self.receive.free_descriptors() > 0 {
            self.receive.add(&mut self.mem, buffer);
        }
        self.fill(len);
        let begin = Instant::now();
        handle(&mut *self.worker, RECEIVE_QUEUE);
        let time = per_frame(begin);
        assert_eq!(self.receive.drain_used().len(), BATCH);
        time
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn report(name: &str, times: Vec<(f64, f64)>) {
    let (plain, device): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let (plain, device) = (median(plain), median(device));
    println!(
        "{name:24} plain {plain:6.0} ns, device {device:6.0} ns, speed {:.2} of plain",
        plain / device
    );
}

fn main() {
    let (pod, outside) = (Namespace::new(), Namespace::new());
    for namespace in [&pod, &outside] {
        namespace.write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    }
    pod.ip("link add eth0 address 02:00:00:00:00:07 type veth peer name veth0 address 02:00:00:00:00:01");
    pod.give("veth0", &outside);
    outside.ip("link set veth0 up");
    outside.ip("addr add 10.1.2.1/24 dev veth0");
    outside.ip("neigh add 10.1.2.3 lladdr 02:00:00:00:00:07 dev veth0");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.1.2.3/24 dev eth0");
    let (_network, plan) = PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap();
    let tap = Tap::new(plan.taps.into_iter().next().unwrap().tap).unwrap();
    let neighbour = outside.inside(|| UdpSocket::bind("10.1.2.1:0").unwrap());
    let mut rig = rig(tap, neighbour);
    for len in [60, 1514] {
        let bytes = frame(len);
        let chain = ChainBuilder::new().readable(&mut rig.mem, &bytes);
        let both = (0..ROUNDS).map(|_| (rig.plain_send(&bytes), rig.device_send(&chain)));
        report(&format!("send, {len} bytes"), both.collect());
    }
    // As Linux gives them: a page each at most.
    let buffer = ChainBuilder::new().writable(&mut rig.mem, 1536);
    for len in [60, 1514] {
        let both = (0..ROUNDS).map(|_| (rig.plain_receive(len), rig.device_receive(&buffer, len)));
        report(&format!("receive, {len} bytes"), both.collect());
    }
}
