// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The balloon from the driver's side.

use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_testdriver::{ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::balloon::feature;
use vm_memory::GuestAddress;

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{DeviceError, DeviceState, QueueState, VirtioDevice, Worker};

const MEMORY: usize = 4 << 20;
const PAGES: u32 = 1024;
const ALL: Features = Features::COMMON.union(feature::REPORTING);

/// Releases real test memory and remembers what.
struct Recorder {
    inner: MemoryRelease<Space>,
    calls: Mutex<Vec<(u64, u64)>>,
}

impl ReleasePages for Recorder {
    fn release(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push((addr.0, len));
        self.inner.release(addr, len)
    }
}

struct Rig {
    mem: TestMemory,
    drivers: [TestDriver; 3],
    balloon: Balloon,
    worker: Box<dyn Worker>,
    recorder: Arc<Recorder>,
    interrupt: Arc<TestInterrupt>,
}

impl Rig {
    /// `reporting` is the queue index that the driver uses for reporting.
    fn new(reporting: usize) -> Self {
        let mut mem = TestMemory::new(MEMORY);
        let drivers = [(); 3].map(|()| TestDriver::new(&mut mem, 32));
        let recorder = Arc::new(Recorder {
            inner: MemoryRelease::new(mem.space(), BackingSwitch::new(Backing::Private)),
            calls: Mutex::default(),
        });
        let mut balloon = Balloon::new(MEMORY as u64, Arc::clone(&recorder) as _);
        let mut queues = vec![QueueState::default(); QUEUES];
        queues[0] = queue_state(&drivers[0]);
        queues[1] = queue_state(&drivers[1]);
        queues[reporting] = queue_state(&drivers[2]);
        let interrupt = Arc::new(TestInterrupt::default());
        let worker = balloon
            .activate(activation(&mem, queues, ALL, &interrupt))
            .unwrap()
            .remove(0);
        Self {
            mem,
            drivers,
            balloon,
            worker,
            recorder,
            interrupt,
        }
    }

    fn calls(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.recorder.calls.lock().unwrap())
    }

    fn pages(&mut self, queue: u16, numbers: &[u32]) -> Result<(), DeviceError> {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        let chain = ChainBuilder::new().readable(&mut self.mem, &bytes);
        self.drivers[usize::from(queue)].add(&mut self.mem, &chain);
        kick(&mut *self.worker, queue)?;
        assert!(self.drivers[usize::from(queue)].pop_used().is_some());
        Ok(())
    }

    fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.balloon), name)
    }

    fn config(&self) -> (u32, u32) {
        let mut data = [0; 8];
        VirtioDevice::<Space>::read_config(&self.balloon, 0, &mut data);
        let [a, b, c, d, e, f, g, h] = data;
        (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        )
    }

    fn write_actual(&mut self, actual: u32) {
        VirtioDevice::<Space>::write_config(&mut self.balloon, 4, &actual.to_le_bytes());
    }
}

#[test]
fn inflated_pages_are_released_in_runs_and_read_as_zero() {
    let mut rig = Rig::new(2);
    rig.mem.write(100 * 4096, &[7; 3 * 4096]);
    rig.pages(0, &[100, 101, 103, 300, 299, 298, 7]).unwrap();
    let page = 4096;
    assert_eq!(
        rig.calls(),
        [
            (100 * page, 2 * page),
            (103 * page, page),
            (298 * page, 3 * page),
            (7 * page, page)
        ]
    );
    assert_eq!(rig.mem.read(100 * 4096, 8192), [0; 8192]);
    assert_eq!(
        rig.mem.read(102 * 4096, 4096),
        [7; 4096],
        "a page not named is kept"
    );
    assert_eq!(rig.counter("inflated_pages"), 7);
    assert_eq!(rig.counter("released_bytes"), 7 * page);
}

