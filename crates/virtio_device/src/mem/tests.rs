// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The memory device from the driver's side.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use virtio_testdriver::{ChainBuilder, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::mem::{BlockRange, CONFIG_BYTES, MemRequest, RESPONSE_BYTES, feature};
use vm_memory::GuestAddress;

use super::*;
use crate::balloon::ReleasePages;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{DeviceError, DeviceState, VirtioDevice, Worker};

const START: u64 = 4 << 30;
const SLOTS: u64 = 4;
const ALL: Features = Features::COMMON.union(feature::UNPLUGGED_INACCESSIBLE);

const ACK: u8 = 0;
const NACK: u8 = 1;
const BUSY: u8 = 2;
const ERROR: u8 = 3;

/// Slots that are only remembered.
#[derive(Default)]
struct Host {
    slots: Mutex<BTreeSet<u64>>,
    released: Mutex<Vec<(u64, u64)>>,
    /// The host has no memory for slots from this address on.
    full_from: Mutex<Option<u64>>,
}

impl MemorySlots for Host {
    fn add(&self, addr: GuestAddress) -> io::Result<()> {
        if self
            .full_from
            .lock()
            .unwrap()
            .is_some_and(|full| addr.0 >= full)
        {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(self.slots.lock().unwrap().insert(addr.0), "made twice");
        Ok(())
    }

    fn remove(&self, addr: GuestAddress) -> io::Result<()> {
        assert!(self.slots.lock().unwrap().remove(&addr.0), "not there");
        Ok(())
    }
}

impl ReleasePages for Host {
    fn release(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        self.released.lock().unwrap().push((addr.0, len));
        Ok(())
    }
}

struct Rig {
    mem: TestMemory,
    driver: TestDriver,
    device: Mem,
    worker: Box<dyn Worker>,
    host: Arc<Host>,
    interrupt: Arc<TestInterrupt>,
}

fn device(host: &Arc<Host>) -> Mem {
    Mem::new(MemOptions {
        region: START..START + SLOTS * SLOT_BYTES + 1,
        slots: Arc::clone(host) as _,
        release: Arc::clone(host) as _,
    })
}

impl Rig {
    fn new() -> Self {
        let mut mem = TestMemory::new(1 << 20);
        let driver = TestDriver::new(&mut mem, 16);
        let host = Arc::<Host>::default();
        let mut device = device(&host);
        let interrupt = Arc::new(TestInterrupt::default());
        let worker = device
            .activate(activation(
                &mem,
                vec![queue_state(&driver)],
                ALL,
                &interrupt,
            ))
            .unwrap()
            .remove(0);
        Self {
            mem,
            driver,
            device,
            worker,
            host,
            interrupt,
        }
    }

    fn ask(&mut self, request: MemRequest) -> [u8; RESPONSE_BYTES] {
        let chain = ChainBuilder::new()
            .readable(&mut self.mem, &request.to_bytes())
            .writable(&mut self.mem, RESPONSE_BYTES);
        let answer = chain.buffers()[1].addr;
        self.driver.add(&mut self.mem, &chain);
        kick(&mut *self.worker, 0).unwrap();
        assert_eq!(self.driver.pop_used().unwrap().written, 10);
        self.mem.read(answer, RESPONSE_BYTES).try_into().unwrap()
    }

    fn plug(&mut self, block: u64, blocks: u16) -> u8 {
        self.ask(MemRequest::Plug(range(block, blocks)))[0]
    }

    fn unplug(&mut self, block: u64, blocks: u16) -> u8 {
        self.ask(MemRequest::Unplug(range(block, blocks)))[0]
    }

    fn config(&self, field: usize) -> u64 {
        let mut data = [0; CONFIG_BYTES];
        VirtioDevice::<Space>::read_config(&self.device, 0, &mut data);
        u64::from_le_bytes(data[field * 8..field * 8 + 8].try_into().unwrap())
    }

