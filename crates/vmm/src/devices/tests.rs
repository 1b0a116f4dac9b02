// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Register files with a real device and a real I/O thread, driven as a guest does; no KVM.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_device::rng::{EntropySource, Rng};
use virtio_testdriver::{ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::{DeviceStatus, Features};
use vmm_sys_util::eventfd::EventFd;

use super::registers::*;
use super::*;
use crate::layout;

/// Bytes of 7.
struct Sevens;

impl EntropySource for Sevens {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        to.fill(7);
        Ok(())
    }
}

/// Remembers which doorbells there are.
#[derive(Default)]
struct Doors(Mutex<BTreeSet<(u16, u16)>>);

impl Doorbells for Doors {
    fn connect(&self, index: u16, queue: u16, _kick: &EventFd) -> bool {
        assert!(
            self.0.lock().unwrap().insert((index, queue)),
            "connected twice"
        );
        true
    }

    fn disconnect(&self, index: u16, queue: u16, _kick: &EventFd) {
        assert!(
            self.0.lock().unwrap().remove(&(index, queue)),
            "not connected"
        );
    }
}

/// One entropy device in window 0, and its driver.
struct Rig {
    bus: Bus,
    mem: TestMemory,
    driver: TestDriver,
    /// Blocks until the device interrupts.
    line: Arc<EventFd>,
    io: Arc<IoThread>,
    doors: Arc<Doors>,
}

impl Rig {
    fn new() -> Self {
        let mut mem = TestMemory::new(1 << 20);
        let driver = TestDriver::new(&mut mem, 16);
        let io = Arc::new(IoThread::start("io", || Ok(())).unwrap());
        let line = Arc::new(EventFd::new(0).unwrap());
        let rig = Self {
            bus: Bus::new(1),
            mem,
            driver,
            line,
            io,
            doors: Arc::default(),
        };
        rig.insert();
        rig
    }

    /// A new device in the window.
    fn insert(&self) {
        let transport = Transport::new(TransportParts {
            device: Box::new(Rng::new(Arc::new(Sevens))),
            index: 0,
            memory: self.mem.space().into(),
            signals: Arc::new(Signals::new(Arc::clone(&self.line))),
            kicks: vec![Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())],
            host: Arc::clone(&self.io) as Arc<dyn WorkerHost>,
            doorbells: Arc::clone(&self.doors) as Arc<dyn Doorbells>,
        });
        *self.bus.window(0).unwrap() = Some(transport);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(layout::window(0) + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.bus
            .write(layout::window(0) + offset, &value.to_le_bytes());
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus(self.read(STATUS))
    }

    fn add_status(&self, bits: DeviceStatus) {
        self.write(STATUS, (self.status() | bits).0);
    }

    fn accept(&self, features: Features) {
        for page in 0..2 {
            self.write(DRIVER_FEATURES_SEL, page);
            self.write(DRIVER_FEATURES, features.page(page));
        }
        self.add_status(DeviceStatus::FEATURES_OK);
    }

    fn set_address(&self, low: u64, address: u64) {
        self.write(low, u32::try_from(address & 0xffff_ffff).unwrap());
        self.write(low + 4, u32::try_from(address >> 32).unwrap());
    }

    fn set_up_queue(&self, desc_table: u64) {
        let rings = self.driver.rings();
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_SIZE, u32::from(rings.size));
        self.set_address(QUEUE_DESC_LOW, desc_table);
        self.set_address(QUEUE_DRIVER_LOW, rings.avail_ring);
        self.set_address(QUEUE_DEVICE_LOW, rings.used_ring);
        self.write(QUEUE_READY, 1);
    }

    /// As a driver begins (virtio v1.3 §3.1.1).
    fn start(&self) {
        self.write(STATUS, 0);
        self.add_status(DeviceStatus::ACKNOWLEDGE);
        self.add_status(DeviceStatus::DRIVER);
        self.accept(Features::VERSION_1);
        self.set_up_queue(self.driver.rings().desc_table);
        self.add_status(DeviceStatus::DRIVER_OK);
    }

    /// Asks for `len` random bytes, and waits for them.
    fn request(&mut self, len: usize) -> Vec<u8> {
        let chain = ChainBuilder::new().writable(&mut self.mem, len);
        let address = chain.buffers()[0].addr;
        self.driver.add(&mut self.mem, &chain);
        self.write(QUEUE_NOTIFY, 0);
        self.line.read().unwrap();
        assert_eq!(self.read(INTERRUPT_STATUS), 1);
        self.write(INTERRUPT_ACK, 1);
        assert_eq!(self.read(INTERRUPT_STATUS), 0);
        let used = self.driver.pop_used().unwrap();
        assert_eq!(used.written as usize, len);
        self.mem.read(address, len)
    }
}

