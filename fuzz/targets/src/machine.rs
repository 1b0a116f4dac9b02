// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The VMM's own parsers and its register files.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_device::console::{Console, ConsoleLog};
use virtio_device::rng::{EntropySource, Rng};
use virtio_device::{Event, QueueState, VirtioDevice, Worker};
use virtio_testdriver::TestMemory;
use virtio_wire::DeviceStatus;
use vmm::boot::elf;
use vmm::control::{parse_call, parse_message};
use vmm::devices::{Bus, Doorbells, Memory, Signals, Transport, TransportParts, WorkerHost};
use vmm::layout;
use vmm_sys_util::eventfd::EventFd;

use crate::Input;

/// Bytes of guest memory: small, so that random addresses are often inside.
const MEMORY_BYTES: usize = 1 << 16;

/// Control messages of both directions: what parses survives being written and parsed again.
pub(crate) fn control_message(data: &[u8]) {
    if let Ok(call) = parse_call(data) {
        let again = serde_json::to_vec(&call).expect("a call can be written");
        assert_eq!(parse_call(&again).expect("and read again"), call);
    }
    if let Ok(message) = parse_message(data) {
        let again = serde_json::to_vec(&message).expect("a message can be written");
        assert_eq!(parse_message(&again).expect("and read again"), message);
    }
}

/// The parts of a kernel file.
pub(crate) fn kernel(data: &[u8]) {
    if let Some(header) = data.first_chunk() {
        let _ = elf::parse_header(header);
    }
    let _ = elf::parse_program_header(data);
    let _ = elf::find_pvh_entry(data);
}

/// Any sequence of register accesses, with the workers running between two of them.
pub(crate) fn registers(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = TestMemory::new(MEMORY_BYTES);
    let host = Arc::new(InlineHost::default());
    let bus = Bus::new(3); // the last window stays empty
    let log = Arc::new(ConsoleLog::new(None));
    let console = Console::new(log).expect("an event descriptor");
    insert(
        &bus,
        0,
        Box::new(Rng::new(Arc::new(Sevens))),
        &memory,
        &host,
    );
    insert(&bus, 1, Box::new(console), &memory, &host);
    while !input.is_empty() {
        let action = input.u8();
        let index = u16::from(action & 3);
        let address = layout::window(index) + u64::from(input.u16() % 0x180);
        let len = usize::from(action >> 2 & 7) + 1;
        let mut bytes = input.bytes(len).to_vec();
        if action & 0x80 == 0 {
            bus.write(address, &bytes);
        } else {
            bus.read(address, &mut bytes);
        }
        host.run();
        for window in 0..2 {
            let transport = bus.window(window).expect("it exists");
            let status = transport.as_ref().expect("it has a device").status();
            let live = status.contains(DeviceStatus::DRIVER_OK);
            assert!(!live || status.contains(DeviceStatus::FEATURES_OK));
        }
    }
}

fn insert(
    bus: &Bus,
    index: u16,
    device: Box<dyn VirtioDevice<Memory>>,
    memory: &TestMemory,
    host: &Arc<InlineHost>,
) {
    let event = || Arc::new(EventFd::new(nix::libc::EFD_NONBLOCK).expect("an event descriptor"));
    let kicks = device.queue_sizes().iter().map(|_| event()).collect();
    let transport = Transport::new(TransportParts {
        device,
        index,
        memory: memory.space().into(),
        signals: Arc::new(Signals::new(event())),
        kicks,
        host: Arc::clone(host) as Arc<dyn WorkerHost>,
        doorbells: Arc::new(NoDoorbells),
    });
    *bus.window(index).expect("it exists") = Some(transport);
}

struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn connect(&self, _index: u16, _queue: u16, _kick: &EventFd) -> bool {
        false
    }

    fn disconnect(&self, _index: u16, _queue: u16, _kick: &EventFd) {}
}

struct Sevens;

impl EntropySource for Sevens {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        to.fill(7);
        Ok(())
    }
}

/// Runs workers when told, on the calling thread.
#[derive(Default)]
struct InlineHost {
    jobs: Mutex<Vec<Job>>,
}

struct Job {
    index: u16,
    worker: Box<dyn Worker>,
    signals: Arc<Signals>,
}

impl InlineHost {
    fn run(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain_mut(|job| {
            for queue in job.worker.queues().to_vec() {
                if let Err(error) = job.worker.handle(Event::Queue(queue)) {
                    job.signals.fail(&error);
                    return false;
                }
            }
            true
        });
    }
}

impl WorkerHost for InlineHost {
    fn start(
        &self,
        index: u16,
        workers: Vec<Box<dyn Worker>>,
        _kicks: Vec<Arc<EventFd>>,
        signals: Arc<Signals>,
    ) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.extend(workers.into_iter().map(|worker| Job {
            index,
            worker,
            signals: Arc::clone(&signals),
        }));
    }

    fn stop(&self, index: u16) -> Vec<(u16, QueueState)> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut positions = Vec::new();
        jobs.retain_mut(|job| {
            let keep = job.index != index;
            if !keep {
                positions.extend(job.worker.pause());
            }
            keep
        });
        positions
    }
}
