// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Queue and chain against the test driver: a model of honest use, and every way to break the rules.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_testdriver::{
    ChainBuilder, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, TestDriver, TestMemory,
};
use virtio_wire::Features;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::testing::{TestInterrupt, queue_state};
use crate::{
    Chain, ChainFault, DeviceError, MAX_CHAINS_PER_WAKE, MAX_QUEUE_SIZE, Progress, Queue,
    QueueState,
};

const MEMORY: usize = 1 << 20;
const MAX_BYTES: u32 = 64 << 10;
/// Zeroed memory, past the rings.
const DATA: u64 = 0x8000;

struct Rig {
    mem: TestMemory,
    driver: TestDriver,
    queue: Queue,
    chain: Chain,
    interrupt: Arc<TestInterrupt>,
}

impl Rig {
    fn new(size: u16, features: Features, start: u16) -> Self {
        let mut mem = TestMemory::new(MEMORY);
        let mut driver = TestDriver::new(&mut mem, size);
        driver.start_at(start);
        let state = QueueState {
            next_avail: start,
            next_used: start,
            ..queue_state(&driver)
        };
        let queue = Queue::new(0, &state, features, MAX_BYTES, &*mem.space()).unwrap();
        Self {
            mem,
            driver,
            queue,
            chain: Chain::default(),
            interrupt: Arc::default(),
        }
    }

    fn add(&mut self, chain: &ChainBuilder) -> u16 {
        self.driver.add(&mut self.mem, chain)
    }

    fn pop(&mut self) -> Result<bool, DeviceError> {
        self.queue.pop(&*self.mem.space(), &mut self.chain)
    }

    /// The fault that the next chain is refused for.
    fn fault(&mut self) -> ChainFault {
        match self.pop() {
            Err(DeviceError::Chain { fault, .. }) => fault,
            other => panic!("the chain was not refused: {other:?}"),
        }
    }
}

fn rig() -> Rig {
    Rig::new(16, Features::COMMON, 0)
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: Vec<u8>,
        split: usize,
        writable: usize,
        indirect: bool,
    },
    Serve,
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (prop::collection::vec(any::<u8>(), 0..40), 0usize..40, 1usize..40, any::<bool>())
            .prop_map(|(readable, split, writable, indirect)| Step::Add { readable, split, writable, indirect }),
        1 => Just(Step::Serve),
        1 => Just(Step::Drain),
    ]
}