#[test]
fn driver_that_follows_the_rules_gets_its_bytes() {
    let mut rig = Rig::new();
    assert_eq!((rig.read(MAGIC_VALUE), rig.read(VERSION)), (0x7472_6976, 2));
    assert_eq!(rig.read(DEVICE_ID), 4);
    rig.start();
    assert_eq!(rig.status(), DeviceStatus(15));
    assert_eq!(rig.request(32), [7; 32]);
    assert_eq!(rig.request(1), [7; 1]);
}

#[test]
fn features_not_offered_or_without_version_1_are_not_ok() {
    // §3.1.1 step 6: the driver reads back whether FEATURES_OK stays.
    let rig = Rig::new();
    for features in [
        Features::NONE,
        Features::RING_EVENT_IDX,
        Features::VERSION_1 | Features::bit(40),
    ] {
        rig.write(STATUS, 0);
        rig.add_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        rig.accept(features);
        assert!(!rig.status().contains(DeviceStatus::FEATURES_OK));
        rig.add_status(DeviceStatus::DRIVER_OK);
        assert!(!rig.status().contains(DeviceStatus::DRIVER_OK));
    }
}

#[test]
fn offered_features_come_in_two_pages() {
    let rig = Rig::new();
    rig.write(DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.read(DEVICE_FEATURES) & 1, 1, "VERSION_1");
    rig.write(DEVICE_FEATURES_SEL, 2);
    assert_eq!(rig.read(DEVICE_FEATURES), 0);
}

#[test]
fn queue_registers_are_closed_outside_their_time() {
    let rig = Rig::new();
    rig.write(QUEUE_READY, 1);
    assert_eq!(rig.read(QUEUE_READY), 0, "before FEATURES_OK");
    rig.start();
    rig.write(QUEUE_READY, 0);
    assert_eq!(rig.read(QUEUE_READY), 1, "after DRIVER_OK");
    rig.write(QUEUE_SEL, 1);
    assert_eq!((rig.read(QUEUE_SIZE_MAX), rig.read(QUEUE_READY)), (0, 0));
}

#[test]
fn reset_stops_the_worker_and_a_second_start_works() {
    let mut rig = Rig::new();
    rig.start();
    rig.request(8);
    rig.write(STATUS, 0);
    assert_eq!(rig.status(), DeviceStatus::RESET);
    assert_eq!(rig.read(QUEUE_READY), 0);
    rig.driver = TestDriver::new(&mut rig.mem, 16);
    rig.start();
    assert_eq!(rig.request(8), [7; 8]);
}

#[test]
fn doorbells_are_there_while_the_device_is_live() {
    let rig = Rig::new();
    let count = || rig.doors.0.lock().unwrap().len();
    assert_eq!(count(), 0);
    rig.start();
    assert_eq!(count(), 1);
    {
        let mut window = rig.bus.window(0).unwrap();
        let transport = window.as_mut().unwrap();
        transport.pause();
        transport.resume();
    }
    assert_eq!(count(), 1);
    rig.write(STATUS, 0);
    assert_eq!(count(), 0);
    rig.start();
    drop(rig.bus.window(0).unwrap().take());
    assert_eq!(count(), 0);
}

