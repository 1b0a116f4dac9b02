// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A guest's vsock driver as far as tests need one, the host's processes, and the device between them.
//!
//! Everything runs on one thread: a socket's event is there as soon as the write that causes it has returned, so no
//! test has to wait for anything.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ids::{GuestCid, VsockPort};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;
use virtio_testdriver::{ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::vsock::{ConnectionKey, CreditInfo, HEADER_LEN, Header, Message, Op, Packet};

use crate::testing::{Space, TestInterrupt, activation, counter, queue_state};
use crate::vsock::{Clock, HostPorts, Vsock, VsockOptions};
use crate::{DeviceState, Event, Progress, QueueState, VirtioDevice, Worker};

/// What Linux posts: 4 KiB behind the header.
const RECEIVE_BUFFER: u32 = 4096 + 44;
const RECEIVE_BUFFERS: u64 = 128;
/// Header and the largest payload.
const SEND_SLOT: u64 = 44 + 64 * 1024 + 4096;
const SEND_SLOTS: u64 = 16;

/// The one port of the host that is on the allow-list and served.
pub(super) const SERVED: u32 = 1024;
/// On the allow-list, but nobody serves it.
pub(super) const UNSERVED: u32 = 1025;

pub(super) const CID: GuestCid = GuestCid::DEFAULT;

/// The streams that the guest has opened, for the test to take.
#[derive(Clone, Default)]
pub(super) struct OpenedPorts(Arc<Mutex<VecDeque<UnixStream>>>);

impl HostPorts for OpenedPorts {
    fn open(&mut self, port: VsockPort) -> io::Result<UnixStream> {
        if port.0 != SERVED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        self.0.lock().unwrap().push_back(theirs);
        Ok(ours)
    }
}

/// One packet that the guest got.
#[derive(Debug, Clone)]
pub(super) struct Received {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
}

/// The guest's own account of one connection's credit; no code shared with the device.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Account {
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    pub(super) sent: u32,
    pub(super) peer_buf_alloc: u32,
    pub(super) peer_fwd_cnt: u32,
}

/// Everything.
pub(super) struct Rig {
    pub(super) mem: TestMemory,
    pub(super) receive: TestDriver,
    pub(super) transmit: TestDriver,
    pub(super) events: TestDriver,
    pub(super) interrupt: Arc<TestInterrupt>,
    pub(super) device: Vsock,
    pub(super) worker: Box<dyn Worker>,
    pub(super) accounts: HashMap<ConnectionKey, Account>,
    pub(super) repost: bool,
    opened: OpenedPorts,
    now: Arc<Mutex<Instant>>,
    socket: TempDir,
    receive_buffers: HashMap<u16, u64>,
    send_slots: Vec<u64>,
}

fn device(dir: &TempDir, now: &Arc<Mutex<Instant>>, opened: &OpenedPorts) -> Vsock {
    let now = Arc::clone(now);
    let clock: Clock = Arc::new(move || *now.lock().unwrap());
    let path = dir.path().join("vsock");
    let _ = std::fs::remove_file(&path);
    let options = VsockOptions {
        guest_cid: CID,
        listener: UnixListener::bind(path).unwrap(),
        host_ports: BTreeSet::from([VsockPort(SERVED), VsockPort(UNSERVED)]),
        ports: Box::new(opened.clone()),
    };
    Vsock::with_clock(options, clock).unwrap()
}

impl Rig {
    /// An activated device whose driver has filled its queues.
    pub(super) fn new() -> Self {
        Self::with_features(Features::COMMON)
    }