proptest! {
    /// Model: a FIFO. Every chain comes back once, in order, with what the device wrote, wherever
    /// the 16-bit indexes wrap and however buffers are framed; interrupts come exactly when §2.7.7
    /// asks for them.
    #[test]
    fn honest_driver_gets_every_chain_back_in_order(
        steps in prop::collection::vec(step(), 1..60),
        start in prop_oneof![Just(0u16), Just(u16::MAX), 0xfff0u16..=0xffff],
        event_idx in any::<bool>(),
    ) {
        let features = if event_idx { Features::COMMON } else { Features::COMMON.without(Features::RING_EVENT_IDX) };
        let mut rig = Rig::new(16, features, start);
        let mut offered: VecDeque<(u16, Vec<u8>, u64, usize)> = VecDeque::new();
        let mut finished = VecDeque::new();
        let mut seen = start; // the used index up to which the driver has looked
        rig.driver.set_used_event(seen);
        for step in steps.into_iter().chain([Step::Serve, Step::Drain]) {
            match step {
                Step::Add { readable, split, writable, indirect } => {
                    if rig.driver.free_descriptors() < 3 { continue; }
                    let (a, b) = readable.split_at(split.min(readable.len()));
                    let mut chain = ChainBuilder::new()
                        .readable(&mut rig.mem, a)
                        .readable(&mut rig.mem, b)
                        .writable(&mut rig.mem, writable);
                    if indirect { chain = chain.indirect(); }
                    let at = chain.buffers()[2].addr;
                    let head = rig.add(&chain);
                    offered.push_back((head, readable, at, writable));
                }
                Step::Serve => {
                    let space = rig.mem.space();
                    let mut served = Vec::new();
                    let progress = rig.queue.serve(&*space, &*rig.interrupt, &mut rig.chain, |chain| {
                        let mut got = vec![0; chain.readable.len() as usize];
                        chain.readable.read_at(&*space, 0, &mut got)?;
                        let len = chain.writable.len();
                        let answer = vec![chain.head().to_le_bytes()[0]; len as usize];
                        chain.writable.write_at(&*space, 0, &answer)?;
                        served.push((chain.head(), got));
                        Ok(len)
                    }).unwrap();
                    prop_assert_eq!(progress, Progress::Idle);
                    let expected: Vec<_> = offered.iter().map(|(head, data, ..)| (*head, data.clone())).collect();
                    prop_assert_eq!(&served, &expected);
                    let wanted = if event_idx {
                        // The driver asked for an interrupt with entry `seen`: it comes with the
                        // first batch that has it.
                        !served.is_empty() && finished.is_empty()
                    } else {
                        !served.is_empty()
                    };
                    prop_assert_eq!(rig.interrupt.take_used(0), usize::from(wanted));
                    finished.extend(offered.drain(..));
                }
                Step::Drain => {
                    for used in rig.driver.drain_used() {
                        let (head, _, at, len): (u16, Vec<u8>, u64, usize) = finished.pop_front().unwrap();
                        prop_assert_eq!(used.head, u32::from(head));
                        prop_assert_eq!(used.written as usize, len);
                        prop_assert_eq!(rig.mem.read(at, len), vec![head.to_le_bytes()[0]; len]);
                        seen = seen.wrapping_add(1);
                    }
                    prop_assert!(finished.is_empty());
                    rig.driver.set_used_event(seen);
                }
            }
        }
    }

    /// A table of nonsense: an answer within bounds or an error, never a panic or an endless walk.
    #[test]
    fn random_descriptors_end_within_bounds(
        table in prop::collection::vec((0u64..0x12_0000, any::<u32>(), 0u16..8, 0u16..20), 16),
        small in any::<bool>(),
        head in 0u16..20,
    ) {
        let mut rig = rig();
        for (i, (addr, len, flags, next)) in table.into_iter().enumerate() {
            let len = if small { len % 0x200 } else { len };
            rig.driver.write_descriptor(u16::try_from(i).unwrap(), addr, len, flags, next);
        }
        rig.driver.publish(head);
        if rig.pop().is_ok() {
            prop_assert!(rig.chain.total_len() <= MAX_BYTES);
            let segments = rig.chain.readable.segments().len() + rig.chain.writable.segments().len();
            prop_assert!(segments <= 16);
        }
    }

    /// Registers of nonsense: a queue within memory or an error.
    #[test]
    fn random_registers_are_refused_or_usable(
        size: u16, desc_table in 0u64..0x11_0000, avail_ring in 0u64..0x11_0000, used_ring in 0u64..0x11_0000,
        next_avail: u16, next_used: u16,
    ) {
        let mem = TestMemory::new(MEMORY);
        let state = QueueState { size, ready: true, desc_table, avail_ring, used_ring, next_avail, next_used };
        if let Ok(mut queue) = Queue::new(0, &state, Features::COMMON, MAX_BYTES, &*mem.space()) {
            prop_assert_eq!(queue.state(), state);
            let _ = queue.pop(&*mem.space(), &mut Chain::default());
        }
    }
}

#[test]
fn chain_that_loops_is_too_long() {
    let mut rig = rig();
    rig.driver.write_descriptor(0, DATA, 1, DESC_NEXT, 1);
    rig.driver.write_descriptor(1, DATA, 1, DESC_NEXT, 0);
    rig.driver.publish(0);
    assert_eq!(rig.fault(), ChainFault::TooLong);
}

#[test]
fn chain_of_queue_size_is_taken_and_one_more_is_too_long() {
    // virtio v1.3 §2.7.5.3.1: no chain longer than the queue.
    let mut chain = ChainBuilder::new();
    for _ in 0..16 {
        chain = chain.raw(DATA, 1, 0);
    }
    let mut at_cap = rig();
    at_cap.add(&chain);
    assert!(at_cap.pop().unwrap());
    assert_eq!(at_cap.chain.readable.segments().len(), 16);

    let mut indirect = rig();
    indirect.add(&chain.clone().indirect());
    assert!(
        indirect.pop().unwrap(),
        "the table may be as long as the queue"
    );
    assert_eq!(indirect.chain.readable.segments().len(), 16);

    let mut past = rig();
    past.add(&chain.raw(DATA, 1, 0).indirect());
    assert_eq!(past.fault(), ChainFault::TooLong);
}