#[test]
fn hostile_chain_needs_a_reset_which_cures() {
    let mut rig = Rig::new();
    rig.start();
    let outside = ChainBuilder::new().raw(1 << 40, 8, DESC_WRITE);
    rig.driver.add(&mut rig.mem, &outside);
    rig.write(QUEUE_NOTIFY, 0);
    rig.line.read().unwrap();
    assert!(rig.status().contains(DeviceStatus::NEEDS_RESET));
    assert_eq!(
        rig.read(INTERRUPT_STATUS) & 2,
        2,
        "§2.1.2: a configuration change tells"
    );
    let error = rig.bus.window(0).unwrap().as_ref().unwrap().last_error();
    assert!(error.unwrap().contains("outside guest memory"));
    rig.driver = TestDriver::new(&mut rig.mem, 16);
    rig.start();
    assert_eq!(rig.status(), DeviceStatus(15));
    assert_eq!(rig.request(8), [7; 8]);
}

#[test]
fn queue_outside_memory_needs_a_reset() {
    let rig = Rig::new();
    rig.add_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    rig.accept(Features::VERSION_1);
    rig.set_up_queue(!15);
    rig.add_status(DeviceStatus::DRIVER_OK);
    assert!(rig.status().contains(DeviceStatus::NEEDS_RESET));
}

#[test]
fn registers_are_only_accessible_in_words() {
    let rig = Rig::new();
    for len in [1, 2, 8] {
        let mut data = vec![0xee; len];
        rig.bus.read(layout::window(0), &mut data);
        assert_eq!(data, vec![0; len]);
        let mut ones = vec![0; len];
        ones[0] = 1;
        rig.bus.write(layout::window(0) + STATUS, &ones);
        assert_eq!(rig.status(), DeviceStatus::RESET);
    }
    let mut misaligned = [0xee; 4];
    rig.bus.read(layout::window(0) + 2, &mut misaligned);
    assert_eq!(misaligned, [0; 4]);
}

#[test]
fn shared_memory_there_is_none() {
    let rig = Rig::new();
    assert_eq!(rig.read(SHM_LEN_LOW), u32::MAX); // §4.2.2.2
    assert_eq!(rig.read(SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn saved_device_carries_on_in_another_vm() {
    let mut rig = Rig::new();
    rig.start();
    rig.request(8);
    let state = {
        let mut window = rig.bus.window(0).unwrap();
        let transport = window.as_mut().unwrap();
        transport.pause();
        transport.save()
    };
    let encoded = serde_json::to_vec(&state).unwrap();
    // A request that comes while the device is paused must not be lost.
    let chain = ChainBuilder::new().writable(&mut rig.mem, 5);
    rig.driver.add(&mut rig.mem, &chain);
    rig.insert();
    {
        let mut window = rig.bus.window(0).unwrap();
        let transport = window.as_mut().unwrap();
        transport
            .restore(&serde_json::from_slice(&encoded).unwrap())
            .unwrap();
        assert_eq!(transport.save(), state, "save, restore, save");
        transport.resume();
    }
    rig.line.read().unwrap();
    assert_eq!(rig.driver.pop_used().unwrap().written, 5);
    rig.write(INTERRUPT_ACK, 3);
    assert_eq!(rig.request(8), [7; 8]);
}

#[test]
fn state_with_unknown_features_or_queues_is_refused() {
    let rig = Rig::new();
    rig.start();
    let mut window = rig.bus.window(0).unwrap();
    let transport = window.as_mut().unwrap();
    transport.pause();
    let text = serde_json::to_string(&transport.save()).unwrap();
    let foreign = text.replace(
        "\"driver_features\":4294967296",
        "\"driver_features\":1099511627776",
    );
    assert_ne!(foreign, text);
    let foreign = serde_json::from_str(&foreign).unwrap();
    assert!(transport.restore(&foreign).is_err());
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics_or_breaks_the_order_of_states(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..0x110, prop::sample::select(vec![1usize, 2, 4, 4, 4, 8]), any::<u64>()),
            0..60,
        ),
    ) {
        let rig = Rig::new();
        for (is_write, offset, len, value) in accesses {
            let address = layout::window(0) + (offset & !3);
            let mut data = value.to_le_bytes()[..len].to_vec();
            if is_write {
                rig.bus.write(address, &data);
            } else {
                rig.bus.read(address, &mut data);
            }
            let status = rig.status();
            if status.contains(DeviceStatus::DRIVER_OK) {
                prop_assert!(status.contains(DeviceStatus::FEATURES_OK));
            }
        }
    }
}
