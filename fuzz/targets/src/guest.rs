// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A guest that does to a device whatever the bytes say, and a transport that treats it by the rules.

use std::sync::Arc;

use virtio_device::{
    Activation, DeviceError, Event, Interrupt, Progress, QueueState, VirtioDevice, Worker,
};
use virtio_testdriver::{DESC_INDIRECT, TestDriver, TestMemory};
use virtio_wire::Features;
use vm_memory::GuestMemoryMmap;

use crate::Input;

/// Guest memory of a target.
pub(crate) type Space = Arc<GuestMemoryMmap>;

/// Bytes of guest memory.
const MEMORY: u64 = 1 << 20;
/// Where the guest's buffers are, past all rings.
const BUFFERS: u64 = 0x8_0000;
/// Entries of each queue: small, so that indexes wrap.
const QUEUE_SIZE: u16 = 16;
/// Actions of one run.
const MAX_ACTIONS: usize = 200;
/// Calls within which a worker must become idle when the guest stands still.
const MAX_WAKES: usize = 4096;

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_used_queue(&self, _index: u16) {}
    fn signal_config_change(&self) {}
}

/// A guest, its one device, and the transport between them.
pub struct Guest<'a> {
    /// The bytes that decide.
    pub input: Input<'a>,
    /// Its memory.
    pub mem: TestMemory,
    device: Box<dyn VirtioDevice<Space>>,
    workers: Vec<Box<dyn Worker>>,
    drivers: Vec<TestDriver>,
}

impl<'a> Guest<'a> {
    /// A guest with `device`, which may be made from its memory.
    pub(crate) fn new(
        data: &'a [u8],
        device: impl FnOnce(&TestMemory) -> Box<dyn VirtioDevice<Space>>,
    ) -> Self {
        let mut mem = TestMemory::new(usize::try_from(MEMORY).unwrap_or(0));
        let device = device(&mem);
        let count = device.queue_sizes().len();
        let drivers = (0..count)
            .map(|_| TestDriver::new(&mut mem, QUEUE_SIZE))
            .collect();
        Self {
            input: Input::new(data),
            mem,
            device,
            workers: Vec::new(),
            drivers,
        }
    }