    pub(super) fn with_features(features: Features) -> Self {
        let mut mem = TestMemory::new(8 << 20);
        let receive = TestDriver::new(&mut mem, 128);
        let transmit = TestDriver::new(&mut mem, 128);
        let events = TestDriver::new(&mut mem, 16);
        let interrupt = Arc::new(TestInterrupt::default());
        let socket = tempfile::tempdir().unwrap();
        let now = Arc::new(Mutex::new(Instant::now()));
        let opened = OpenedPorts::default();
        let mut device = device(&socket, &now, &opened);
        let queues = [&receive, &transmit, &events].map(queue_state).to_vec();
        let activation = activation(&mem, queues, features, &interrupt);
        let worker = device.activate(activation).unwrap().remove(0);
        let send_slots = (0..SEND_SLOTS).map(|_| mem.alloc(SEND_SLOT, 16)).collect();
        let mut rig = Self {
            mem,
            receive,
            transmit,
            events,
            interrupt,
            device,
            worker,
            accounts: HashMap::new(),
            repost: true,
            opened,
            now,
            socket,
            receive_buffers: HashMap::new(),
            send_slots,
        };
        for _ in 0..RECEIVE_BUFFERS {
            let addr = rig.mem.alloc(u64::from(RECEIVE_BUFFER), 16);
            rig.post(addr);
        }
        rig.post_event_buffer();
        for queue in 0..3 {
            rig.handle(Event::Queue(queue));
        }
        rig
    }

    /// Offers a receive buffer of the usual size.
    fn post(&mut self, addr: u64) {
        self.post_sized(addr, RECEIVE_BUFFER);
    }

    /// Offers a receive buffer.
    pub(super) fn post_sized(&mut self, addr: u64, len: u32) {
        let chain = ChainBuilder::new().raw(addr, len, DESC_WRITE);
        let head = self.receive.add(&mut self.mem, &chain);
        self.receive_buffers.insert(head, addr);
    }

    pub(super) fn post_event_buffer(&mut self) -> u64 {
        let chain = ChainBuilder::new().writable(&mut self.mem, 8);
        self.events.add(&mut self.mem, &chain);
        chain.buffers()[0].addr
    }

    /// Runs the worker on one event until it is idle.
    pub(super) fn handle(&mut self, event: Event) {
        for _ in 0..100_000 {
            if self.worker.handle(event).unwrap() == Progress::Idle {
                return;
            }
        }
        panic!("the worker never becomes idle");
    }