#[test]
fn index_outside_the_table_is_refused() {
    let mut by_head = rig();
    by_head.driver.publish(16);
    assert_eq!(by_head.fault(), ChainFault::BadIndex);

    let mut by_next = rig();
    by_next.driver.write_descriptor(0, DATA, 1, DESC_NEXT, 16);
    by_next.driver.publish(0);
    assert_eq!(by_next.fault(), ChainFault::BadIndex);
}

#[test]
fn buffer_outside_memory_is_refused() {
    let end = MEMORY as u64;
    for (addr, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 4, 16)] {
        let mut rig = rig();
        rig.add(&ChainBuilder::new().raw(addr, len, 0));
        assert_eq!(rig.fault(), ChainFault::OutsideMemory, "{addr:#x}+{len}");
    }
    let mut last_byte = rig();
    last_byte.add(&ChainBuilder::new().raw(end - 1, 1, DESC_WRITE));
    assert!(last_byte.pop().unwrap());
}

#[test]
fn bytes_at_the_cap_are_taken_and_one_more_is_refused() {
    let mut at_cap = rig();
    at_cap.add(
        &ChainBuilder::new()
            .raw(DATA, MAX_BYTES - 1, 0)
            .raw(DATA, 1, DESC_WRITE),
    );
    assert!(at_cap.pop().unwrap());
    assert_eq!(at_cap.chain.total_len(), MAX_BYTES);

    for (first, second) in [(MAX_BYTES, 1), (u32::MAX, u32::MAX), (0, u32::MAX)] {
        let mut past = rig();
        past.add(
            &ChainBuilder::new()
                .raw(DATA, first, 0)
                .raw(DATA, second, DESC_WRITE),
        );
        assert_eq!(past.fault(), ChainFault::TooManyBytes);
    }
}

#[test]
fn empty_buffers_add_nothing_wherever_they_point() {
    let mut rig = rig();
    rig.add(
        &ChainBuilder::new()
            .raw(u64::MAX, 0, 0)
            .raw(DATA, 4, 0)
            .raw(0, 0, DESC_WRITE),
    );
    assert!(rig.pop().unwrap());
    assert_eq!(rig.chain.readable.segments().len(), 1);
    assert!(rig.chain.writable.is_empty());
}

#[test]
fn readable_after_writable_is_refused() {
    let mut rig = rig(); // virtio v1.3 §2.7.4.2
    rig.add(&ChainBuilder::new().raw(DATA, 1, DESC_WRITE).raw(DATA, 1, 0));
    assert_eq!(rig.fault(), ChainFault::BadOrder);
}

#[test]
fn indirect_table_against_the_rules_is_refused() {
    // virtio v1.3 §2.7.5.3.1
    let mut not_negotiated = Rig::new(16, Features::VERSION_1, 0);
    not_negotiated.add(&ChainBuilder::new().raw(DATA, 1, 0).indirect());
    assert_eq!(not_negotiated.fault(), ChainFault::BadIndirect);

    let mut nested = rig();
    nested.add(&ChainBuilder::new().raw(DATA, 16, DESC_INDIRECT).indirect());
    assert_eq!(nested.fault(), ChainFault::BadIndirect);

    let mut followed = rig();
    followed.add(
        &ChainBuilder::new()
            .raw(DATA, 16, DESC_INDIRECT)
            .raw(DATA, 1, 0),
    );
    assert_eq!(followed.fault(), ChainFault::BadIndirect);

    for len in [0, 1, 15, 17] {
        let mut bad_len = rig();
        bad_len.add(&ChainBuilder::new().raw(DATA, len, DESC_INDIRECT));
        assert_eq!(bad_len.fault(), ChainFault::BadIndirect, "{len}");
    }

    let mut outside = rig();
    outside.add(&ChainBuilder::new().raw(MEMORY as u64, 16, DESC_INDIRECT));
    assert_eq!(outside.fault(), ChainFault::OutsideMemory);

    let mut huge = rig(); // a length of almost 4 GiB is only a bound on indexes
    huge.add(&ChainBuilder::new().raw(DATA, 0xffff_fff0, DESC_INDIRECT));
    assert!(huge.pop().unwrap(), "zeroed memory is one empty buffer");
    assert_eq!(huge.chain.total_len(), 0);
}