    fn slots(&self) -> usize {
        self.host.slots.lock().unwrap().len()
    }

    fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.device), name)
    }
}

fn range(block: u64, blocks: u16) -> BlockRange {
    BlockRange {
        addr: START + block * BLOCK_BYTES,
        blocks,
    }
}

#[test]
fn requested_size_reaches_the_driver_with_an_interrupt_and_is_capped() {
    let mut rig = Rig::new();
    let handle = rig.device.handle();
    handle.set_requested(3 << 20);
    assert_eq!((rig.config(6), handle.requested()), (4 << 20, 4 << 20));
    assert_eq!(rig.interrupt.config_changes(), 1);
    handle.set_requested(4 << 20);
    assert_eq!(rig.interrupt.config_changes(), 1, "nothing has changed");
    handle.set_requested(u64::MAX);
    assert_eq!(rig.config(6), SLOTS * SLOT_BYTES);
    assert_eq!(
        [rig.config(0), rig.config(2), rig.config(3), rig.config(4)],
        [2 << 20, START, SLOTS * SLOT_BYTES, SLOTS * SLOT_BYTES],
        "the region is cut to whole slots"
    );
    VirtioDevice::<Space>::reset(&mut rig.device);
    handle.set_requested(0);
    assert_eq!(rig.interrupt.config_changes(), 2);
}

#[test]
fn memory_comes_with_the_first_block_of_a_slot_and_goes_with_the_last() {
    let mut rig = Rig::new();
    let handle = rig.device.handle();
    assert_eq!(rig.plug(0, 1), NACK, "nothing is requested");
    handle.set_requested(SLOT_BYTES + BLOCK_BYTES);
    assert_eq!((rig.plug(0, 64), rig.slots()), (ACK, 1));
    assert_eq!((rig.plug(64, 1), rig.slots()), (ACK, 2));
    assert_eq!(handle.plugged(), SLOT_BYTES + BLOCK_BYTES);
    assert_eq!(rig.plug(65, 1), NACK);
    handle.set_requested(0);
    assert_eq!((rig.unplug(1, 63), rig.slots()), (ACK, 2));
    assert_eq!((rig.unplug(0, 1), rig.slots()), (ACK, 1));
    assert_eq!((rig.unplug(64, 1), rig.slots()), (ACK, 0));
    assert_eq!((handle.plugged(), rig.config(5)), (0, 0));
    let released: u64 = rig
        .host
        .released
        .lock()
        .unwrap()
        .iter()
        .map(|(_, len)| len)
        .sum();
    assert_eq!(released, SLOT_BYTES + BLOCK_BYTES);
    assert_eq!(rig.counter("unplugged_bytes"), released);
}

#[test]
fn one_block_in_every_slot_is_refused() {
    let mut rig = Rig::new();
    rig.device.handle().set_requested(4 * BLOCK_BYTES);
    assert_eq!(rig.plug(0, 1), ACK);
    for slot in 1..SLOTS {
        assert_eq!(rig.plug(slot * 64, 1), NACK);
    }
    assert_eq!((rig.slots(), rig.counter("refused")), (1, 3));
}

#[test]
fn wrong_requests_change_nothing() {
    let mut rig = Rig::new();
    rig.device.handle().set_requested(SLOTS * SLOT_BYTES);
    assert_eq!(rig.plug(1, 2), ACK);
    for (block, blocks) in [(0, 2), (2, 1), (0, 0), (256, 1), (255, u16::MAX)] {
        assert_eq!(rig.plug(block, blocks), ERROR, "{block} {blocks}");
    }
    for (block, blocks) in [(0, 1), (0, 3), (3, 1), (1, 0), (u64::MAX >> 22, 1)] {
        assert_eq!(rig.unplug(block, blocks), ERROR, "{block} {blocks}");
    }
    assert_eq!(rig.ask(MemRequest::Unknown(77))[0], ERROR);
    assert_eq!(rig.config(5), 2 * BLOCK_BYTES);
    assert_eq!(rig.host.released.lock().unwrap().len(), 0);
    let state = |rig: &mut Rig, block, blocks| rig.ask(MemRequest::State(range(block, blocks)))[8];
    assert_eq!(
        [
            state(&mut rig, 1, 2),
            state(&mut rig, 3, 9),
            state(&mut rig, 0, 2)
        ],
        [0, 1, 2]
    );
}

