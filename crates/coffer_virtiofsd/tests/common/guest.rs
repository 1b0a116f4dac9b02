// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A guest of a file server without a VM: the real device and the real server, the driver's side of the queues in a
//! memfd, and as much of FUSE as tests speak.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test support that panics on misuse"
)]

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_device::fs::{Fs, FsOptions};
use virtio_device::{
    Activation, DeviceError, Event, Interrupt, Progress, QueueState, VirtioDevice, Worker,
};
use virtio_testdriver::{ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::fs::{HIGH_PRIORITY_QUEUE, REQUEST_QUEUE};
use virtio_wire::vhost_user::Region;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

const MEMORY_BYTES: usize = 16 << 20;
const QUEUE_SIZE: u16 = 64;
const OUT_HEADER_BYTES: usize = 16;
/// A generous end of every wait.
const DEADLINE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// FUSE opcodes (Linux `include/uapi/linux/fuse.h`).
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const CREATE: u32 = 35;
}

/// The inode of the file system's root.
pub(crate) const ROOT: u64 = 1;

#[derive(Default)]
struct Interrupts(AtomicU64);

impl Interrupt for Interrupts {
    fn signal_used_queue(&self, _index: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config_change(&self) {}
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) losses: Arc<Mutex<Vec<String>>>,
    device: Fs,
    worker: Option<Box<dyn Worker>>,
    mem: TestMemory,
    driver: TestDriver,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<QueueState>,
    interrupts: Arc<Interrupts>,
    unique: u64,
    /// Who makes requests.
    pub(crate) user: (u32, u32),
}

/// What came back: the error, positive and as the guest's `errno`, or the payload.
pub(crate) type Answer = Result<Vec<u8>, i32>;

impl Guest {
    /// A guest whose driver has set the device up.
    pub(crate) fn boot(connection: UnixStream) -> Self {
        let memfd = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memfd.set_len(MEMORY_BYTES as u64).unwrap();
        let mut mem = TestMemory::shared(memfd.try_clone().unwrap(), MEMORY_BYTES);
        let kicks: Vec<_> = (0..2)
            .map(|_| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
            .collect();
        let losses = Arc::new(Mutex::new(Vec::new()));
        let device = Fs::new(FsOptions {
            tag: "volumes".to_owned(),
            connection,
            memory: Arc::new(memfd),
            regions: vec![Region {
                address: 0,
                len: MEMORY_BYTES as u64,
                offset: 0,
            }],
            kicks: kicks.clone(),
            on_loss: Box::new({
                let losses = Arc::clone(&losses);
                move |text| losses.lock().unwrap().push(text)
            }),
        })
        .unwrap();
        let high = TestDriver::new(&mut mem, QUEUE_SIZE);
        let driver = TestDriver::new(&mut mem, QUEUE_SIZE);
        let state = |driver: &TestDriver| {
            let rings = driver.rings();
            QueueState {
                size: rings.size,
                ready: true,
                desc_table: rings.desc_table,
                avail_ring: rings.avail_ring,
                used_ring: rings.used_ring,
                ..QueueState::default()
            }
        };
        let mut guest = Self {
            losses,
            device,
            worker: None,
            queues: vec![state(&high), state(&driver)],
            mem,
            driver,
            kicks,
            interrupts: Arc::default(),
            unique: 0,
            user: (0, 0),
        };
        guest.resume().unwrap();
        guest
    }

    /// Gives the queues to the server, as at DRIVER_OK and after a pause.
    pub(crate) fn resume(&mut self) -> Result<(), DeviceError> {
        let activation: Activation<Arc<GuestMemoryMmap>> = Activation {
            memory: self.mem.space(),
            queues: self.queues.clone(),
            features: Features::VERSION_1,
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
        };
        let mut worker = self.device.activate(activation)?.remove(0);
        worker.start()?;
        self.worker = Some(worker);
        Ok(())
    }

    /// Takes the queues back and drops the worker.
    pub(crate) fn pause(&mut self) {
        for (index, state) in self.worker.take().unwrap().pause() {
            self.queues[usize::from(index)] = state;
        }
    }

    pub(crate) fn position(&self) -> u16 {
        self.queues[usize::from(REQUEST_QUEUE)].next_avail
    }

    /// Makes a request available and kicks, without waiting for its answer.
    pub(crate) fn send(&mut self, opcode: u32, node: u64, payload: &[u8]) -> u64 {
        self.unique += 1;
        let mut request = Vec::new();
        let words = |request: &mut Vec<u8>, words: &[u32]| {
            words
                .iter()
                .for_each(|word| request.extend(word.to_le_bytes()));
        };
        words(&mut request, &[40 + payload.len() as u32, opcode]);
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        words(&mut request, &[self.user.0, self.user.1, 1, 0]);
        request.extend(payload);
        let writable = self.mem.alloc(8192, 16);
        let chain = ChainBuilder::new()
            .readable(&mut self.mem, &request)
            .raw(writable, 8192, DESC_WRITE);
        self.driver.add(&mut self.mem, &chain);
        self.kicks[usize::from(REQUEST_QUEUE)].write(1).unwrap();
        writable
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn call(&mut self, opcode: u32, node: u64, payload: &[u8]) -> Answer {
        let writable = self.send(opcode, node, payload);
        let written = loop {
            if let Some(used) = self.driver.pop_used() {
                break used.written as usize;
            }
            self.wait().unwrap();
        };
        let answer = self.mem.read(writable, written);
        assert_eq!(
            answer[8..16],
            self.unique.to_le_bytes(),
            "another request's"
        );
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[OUT_HEADER_BYTES..].to_vec()),
            error => Err(-error),
        }
    }

