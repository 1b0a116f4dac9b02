// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the unit tests of all devices share: a transport that records, and a loop that runs workers.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_testdriver::{TestDriver, TestMemory};
use virtio_wire::Features;
use vm_memory::GuestMemoryMmap;

use crate::{Activation, DeviceError, Event, Interrupt, Progress, QueueState, Worker};

/// Guest memory as unit tests use it.
pub(crate) type Space = Arc<GuestMemoryMmap>;

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct TestInterrupt {
    used: Mutex<Vec<u16>>,
    config: AtomicU64,
}

impl TestInterrupt {
    /// Interrupts for queue `index` since the last call.
    pub(crate) fn take_used(&self, index: u16) -> usize {
        let mut used = self.used.lock().unwrap();
        let before = used.len();
        used.retain(|queue| *queue != index);
        before - used.len()
    }

    /// Configuration change interrupts since the start.
    pub(crate) fn config_changes(&self) -> u64 {
        self.config.load(Ordering::Relaxed)
    }
}

impl Interrupt for TestInterrupt {
    fn signal_used_queue(&self, index: u16) {
        self.used.lock().unwrap().push(index);
    }

    fn signal_config_change(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// The registers as a transport has them after `driver` set its queue up.
pub(crate) fn queue_state(driver: &TestDriver) -> QueueState {
    let rings = driver.rings();
    QueueState {
        size: rings.size,
        ready: true,
        desc_table: rings.desc_table,
        avail_ring: rings.avail_ring,
        used_ring: rings.used_ring,
        ..QueueState::default()
    }
}

/// DRIVER_OK with these queues, in order of their index.
pub(crate) fn activation(
    mem: &TestMemory,
    queues: Vec<QueueState>,
    features: Features,
    interrupt: &Arc<TestInterrupt>,
) -> Activation<Space> {
    let interrupt: Arc<dyn Interrupt> = Arc::clone(interrupt) as _;
    Activation {
        memory: mem.space(),
        queues,
        features,
        interrupt,
    }
}

/// Handles a kick of queue `index` until the worker is idle; the number of wakes.
pub(crate) fn kick(worker: &mut dyn Worker, index: u16) -> Result<usize, DeviceError> {
    for wakes in 1..10_000 {
        if worker.handle(Event::Queue(index))? == Progress::Idle {
            return Ok(wakes);
        }
    }
    panic!("the worker never becomes idle");
}

/// The value of a counter, by name.
pub(crate) fn counter(metrics: &[(&'static str, u64)], name: &str) -> u64 {
    metrics
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, value)| *value)
        .expect("such a counter")
}