    /// Whether the device's descriptor would wake its thread.
    pub(super) fn would_wake(&self) -> bool {
        let sources = self.worker.sources();
        let mut fds = [PollFd::new(sources[0].1, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    /// Serves the host's side for as long as there are events.
    pub(super) fn host_events(&mut self) {
        for _ in 0..1000 {
            self.handle(Event::Source(0));
            if !self.would_wake() {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    /// Serves the host's side, then takes everything that the guest was sent.
    pub(super) fn packets(&mut self) -> Vec<Received> {
        let mut all = Vec::new();
        loop {
            self.host_events();
            let now = self.take_received();
            if now.is_empty() {
                return all;
            }
            all.extend(now);
            self.handle(Event::Queue(0));
        }
    }

    /// What is in the receive queue's used ring; its buffers are offered again.
    pub(super) fn take_received(&mut self) -> Vec<Received> {
        let mut all = Vec::new();
        while let Some(used) = self.receive.pop_used() {
            let head = u16::try_from(used.head).unwrap();
            let Some(addr) = self.receive_buffers.remove(&head) else {
                assert_eq!(used.written, 0, "a buffer of another kind comes back empty");
                continue;
            };
            let bytes = self.mem.read(addr, used.written as usize);
            if self.repost {
                self.post(addr);
            }
            let header = Header::parse(&bytes).unwrap();
            let payload = bytes[HEADER_LEN..].to_vec();
            assert_eq!(header.len as usize, payload.len());
            self.note(&header);
            all.push(Received { header, payload });
        }
        all
    }

    fn note(&mut self, header: &Header) {
        assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID.get())));
        if header.op == Op::Reset {
            return;
        }
        let key = ConnectionKey {
            guest_port: header.dst_port,
            host_port: header.src_port,
        };
        let account = self.accounts.entry(key).or_default();
        account.peer_buf_alloc = header.buf_alloc;
        account.peer_fwd_cnt = header.fwd_cnt;
    }

    /// Sends bytes as they are, in the buffers given.
    pub(super) fn send_raw(&mut self, parts: &[&[u8]]) {
        let slot = self.send_slots.pop().unwrap();
        let mut chain = ChainBuilder::new();
        let mut at = slot;
        for part in parts {
            self.mem.write(at, part);
            chain = chain.raw(at, u32::try_from(part.len()).unwrap(), 0);
            at += part.len() as u64 + 16; // a gap, so that a border missed shows
        }
        self.transmit.add(&mut self.mem, &chain);
        self.handle(Event::Queue(1));
        assert_eq!(self.transmit.drain_used().len(), 1);
        self.send_slots.push(slot);
    }

    /// Sends a packet; the header says what the guest's account of the connection says.
    pub(super) fn send(&mut self, key: ConnectionKey, message: Message, payload: &[u8]) {
        let account = self.accounts.entry(key).or_default();
        let credit = CreditInfo {
            buf_alloc: account.buf_alloc,
            fwd_cnt: account.fwd_cnt,
        };
        account.sent = account
            .sent
            .wrapping_add(u32::try_from(payload.len()).unwrap());
        let packet = Packet {
            key,
            message,
            credit,
        };
        let header = packet.to_host(CID).encode();
        if payload.is_empty() {
            self.send_raw(&[&header]);
        } else {
            self.send_raw(&[&header, payload]);
        }
    }

    /// Sends data.
    pub(super) fn send_data(&mut self, key: ConnectionKey, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        self.send(key, Message::Data { len }, payload);
    }

    /// Bytes that the guest may still send on `key`.
    pub(super) fn guest_room(&self, key: ConnectionKey) -> usize {
        let account = self.accounts[&key];
        let in_flight = account.sent.wrapping_sub(account.peer_fwd_cnt);
        (account.peer_buf_alloc - in_flight) as usize
    }

    /// The guest's process has read `len` bytes; says so if `tell`.
    pub(super) fn guest_reads(&mut self, key: ConnectionKey, len: usize) {
        let account = self.accounts.get_mut(&key).unwrap();
        account.fwd_cnt = account.fwd_cnt.wrapping_add(u32::try_from(len).unwrap());
    }

    /// The guest connects to the served port; both ends.
    pub(super) fn open_from_guest(&mut self, guest_port: u32) -> (ConnectionKey, UnixStream) {
        let key = ConnectionKey {
            guest_port,
            host_port: SERVED,
        };
        self.forget(key);
        self.send(key, Message::Request, &[]);
        let packets = self.packets();
        assert_eq!(ops(&packets), [Op::Response]);
        (key, self.take_opened().unwrap())
    }

    /// Starts the guest's account of `key` afresh, with Linux' own buffer size.
    pub(super) fn forget(&mut self, key: ConnectionKey) {
        let fresh = Account {
            buf_alloc: 256 * 1024,
            ..Account::default()
        };
        self.accounts.insert(key, fresh);
    }

    /// A host process connects to the device's socket.
    pub(super) fn dial(&self) -> UnixStream {
        UnixStream::connect(self.socket.path().join("vsock")).unwrap()
    }

    /// A host process connects and asks for `port`; the guest's end of it, once the guest has heard.
    pub(super) fn ask(&mut self, port: u32) -> (ConnectionKey, UnixStream) {
        let mut host = self.dial();
        writeln!(host, "CONNECT {port}").unwrap();
        let packets = self.packets();
        assert_eq!(ops(&packets), [Op::Request]);
        let header = packets[0].header;
        assert_eq!(header.dst_port, port);
        let key = ConnectionKey {
            guest_port: port,
            host_port: header.src_port,
        };
        self.accounts.get_mut(&key).unwrap().buf_alloc = 256 * 1024;
        (key, host)
    }

    /// A host process connects to `port` and the guest accepts.
    pub(super) fn open_from_host(&mut self, port: u32) -> (ConnectionKey, UnixStream) {
        let (key, mut host) = self.ask(port);
        self.send(key, Message::Response, &[]);
        let greeting = format!("OK {}\n", key.host_port);
        let mut line = vec![0; greeting.len()];
        host.read_exact(&mut line).unwrap();
        assert_eq!(line, greeting.as_bytes());
        (key, host)
    }

    pub(super) fn take_opened(&mut self) -> Option<UnixStream> {
        self.opened.0.lock().unwrap().pop_front()
    }

    /// Lets time pass; the timer itself is the host's, so the call that it would cause is made here.
    pub(super) fn after(&mut self, time: Duration) {
        *self.now.lock().unwrap() += time;
        self.handle(Event::Source(0));
    }

    /// Lets time pass without anyone noticing.
    pub(super) fn sleep_unnoticed(&mut self, time: Duration) {
        *self.now.lock().unwrap() += time;
    }

    pub(super) fn pause(&mut self) -> Vec<QueueState> {
        self.worker
            .pause()
            .into_iter()
            .map(|(_, state)| state)
            .collect()
    }

    /// Pauses and goes on, with a worker of its own, as a VM does.
    pub(super) fn pause_for(&mut self, time: Duration) {
        let queues = self.pause();
        self.sleep_unnoticed(time);
        let activation = activation(&self.mem, queues, Features::COMMON, &self.interrupt);
        self.worker = self.device.activate(activation).unwrap().remove(0);
    }

    /// The guest goes on in another device, from the saved state of this one.
    pub(super) fn restore_elsewhere(&mut self) {
        let queues = self.pause();
        let state: DeviceState = VirtioDevice::<Space>::save(&self.device);
        let mut device = device(&self.socket, &self.now, &self.opened);
        VirtioDevice::<Space>::restore(&mut device, &state).unwrap();
        let activation = activation(&self.mem, queues, Features::COMMON, &self.interrupt);
        self.worker = device.activate(activation).unwrap().remove(0);
        self.device = device;
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.device), name)
    }

    pub(super) fn connections(&self) -> usize {
        let dump = self.device.handle().dump();
        dump.connections.len() + dump.callers
    }
}

/// The operations of packets, in order.
pub(super) fn ops(packets: &[Received]) -> Vec<Op> {
    packets.iter().map(|packet| packet.header.op).collect()
}

/// The data of packets, in order.
pub(super) fn data(packets: &[Received]) -> Vec<u8> {
    packets
        .iter()
        .flat_map(|packet| packet.payload.clone())
        .collect()
}

/// What is there to read now, up to `max` bytes; `None` at the end of the stream.
pub(super) fn read_now(host: &mut UnixStream, max: usize) -> Option<Vec<u8>> {
    host.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; max];
    match host.read(&mut bytes) {
        Ok(0) => None,
        Ok(n) => {
            bytes.truncate(n);
            Some(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Vec::new()),
        Err(error) => panic!("host cannot read: {error}"),
    }
}

/// Writes as much as there is room for; how much that was.
pub(super) fn write_now(host: &mut UnixStream, bytes: &[u8]) -> usize {
    host.set_nonblocking(true).unwrap();
    match host.write(bytes) {
        Ok(n) => n,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => panic!("host cannot write: {error}"),
    }
}

/// Whether the host's end sees nothing more to come.
pub(super) fn is_over(host: &mut UnixStream) -> bool {
    let mut fds = [PollFd::new(host.as_fd(), PollFlags::POLLIN)];
    let readable = poll(&mut fds, PollTimeout::ZERO).unwrap() > 0;
    readable && matches!(host.read(&mut [0; 1]), Ok(0) | Err(_))
}

/// Bytes without a pattern that a lost or doubled buffer would keep.
pub(super) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let mut bytes = Vec::with_capacity(len + 3);
    while bytes.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(&state.to_le_bytes()[1..]);
    }
    bytes.truncate(len);
    bytes
}