    /// Waits for one event of the worker and lets it handle it.
    pub(crate) fn wait(&mut self) -> Result<(), DeviceError> {
        let worker = self.worker.as_mut().unwrap();
        let ready: Vec<u32> = {
            let sources = worker.sources();
            let mut fds: Vec<_> = sources
                .iter()
                .map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
                .collect();
            assert_ne!(poll(&mut fds, Some(&DEADLINE)).unwrap(), 0, "no answer");
            let tokens = sources.iter().zip(&fds);
            tokens
                .filter(|(_, fd)| !fd.revents().is_empty())
                .map(|((token, _), _)| *token)
                .collect()
        };
        for token in ready {
            assert_eq!(worker.handle(Event::Source(token))?, Progress::Idle);
        }
        Ok(())
    }

    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupts.0.load(Ordering::SeqCst)
    }

    pub(crate) fn init(&mut self) {
        let mut payload = vec![0; 64];
        payload[0] = 7;
        payload[4] = 38;
        let answer = self.call(opcode::INIT, 0, &payload).unwrap();
        assert_eq!(answer[0..4], [7, 0, 0, 0], "the protocol's major version");
    }

    /// The inode of `name` below `parent`.
    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let answer = self.call(opcode::LOOKUP, parent, &c_string(name))?;
        Ok(u64::from_le_bytes(answer[..8].try_into().unwrap()))
    }

    pub(crate) fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        let mut payload = flags.to_le_bytes().to_vec();
        payload.extend([0; 4]);
        let answer = self.call(opcode::OPEN, node, &payload)?;
        Ok(u64::from_le_bytes(answer[..8].try_into().unwrap()))
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64, size: u32) -> Answer {
        self.call(opcode::READ, node, &transfer(handle, size, &[]))
    }

    pub(crate) fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Answer {
        let payload = transfer(handle, data.len() as u32, data);
        self.call(opcode::WRITE, node, &payload)
    }

    /// Makes a file and opens it for writing; its inode and handle.
    pub(crate) fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = libc::O_WRONLY | libc::O_CREAT;
        let mut payload = Vec::new();
        for word in [flags.cast_unsigned(), mode, 0, 0] {
            payload.extend(word.to_le_bytes());
        }
        payload.extend(c_string(name));
        let answer = self.call(opcode::CREATE, parent, &payload)?;
        let number = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
        Ok((number(0), number(128)))
    }

    pub(crate) fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Answer {
        let mut payload = Vec::new();
        for word in [mode, device, 0, 0] {
            payload.extend(word.to_le_bytes());
        }
        payload.extend(c_string(name));
        self.call(opcode::MKNOD, parent, &payload)
    }

    /// Puts whatever it says into the available ring of the high-priority queue and kicks.
    pub(crate) fn break_ring(&mut self) {
        let rings = &self.queues[usize::from(HIGH_PRIORITY_QUEUE)];
        self.mem
            .write(rings.avail_ring + 2, &0x7fffu16.to_le_bytes());
        self.kicks[usize::from(HIGH_PRIORITY_QUEUE)]
            .write(1)
            .unwrap();
    }
}

/// `fuse_read_in` or `fuse_write_in`, which are alike, at offset 0.
fn transfer(handle: u64, size: u32, data: &[u8]) -> Vec<u8> {
    let mut payload = handle.to_le_bytes().to_vec();
    payload.extend(0u64.to_le_bytes());
    payload.extend(size.to_le_bytes());
    payload.extend([0; 20]);
    payload.extend(data);
    payload
}

pub(crate) fn c_string(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}