#[test]
fn indirect_table_after_direct_buffers_is_followed() {
    let mut rig = rig(); // virtio v1.3 §2.7.5.3.2: the device MUST handle it
    let table = rig.mem.alloc(16, 16);
    rig.mem.write(table, &0x2000u64.to_le_bytes());
    rig.mem.write(table + 8, &8u32.to_le_bytes());
    rig.mem.write(table + 12, &DESC_WRITE.to_le_bytes());
    rig.add(
        &ChainBuilder::new()
            .raw(DATA, 4, 0)
            .raw(table, 16, DESC_INDIRECT),
    );
    assert!(rig.pop().unwrap());
    assert_eq!((rig.chain.readable.len(), rig.chain.writable.len()), (4, 8));
}

#[test]
fn available_index_that_jumps_past_the_queue_is_refused() {
    let mut at_cap = rig();
    at_cap.driver.set_avail_index(16);
    assert!(at_cap.pop().is_ok());
    let mut past = rig();
    past.driver.set_avail_index(17);
    assert!(matches!(past.pop(), Err(DeviceError::Ring { .. })));
}

#[test]
fn ring_that_cannot_be_used_is_refused_at_activation() {
    let rig = rig();
    let good = queue_state(&rig.driver);
    let space = rig.mem.space();
    let end = MEMORY as u64;
    let bad = [
        QueueState {
            size: 0,
            ..good.clone()
        },
        QueueState {
            size: 3,
            ..good.clone()
        },
        QueueState {
            size: MAX_QUEUE_SIZE * 2,
            ..good.clone()
        },
        QueueState {
            ready: false,
            ..good.clone()
        },
        QueueState {
            desc_table: good.desc_table + 8,
            ..good.clone()
        },
        QueueState {
            avail_ring: good.avail_ring + 1,
            ..good.clone()
        },
        QueueState {
            used_ring: good.used_ring + 2,
            ..good.clone()
        },
        QueueState {
            avail_ring: 0,
            ..good.clone()
        },
        QueueState {
            desc_table: end,
            ..good.clone()
        },
        QueueState {
            desc_table: end - 16 * 15,
            ..good.clone()
        },
        QueueState {
            avail_ring: end - 2,
            ..good.clone()
        },
        QueueState {
            used_ring: u64::MAX - 3,
            ..good.clone()
        },
    ];
    for state in bad {
        let queue = Queue::new(0, &state, Features::COMMON, MAX_BYTES, &*space);
        assert!(matches!(queue, Err(DeviceError::Queue { .. })), "{state:?}");
    }
    assert!(Queue::new(0, &good, Features::COMMON, MAX_BYTES, &*space).is_ok());
}

#[test]
fn one_wake_stops_at_the_cap_of_chains() {
    let mut rig = Rig::new(1024, Features::COMMON, 0);
    for _ in 0..1000 {
        rig.add(&ChainBuilder::new().raw(DATA, 1, 0));
    }
    let space = rig.mem.space();
    let mut wakes = 0;
    loop {
        let mut served = 0;
        let progress = rig
            .queue
            .serve(&*space, &*rig.interrupt, &mut rig.chain, |_| {
                served += 1;
                Ok(0)
            });
        wakes += 1;
        assert!(served <= MAX_CHAINS_PER_WAKE);
        if progress.unwrap() == Progress::Idle {
            break;
        }
    }
    assert_eq!(wakes, 4);
    assert_eq!(rig.driver.drain_used().len(), 1000);
}