#[test]
fn deflated_pages_cost_the_host_nothing() {
    let mut rig = Rig::new(2);
    rig.pages(1, &[100, 101]).unwrap();
    assert_eq!(rig.calls(), []);
    assert_eq!(rig.counter("deflated_pages"), 2);
}

#[test]
fn page_outside_memory_is_refused_and_the_rest_is_done() {
    let mut rig = Rig::new(2);
    rig.pages(0, &[PAGES - 1, u32::MAX, PAGES, 5]).unwrap();
    assert_eq!(rig.counter("refused_ranges"), 2);
    assert_eq!(rig.counter("released_bytes"), 2 * 4096);
}

#[test]
fn request_at_the_cap_is_done_and_past_it_retires_the_device() {
    let numbers = vec![9; MAX_PFN_BYTES as usize / 4];
    let mut rig = Rig::new(2);
    rig.pages(0, &numbers).unwrap();
    assert_eq!(rig.counter("inflated_pages"), 4096);
    let more = [numbers, vec![9]].concat();
    assert!(matches!(
        rig.pages(0, &more),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn part_of_a_page_number_is_ignored() {
    let mut rig = Rig::new(2);
    let chain = ChainBuilder::new().readable(&mut rig.mem, &[1, 1, 0, 0, 9, 9]);
    rig.drivers[0].add(&mut rig.mem, &chain);
    kick(&mut *rig.worker, 0).unwrap();
    assert_eq!(rig.calls(), [(0x101 * 4096, 4096)]);
}

#[test]
fn reported_pages_are_released_at_either_queue_number() {
    for index in [2, 4] {
        let mut rig = Rig::new(usize::from(index));
        rig.mem.write(0x20_0000, &[7; 0x4000]);
        let chain = ChainBuilder::new()
            .raw(0x20_0000, 0x2000, DESC_WRITE)
            .raw(0x20_2800, 0x1000, DESC_WRITE) // no whole page in it
            .raw(0x20_3000, 0x1000, DESC_WRITE);
        rig.drivers[2].add(&mut rig.mem, &chain);
        kick(&mut *rig.worker, index).unwrap();
        assert_eq!(rig.calls(), [(0x20_0000, 0x2000), (0x20_3000, 0x1000)]);
        assert_eq!(rig.mem.read(0x20_0000, 0x2000), [0; 0x2000]);
        assert_eq!(rig.mem.read(0x20_2000, 0x1000), [7; 0x1000]);
        assert_eq!(rig.counter("reported_bytes"), 0x4000);
        assert_eq!(rig.interrupt.take_used(index), 1);
    }
}

#[test]
fn target_reaches_the_driver_with_an_interrupt() {
    let mut rig = Rig::new(2);
    let handle = rig.balloon.handle();
    handle.set_target(10 * 4096 + 1);
    assert_eq!(rig.config(), (10, 0));
    assert_eq!(rig.interrupt.config_changes(), 1);
    assert_eq!(handle.target(), 10 * 4096);
    rig.write_actual(4);
    assert_eq!(rig.config(), (10, 4));
    assert_eq!(handle.actual(), 4 * 4096);
}

#[test]
fn target_and_actual_never_exceed_memory() {
    let mut rig = Rig::new(2);
    let handle = rig.balloon.handle();
    handle.set_target(u64::MAX);
    rig.write_actual(u32::MAX);
    assert_eq!(rig.config(), (PAGES, PAGES));
    assert_eq!(handle.actual(), MEMORY as u64);
}

#[test]
fn write_that_is_not_actual_is_ignored() {
    let mut rig = Rig::new(2);
    for (offset, data) in [
        (0, &[1; 4][..]),
        (4, &[1; 2]),
        (5, &[1; 4]),
        (4, &[1; 8]),
        (u64::MAX, &[1; 4]),
    ] {
        VirtioDevice::<Space>::write_config(&mut rig.balloon, offset, data);
    }
    assert_eq!(rig.config(), (0, 0));
}

#[test]
fn reset_empties_the_balloon_and_ends_interrupts() {
    let mut rig = Rig::new(2);
    let handle = rig.balloon.handle();
    handle.set_target(4096);
    rig.write_actual(1);
    let waiting = ChainBuilder::new().readable(&mut rig.mem, &[1, 0, 0, 0]);
    rig.drivers[0].add(&mut rig.mem, &waiting);
    rig.worker.pause();
    VirtioDevice::<Space>::reset(&mut rig.balloon);
    handle.set_target(8192);
    assert_eq!(rig.config(), (2, 0), "the host's wish stays");
    assert_eq!(rig.interrupt.config_changes(), 1);
    assert_eq!(rig.calls(), [], "what was waiting is not done");
}

#[test]
fn restored_balloon_goes_on_with_the_next_request() {
    let mut rig = Rig::new(2);
    rig.balloon.handle().set_target(3 * 4096);
    rig.write_actual(2);
    let waiting = ChainBuilder::new().readable(&mut rig.mem, &[50, 0, 0, 0]);
    rig.drivers[0].add(&mut rig.mem, &waiting);
    let mut queues = vec![QueueState::default(); QUEUES];
    for (index, state) in rig.worker.pause() {
        queues[usize::from(index)] = state;
    }
    let saved = serde_json::to_string(&VirtioDevice::<Space>::save(&rig.balloon)).unwrap();

    rig.balloon = Balloon::new(MEMORY as u64, Arc::clone(&rig.recorder) as _);
    let state: DeviceState = serde_json::from_str(&saved).unwrap();
    VirtioDevice::<Space>::restore(&mut rig.balloon, &state).unwrap();
    assert_eq!(rig.config(), (3, 2));
    let activation = activation(&rig.mem, queues, ALL, &rig.interrupt);
    rig.worker = rig.balloon.activate(activation).unwrap().remove(0);
    kick(&mut *rig.worker, 0).unwrap();
    assert_eq!(rig.calls(), [(50 * 4096, 4096)]);
}

proptest! {
    #[test]
    fn any_state_is_restored_within_memory_or_refused(version in 0u16..3, target: u32, actual in 0u32..2048) {
        let mut rig = Rig::new(2);
        let text = format!(r#"{{"Balloon":{{"version":{version},"target":{target},"actual":{actual}}}}}"#);
        let state: DeviceState = serde_json::from_str(&text).unwrap();
        let ok = VirtioDevice::<Space>::restore(&mut rig.balloon, &state).is_ok();
        prop_assert_eq!(ok, version == 1 && target <= PAGES && actual <= PAGES);
        prop_assert!(rig.balloon.handle().actual() <= MEMORY as u64);
    }

    #[test]
    fn random_page_numbers_release_only_guest_memory(numbers in prop::collection::vec(prop_oneof![0u32..2000, any::<u32>()], 0..64)) {
        let mut rig = Rig::new(2);
        // The rings themselves may be among the pages: then the driver's requests are gone, which
        // is its own loss.
        let numbers: Vec<u32> = numbers.into_iter().filter(|number| *number > 16).collect();
        let inside = numbers.iter().filter(|number| **number < PAGES).count() as u64;
        if !numbers.is_empty() {
            rig.pages(0, &numbers).unwrap();
        }
        prop_assert!(rig.counter("released_bytes") <= inside * 4096);
    }
}

#[test]
fn shared_memory_is_released_from_its_file() {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap};

    let memfd = nix::sys::memfd::memfd_create("ram", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let file = std::fs::File::from(memfd);
    file.set_len(1 << 20).unwrap();
    let ranges = [(
        GuestAddress(0),
        1 << 20,
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
    )];
    let mem: Space = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
    mem.write_slice(&[7; 8192], GuestAddress(0)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks(), 16);
    MemoryRelease::new(Arc::clone(&mem), BackingSwitch::new(Backing::Shared))
        .release(GuestAddress(0), 4096)
        .unwrap();
    assert_eq!(file.metadata().unwrap().blocks(), 8);
}
