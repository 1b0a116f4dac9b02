// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Targets of the virtio parsers and devices.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ids::{GuestCid, VsockPort};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_device::balloon::{Backing, BackingSwitch, Balloon, MemoryRelease};
use virtio_device::block::{Access, Block, BlockOptions, FileDisk};
use virtio_device::console::{Console, ConsoleLog, LogFile, TAIL_BYTES};
use virtio_device::rng::{EntropySource, Rng};
use virtio_device::vsock::{HostPorts, Vsock, VsockOptions};
use virtio_device::{Chain, DeviceState, Queue, QueueState, VirtioDevice};
use virtio_testdriver::TestMemory;
use virtio_wire::blk::{BlkRequest, RANGE_BYTES, SectorRange};
use virtio_wire::{Features, balloon as balloon_wire, vhost_user, vsock as vsock_wire};

use crate::guest::Space;
use crate::{Guest, Input};

const DISK_BYTES: usize = 16 << 10;
const LOG_BYTES: u64 = 1000;
const MAX_CHAIN_BYTES: u32 = 64 << 10;

/// Every parser: bytes that parse encode to themselves again, but for reserved fields.
pub(crate) fn wire(data: &[u8]) {
    if let Ok(request) = BlkRequest::parse(data) {
        assert_eq!(BlkRequest::parse(&request.to_bytes()), Ok(request));
    }
    if let Ok(range) = SectorRange::parse(data) {
        assert_eq!(
            data.get(..RANGE_BYTES as usize),
            Some(&range.to_bytes()[..])
        );
    }
    if let Ok(addr) = balloon_wire::parse_page_address(data) {
        assert_eq!(addr % balloon_wire::PAGE_BYTES, 0);
    }
    if let Ok(header) = vsock_wire::Header::parse(data) {
        assert_eq!(
            data.get(..vsock_wire::HEADER_LEN),
            Some(&header.encode()[..])
        );
    }
    file_server_answer(data);
}

/// What a file server answers is taken only if it answers what was asked.
fn file_server_answer(data: &[u8]) {
    let asked = vhost_user::Request::GET_VRING_BASE;
    let Some((header, rest)) = data.split_first_chunk() else {
        return;
    };
    if vhost_user::check_reply(asked, *header).is_ok() {
        assert_eq!(header.first_chunk(), Some(&asked.0.to_le_bytes()));
    }
    if let Some(payload) = rest.first_chunk::<8>()
        && let Ok(position) = vhost_user::vring_base(1, *payload)
    {
        let expected = vhost_user::vring_state(1, u32::from(position));
        assert_eq!(payload.as_slice(), expected);
    }
}

/// A queue whose registers, rings and descriptors are all from the input.
pub(crate) fn queue(data: &[u8]) {
    let mut input = Input::new(data);
    let mem = TestMemory::new(0x1_0000);
    let features = Features::from_bits(u64::from(input.u8() & 0b11) << 28);
    let state = QueueState {
        size: 1 << (input.u8() % 12),
        ready: true,
        desc_table: u64::from(input.u16() & !0xf),
        avail_ring: u64::from(input.u16() & !1),
        used_ring: u64::from(input.u16() & !3),
        next_avail: input.u16(),
        next_used: input.u16(),
    };
    mem.write(0, input.bytes(0x8000));
    let space = mem.space();
    let Ok(mut queue) = Queue::new(0, &state, features, MAX_CHAIN_BYTES, &*space) else {
        return;
    };
    let mut chain = Chain::default();
    for _ in 0..state.size {
        let Ok(true) = queue.pop(&*space, &mut chain) else {
            break;
        };
        assert!(chain.total_len() <= MAX_CHAIN_BYTES);
        let segments = chain.readable.segments().len() + chain.writable.segments().len();
        assert!(segments <= usize::from(state.size));
        let mut bytes = vec![0; chain.readable.len() as usize];
        let read = chain
            .readable
            .read_at(&*space, 0, &mut bytes)
            .expect("checked memory");
        assert_eq!(read, bytes.len());
        if queue
            .complete(&*space, chain.head(), chain.writable.len())
            .is_err()
        {
            break;
        }
    }
}

/// Any JSON as a state: refused, or restored and then saved as it was.
pub(crate) fn device_state(data: &[u8]) {
    let Ok(state) = serde_json::from_slice::<DeviceState>(data) else {
        return;
    };
    let mem = TestMemory::new(0x1_0000);
    let devices: [Box<dyn VirtioDevice<Space>>; 6] = [
        Box::new(Balloon::new(
            0x1_0000,
            Arc::new(MemoryRelease::new(
                mem.space(),
                BackingSwitch::new(Backing::Private),
            )),
        )),
        Box::new(make_block(&memory_file(), Access::ReadWrite)),
        Box::new(Console::new(Arc::default()).expect("a console")),
        Box::new(crate::net::device().0),
        Box::new(Rng::new(Arc::new(Zeroes))),
        Box::new(make_vsock(&Peers::default()).0),
    ];
    for mut device in devices {
        if device.restore(&state).is_ok() {
            assert_eq!(device.save(), state);
        }
    }
}

/// A disk that may be written: it keeps its size.
pub(crate) fn block(data: &[u8]) {
    let file = memory_file();
    file.write_all_at(&[7; DISK_BYTES], 0)
        .expect("fill the disk");
    Guest::new(data, |_| Box::new(make_block(&file, Access::ReadWrite))).run(|_| {});
    assert_eq!(file.metadata().expect("disk").len(), DISK_BYTES as u64);
}