#[test]
fn one_wake_stops_at_the_cap_of_bytes() {
    let mut mem = TestMemory::new(16 << 20);
    let mut driver = TestDriver::new(&mut mem, 16);
    let state = queue_state(&driver);
    let space = mem.space();
    let mut queue = Queue::new(0, &state, Features::COMMON, u32::MAX, &*space).unwrap();
    for _ in 0..4 {
        driver.add(&mut mem, &ChainBuilder::new().raw(0x10_0000, 6 << 20, 0));
    }
    let interrupt = TestInterrupt::default();
    let mut served = 0;
    let progress = queue.serve(&*space, &interrupt, &mut Chain::default(), |_| {
        served += 1;
        Ok(0)
    });
    assert_eq!((progress.unwrap(), served), (Progress::More, 2));
}

#[test]
fn idle_queue_asks_for_the_next_kick() {
    let mut rig = Rig::new(16, Features::COMMON, 0xfffe);
    for _ in 0..3 {
        rig.add(&ChainBuilder::new().raw(DATA, 1, 0));
    }
    let space = rig.mem.space();
    let progress = rig
        .queue
        .serve(&*space, &*rig.interrupt, &mut rig.chain, |_| Ok(0));
    assert_eq!(progress.unwrap(), Progress::Idle);
    assert_eq!(
        rig.driver.avail_event(),
        1,
        "kick when entry 1 is added (virtio v1.3 §2.7.10)"
    );

    let mut flags = Rig::new(16, Features::VERSION_1, 0);
    flags.queue.disable_kicks(&*flags.mem.space()).unwrap();
    assert_eq!(flags.driver.used_flags(), 1);
    assert!(!flags.queue.enable_kicks(&*flags.mem.space()).unwrap());
    assert_eq!(flags.driver.used_flags(), 0);
}

#[test]
fn chain_put_back_is_found_again() {
    let mut rig = rig();
    let head = rig.add(&ChainBuilder::new().raw(DATA, 1, 0));
    assert!(rig.pop().unwrap());
    rig.queue.undo_pop();
    assert!(rig.queue.has_available(&*rig.mem.space()).unwrap());
    assert!(rig.pop().unwrap());
    assert_eq!(rig.chain.head(), head);
    assert!(!rig.pop().unwrap());
}

#[test]
fn queue_made_from_saved_state_goes_on_where_the_old_one_stopped() {
    let mut rig = rig();
    rig.add(&ChainBuilder::new().raw(DATA, 1, 0));
    let second = rig.add(&ChainBuilder::new().raw(DATA, 2, 0));
    assert!(rig.pop().unwrap());
    rig.queue
        .complete(&*rig.mem.space(), rig.chain.head(), 0)
        .unwrap();
    let encoded = serde_json::to_vec(&rig.queue.state()).unwrap();
    let state: QueueState = serde_json::from_slice(&encoded).unwrap();
    rig.queue = Queue::new(0, &state, Features::COMMON, MAX_BYTES, &*rig.mem.space()).unwrap();
    assert!(rig.pop().unwrap());
    assert_eq!(rig.chain.head(), second);
}

/// Memory in which another vCPU flips the available index between 0 and 1, right before each read.
struct Flipping {
    inner: Arc<GuestMemoryMmap>,
    index_at: GuestAddress,
    reads: Cell<u16>,
}

impl GuestMemory for Flipping {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&*self.inner, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> vm_memory::guest_memory::Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        if addr == self.index_at && access == Permissions::Read {
            self.inner.write_obj(self.reads.get() % 2, addr).unwrap();
            self.reads.set(self.reads.get().wrapping_add(1));
        }
        GuestMemory::get_slices(&*self.inner, addr, count, access)
    }
}

#[test]
fn index_that_flips_while_it_is_read_does_not_hold_the_worker() {
    let mut rig = rig();
    let index_at = GuestAddress(rig.driver.rings().avail_ring + 2);
    let inner = rig.mem.space();
    let mem = Flipping {
        inner,
        index_at,
        reads: Cell::new(0),
    };
    let served = |_: &Chain| panic!("no chain is there when the queue looks");
    let progress = rig
        .queue
        .serve(&mem, &*rig.interrupt, &mut rig.chain, served);
    assert_eq!(progress.unwrap(), Progress::More);
    assert_eq!(u32::from(mem.reads.get()), 2 * MAX_CHAINS_PER_WAKE);
}
