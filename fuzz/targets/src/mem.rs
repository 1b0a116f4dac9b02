// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The memory device: rings of any shape, and requests of any content.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use virtio_device::balloon::ReleasePages;
use virtio_device::mem::{BLOCK_BYTES, Mem, MemHandle, MemOptions, MemorySlots, SLOT_BYTES};
use virtio_device::{Activation, Event, Interrupt, Progress, QueueState, VirtioDevice, Worker};
use virtio_testdriver::{ChainBuilder, TestDriver, TestMemory};
use virtio_wire::mem::{BlockRange, MemRequest, RESPONSE_BYTES};
use vm_memory::GuestAddress;

use crate::guest::Space;
use crate::{Guest, Input};

const START: u64 = 4 << 30;
const SLOTS: u64 = 6;
/// Requests of one run.
const MAX_REQUESTS: usize = 200;

/// Slots that are only remembered: none is made twice, none taken away that is not there.
#[derive(Default)]
pub(crate) struct Host(Mutex<BTreeSet<u64>>);

impl Host {
    fn slots(&self) -> u64 {
        self.0.lock().expect("slots").len() as u64
    }
}

impl MemorySlots for Host {
    fn add(&self, addr: GuestAddress) -> io::Result<()> {
        assert!(
            (START..START + SLOTS * SLOT_BYTES).contains(&addr.0),
            "outside"
        );
        assert!(self.0.lock().expect("slots").insert(addr.0), "made twice");
        Ok(())
    }

    fn remove(&self, addr: GuestAddress) -> io::Result<()> {
        assert!(self.0.lock().expect("slots").remove(&addr.0), "not there");
        Ok(())
    }
}

impl ReleasePages for Host {
    fn release(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        let end = addr.0 + len;
        assert!(addr.0 >= START && end <= START + SLOTS * SLOT_BYTES);
        assert_eq!((addr.0 | len) % BLOCK_BYTES, 0);
        Ok(())
    }
}

/// A device whose memory is only remembered.
pub(crate) fn device(host: &Arc<Host>) -> Mem {
    Mem::new(MemOptions {
        region: START..START + SLOTS * SLOT_BYTES,
        slots: Arc::clone(host) as _,
        release: Arc::clone(host) as _,
    })
}

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_used_queue(&self, _index: u16) {}
    fn signal_config_change(&self) {}
}

/// What a guest has never exceeds what it had or was to have.
struct Bounds {
    host: Arc<Host>,
    handle: MemHandle,
    /// The most that was ever requested.
    most: u64,
}

impl Bounds {
    fn request(&mut self, bytes: u64) {
        self.handle.set_requested(bytes);
        self.most = self.most.max(self.handle.requested());
    }

    fn check(&self) {
        assert!(self.handle.plugged() <= self.most);
        assert!(self.host.slots() <= self.most.div_ceil(SLOT_BYTES));
        assert_eq!(self.handle.plugged() == 0, self.host.slots() == 0);
    }
}

/// Half of the inputs are rings, half requests.
pub(crate) fn mem(data: &[u8]) {
    let host = Arc::<Host>::default();
    let device = device(&host);
    let mut bounds = Bounds {
        handle: device.handle(),
        host,
        most: 0,
    };
    match data.split_first() {
        Some((first, rest)) if first % 2 == 0 => {
            Guest::new(rest, |_| Box::new(device)).run(|input| {
                if input.u8() % 4 == 0 {
                    bounds.request(input.u64() >> 30);
                }
                bounds.check();
            });
        }
        Some((_, rest)) => requests(rest, device, &mut bounds),
        None => {}
    }
}

fn requests(data: &[u8], mut device: Mem, bounds: &mut Bounds) {
    let mut input = Input::new(data);
    let mut memory = TestMemory::new(1 << 20);
    let mut driver = TestDriver::new(&mut memory, 16);
    let rings = driver.rings();
    let activation = Activation::<Space> {
        memory: memory.space(),
        queues: vec![QueueState {
            size: rings.size,
            ready: true,
            desc_table: rings.desc_table,
            avail_ring: rings.avail_ring,
            used_ring: rings.used_ring,
            ..QueueState::default()
        }],
        features: VirtioDevice::<Space>::features(&device),
        interrupt: Arc::new(NoInterrupt),
    };
    let mut workers = device.activate(activation).expect("sane rings");
    for _ in 0..MAX_REQUESTS {
        if input.is_empty() {
            break;
        }
        let kind = input.u8();
        let range = BlockRange {
            addr: match input.u8() {
                255 => input.u64(),
                254 => START + u64::from(input.u16()),
                _ => START + u64::from(input.u16() % 400) * BLOCK_BYTES,
            },
            blocks: u16::from(input.u8()),
        };
        let request = match kind % 8 {
            0 => {
                bounds.request(u64::from(input.u16()) << 20);
                MemRequest::State(range)
            }
            1..=3 => MemRequest::Plug(range),
            4 | 5 => MemRequest::Unplug(range),
            6 => MemRequest::UnplugAll,
            _ => MemRequest::Unknown(u16::from(kind)),
        };
        let chain = ChainBuilder::new()
            .readable(&mut memory, &request.to_bytes())
            .writable(&mut memory, RESPONSE_BYTES);
        driver.add(&mut memory, &chain);
        serve(&mut workers);
        assert!(driver.pop_used().is_some(), "every request is answered");
        bounds.check();
    }
    let state = VirtioDevice::<Space>::save(&device);
    VirtioDevice::<Space>::restore(&mut device, &state).expect("a device takes its own state");
    assert_eq!(VirtioDevice::<Space>::save(&device), state);
}

fn serve(workers: &mut [Box<dyn Worker>]) {
    for worker in workers {
        while worker.handle(Event::Queue(0)).expect("sane rings") == Progress::More {}
    }
}