/// A disk that may not be written: it keeps its content.
pub(crate) fn block_read_only(data: &[u8]) {
    let file = memory_file();
    file.write_all_at(&[7; DISK_BYTES], 0)
        .expect("fill the disk");
    Guest::new(data, |_| Box::new(make_block(&file, Access::ReadOnly))).run(|_| {});
    let mut content = vec![0; DISK_BYTES];
    file.read_exact_at(&mut content, 0).expect("read the disk");
    assert!(
        content.iter().all(|byte| *byte == 7),
        "a read-only disk has changed"
    );
}

/// Output of any shape: memory and file stay within their caps.
pub(crate) fn console(data: &[u8]) {
    let file = memory_file();
    let log_file = LogFile::new(file.try_clone().expect("descriptor"), LOG_BYTES);
    let log = Arc::new(ConsoleLog::new(Some(log_file)));
    let console = Console::new(Arc::clone(&log)).expect("a console");
    let keyboard = console.input();
    Guest::new(data, |_| Box::new(console)).run(|input| {
        if input.u8() % 8 == 0 {
            let len = usize::from(input.u8());
            keyboard.send(input.bytes(len));
        }
    });
    assert!(log.tail().len() <= TAIL_BYTES);
    assert!(
        file.metadata().expect("log").len() <= LOG_BYTES + 64,
        "the cap and a note"
    );
}

/// Requests for random numbers of any shape.
pub(crate) fn rng(data: &[u8]) {
    Guest::new(data, |_| Box::new(Rng::new(Arc::new(Zeroes)))).run(|_| {});
}

/// Pages of any number: what the guest says it gave up stays within its memory.
pub(crate) fn balloon(data: &[u8]) {
    let memory = 1 << 20;
    let mut handle = None;
    let guest = Guest::new(data, |mem| {
        let balloon = Balloon::new(
            memory,
            Arc::new(MemoryRelease::new(
                mem.space(),
                BackingSwitch::new(Backing::Private),
            )),
        );
        handle = Some(balloon.handle());
        Box::new(balloon)
    });
    let handle = handle.expect("a handle");
    guest.run(|input| {
        if input.u8() % 8 == 0 {
            handle.set_target(input.u64());
        }
        assert!(handle.actual() <= memory && handle.target() <= memory);
    });
}

/// Packets of any shape, with a host that connects, sends, reads and hangs up.
pub(crate) fn vsock(data: &[u8]) {
    let peers = Peers::default();
    let (vsock, address) = make_vsock(&peers);
    Guest::new(data, |_| Box::new(vsock)).run(|input| {
        let mut streams = peers.lock().expect("peers");
        match input.u8() % 8 {
            0 if streams.len() < MAX_PEERS => {
                if let Ok(stream) = UnixStream::connect_addr(&address) {
                    stream.set_nonblocking(true).expect("nonblocking");
                    let _ = (&stream).write(b"CONNECT 7\n");
                    streams.push_back(stream);
                }
            }
            1 => {
                if let Some(stream) = streams.front() {
                    let len = usize::from(input.u8());
                    let _ = (&*stream).write(input.bytes(len));
                }
            }
            2 => {
                if let Some(stream) = streams.front() {
                    let _ = (&*stream).read(&mut [0; 1024]);
                }
            }
            3 => drop(streams.pop_front()),
            4 => {
                let first = streams.pop_front();
                streams.extend(first);
            }
            _ => {}
        }
    });
}

fn memory_file() -> File {
    let fd: OwnedFd = memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd");
    File::from(fd)
}

fn make_block(file: &File, access: Access) -> Block {
    let disk = Arc::new(FileDisk::new(file.try_clone().expect("descriptor")));
    Block::new(BlockOptions {
        disk,
        access,
        serial: "fuzz".to_owned(),
        queues: 2,
        limiter: Default::default(),
    })
    .expect("a block device")
}

struct Zeroes;

impl EntropySource for Zeroes {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        to.fill(0);
        Ok(())
    }
}

/// The host's ends of the guest's connections, oldest first.
type Peers = Arc<Mutex<VecDeque<UnixStream>>>;

/// Most of them.
const MAX_PEERS: usize = 8;

struct Accept(Peers);

impl HostPorts for Accept {
    fn open(&mut self, _port: VsockPort) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let mut streams = self.0.lock().expect("peers");
        if streams.len() >= MAX_PEERS {
            streams.pop_front();
        }
        streams.push_back(theirs);
        Ok(ours)
    }
}

/// A vsock device whose clock stands still, so that a run depends on its bytes alone; and where it listens.
fn make_vsock(peers: &Peers) -> (Vsock, SocketAddr) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "coffer-fuzz-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let address = SocketAddr::from_abstract_name(name).expect("an abstract address");
    let options = VsockOptions {
        guest_cid: GuestCid::new(3).expect("a CID"),
        listener: UnixListener::bind_addr(&address).expect("a listener"),
        host_ports: BTreeSet::from([VsockPort(1024)]),
        ports: Box::new(Accept(Arc::clone(peers))),
    };
    let start = Instant::now();
    let vsock = Vsock::with_clock(options, Arc::new(move || start)).expect("a vsock device");
    (vsock, address)
}