    /// Does what the bytes say until they end; `outside` is what else may happen, asked between two actions.
    pub fn run(mut self, mut outside: impl FnMut(&mut Input<'a>)) {
        self.activate();
        for _ in 0..MAX_ACTIONS {
            if self.input.is_empty() {
                break;
            }
            self.act();
            outside(&mut self.input);
        }
        self.kick_all();
    }

    fn act(&mut self) {
        match self.input.u8() % 10 {
            0..=3 => self.offer_chain(),
            4 => {
                let addr = self.address();
                let len = usize::from(self.input.u8());
                self.write(addr, len);
            }
            5 => {
                let (offset, value) = (self.input.u8(), self.input.u32().to_le_bytes());
                let len = usize::from(self.input.u8() % 5);
                let data = value.get(..len).unwrap_or(&value);
                self.device.write_config(u64::from(offset), data);
                let mut back = [0; 16];
                self.device.read_config(u64::from(offset), &mut back);
            }
            6 => {
                let index = self.input.u16();
                self.with_driver(|driver| driver.set_avail_index(index));
            }
            7 => self.kick_all(),
            8 => self.save_and_restore(),
            _ => self.reset(),
        }
    }

    fn address(&mut self) -> u64 {
        match self.input.u8() {
            255 => self.input.u64(),
            254 => MEMORY.wrapping_sub(u64::from(self.input.u8() % 64)),
            253 => u64::from(self.input.u16()), // the rings
            slot => BUFFERS + u64::from(slot) * 0x400,
        }
    }

    /// Writes input bytes into guest memory, if the place is there.
    fn write(&mut self, addr: u64, len: usize) {
        let bytes = self.input.bytes(len);
        if addr
            .checked_add(bytes.len() as u64)
            .is_some_and(|end| end <= MEMORY)
        {
            self.mem.write(addr, bytes);
        }
    }

    /// Descriptors in a row, with content, made available; then perhaps a kick.
    fn offer_chain(&mut self) {
        let shape = self.input.u8();
        let (start, count) = (u16::from(shape % 16), u16::from(shape / 16 % 8) + 1);
        for i in 0..count {
            let addr = self.address();
            let kind = self.input.u8();
            let len = match kind >> 4 {
                15 => self.input.u32(),
                14 => u32::from(self.input.u16()),
                13 => 512,
                _ => u32::from(self.input.u8() % 64),
            };
            if kind & 8 != 0 {
                self.write(addr, usize::try_from(len.min(64)).unwrap_or(0));
            }
            let more = u16::from(i + 1 < count); // NEXT is bit 0
            let flags = u16::from(kind & 2) | more | if kind & 7 == 5 { DESC_INDIRECT } else { 0 };
            let index = (start + i) % QUEUE_SIZE;
            let next = if kind & 7 == 7 {
                self.input.u16()
            } else {
                (index + 1) % QUEUE_SIZE
            };
            self.with_driver(|driver| driver.write_descriptor(index, addr, len, flags, next));
        }
        self.with_driver(|driver| driver.publish(start));
        if shape & 0x80 != 0 {
            self.kick_all();
        }
    }

    /// Runs `f` on the driver of the queue that the next byte says.
    fn with_driver(&mut self, f: impl FnOnce(&mut TestDriver)) {
        let index = usize::from(self.input.u8()) % self.drivers.len().max(1);
        if let Some(driver) = self.drivers.get_mut(index) {
            f(driver);
        }
    }

    /// Calls every worker for every queue and every descriptor of its own, until it is idle.
    fn kick_all(&mut self) {
        let mut broken = false;
        for worker in &mut self.workers {
            let mut events: Vec<Event> =
                worker.queues().iter().copied().map(Event::Queue).collect();
            events.extend(
                worker
                    .sources()
                    .iter()
                    .map(|(token, _)| Event::Source(*token)),
            );
            broken |= events
                .into_iter()
                .any(|event| run_until_idle(&mut **worker, event).is_err());
        }
        if broken {
            self.reset(); // what a driver does after DEVICE_NEEDS_RESET
        }
    }

    fn reset(&mut self) {
        for mut worker in self.workers.drain(..) {
            worker.pause();
        }
        self.device.reset();
        for driver in &mut self.drivers {
            driver.start_at(0);
        }
        self.activate();
    }

    fn save_and_restore(&mut self) {
        let mut queues = vec![QueueState::default(); self.drivers.len()];
        for mut worker in self.workers.drain(..) {
            for (index, state) in worker.pause() {
                if let Some(place) = queues.get_mut(usize::from(index)) {
                    *place = state;
                }
            }
        }
        let state = self.device.save();
        self.device
            .restore(&state)
            .expect("a device takes its own state");
        assert_eq!(self.device.save(), state, "a state survives restore");
        self.activate_with(queues);
    }

    /// DRIVER_OK: mostly with the queues as laid out, sometimes with one whose registers are nonsense.
    fn activate(&mut self) {
        let mut queues: Vec<QueueState> = self
            .drivers
            .iter()
            .map(|driver| {
                let rings = driver.rings();
                QueueState {
                    size: rings.size,
                    ready: true,
                    desc_table: rings.desc_table,
                    avail_ring: rings.avail_ring,
                    used_ring: rings.used_ring,
                    ..QueueState::default()
                }
            })
            .collect();
        let nonsense = usize::from(self.input.u8());
        if let Some(queue) = queues.get_mut(nonsense.wrapping_sub(0xf0)) {
            *queue = QueueState {
                size: self.input.u16(),
                ready: !self.input.u8().is_multiple_of(4),
                desc_table: self.address(),
                avail_ring: self.address(),
                used_ring: self.address(),
                next_avail: self.input.u16(),
                next_used: self.input.u16(),
            };
        }
        self.activate_with(queues);
    }

    fn activate_with(&mut self, queues: Vec<QueueState>) {
        let refused =
            Features::from_bits(u64::from(self.input.u8()) << 24 | u64::from(self.input.u8()) << 8);
        let activation = Activation {
            memory: self.mem.space(),
            queues,
            features: self.device.features().without(refused),
            interrupt: Arc::new(NoInterrupt),
        };
        // Refused registers leave the device without workers, as NEEDS_RESET does.
        self.workers = self.device.activate(activation).unwrap_or_default();
    }
}

fn run_until_idle(worker: &mut dyn Worker, event: Event) -> Result<(), DeviceError> {
    for _ in 0..MAX_WAKES {
        if worker.handle(event)? == Progress::Idle {
            return Ok(());
        }
    }
    panic!("the worker never becomes idle though the guest stands still");
}