#[test]
fn host_without_memory_is_busy_and_keeps_nothing_half_done() {
    let mut rig = Rig::new();
    rig.device.handle().set_requested(SLOTS * SLOT_BYTES);
    *rig.host.full_from.lock().unwrap() = Some(START + SLOT_BYTES);
    assert_eq!((rig.plug(0, 65), rig.slots()), (BUSY, 0));
    assert_eq!(rig.config(5), 0);
    *rig.host.full_from.lock().unwrap() = None;
    assert_eq!((rig.plug(0, 65), rig.slots()), (ACK, 2));
}

#[test]
fn unplug_all_takes_every_slot_and_a_reset_none() {
    let mut rig = Rig::new();
    rig.device.handle().set_requested(SLOTS * SLOT_BYTES);
    assert_eq!(rig.plug(3, 200), ACK);
    VirtioDevice::<Space>::reset(&mut rig.device);
    assert_eq!((rig.slots(), rig.config(5)), (4, 200 * BLOCK_BYTES));
    assert_eq!(rig.ask(MemRequest::UnplugAll)[0], ACK);
    assert_eq!((rig.slots(), rig.config(5)), (0, 0));
}

#[test]
fn request_without_room_for_its_answer_retires_the_device() {
    let request = MemRequest::UnplugAll.to_bytes();
    for (sent, room) in [(24, 9), (23, 10)] {
        let mut rig = Rig::new();
        let chain = ChainBuilder::new()
            .readable(&mut rig.mem, &request[..sent])
            .writable(&mut rig.mem, room);
        rig.driver.add(&mut rig.mem, &chain);
        let refused = kick(&mut *rig.worker, 0);
        assert!(matches!(refused, Err(DeviceError::Chain { .. })));
    }
}

#[test]
fn restored_device_has_the_blocks_that_were_saved() {
    let mut rig = Rig::new();
    rig.device.handle().set_requested(SLOTS * SLOT_BYTES);
    assert_eq!(rig.plug(60, 10), ACK);
    let saved = serde_json::to_string(&VirtioDevice::<Space>::save(&rig.device)).unwrap();
    let host = Arc::<Host>::default();
    let mut other = device(&host);
    let state: DeviceState = serde_json::from_str(&saved).unwrap();
    VirtioDevice::<Space>::restore(&mut other, &state).unwrap();
    assert_eq!(VirtioDevice::<Space>::save(&other), state);
    assert_eq!(*host.slots.lock().unwrap(), *rig.host.slots.lock().unwrap());
    assert_eq!(other.handle().plugged(), 10 * BLOCK_BYTES);
}

#[test]
fn impossible_states_are_refused_and_leave_nothing() {
    for (requested, plugged) in [
        (1, "[]"),
        (!(BLOCK_BYTES - 1), "[]"),
        (0, "[[4,1]]"),
        (0, "[[0,0]]"),
        (0, "[[1,1],[0,1]]"),
        (0, "[[1,1],[1,2]]"),
    ] {
        let host = Arc::<Host>::default();
        let text =
            format!(r#"{{"Mem":{{"version":1,"requested":{requested},"plugged":{plugged}}}}}"#);
        let state: DeviceState = serde_json::from_str(&text).unwrap();
        let mut device = device(&host);
        VirtioDevice::<Space>::restore(&mut device, &state).unwrap_err();
        assert_eq!(host.slots.lock().unwrap().len(), 0, "{text}");
    }
}
