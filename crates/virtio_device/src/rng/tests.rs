// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The entropy device from the driver's side.

use std::io;
use std::sync::Arc;

use virtio_testdriver::{ChainBuilder, TestDriver, TestMemory};
use virtio_wire::{DeviceId, Features};

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{DeviceError, DeviceState, VirtioDevice, Worker};

/// Gives 1, 2, 3, ..., or fails.
enum Known {
    Counting,
    Broken,
}

impl EntropySource for Known {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Counting => {
                to.iter_mut()
                    .zip(1u32..)
                    .for_each(|(byte, n)| *byte = n.to_le_bytes()[0]);
                Ok(())
            }
            Self::Broken => Err(io::ErrorKind::Other.into()),
        }
    }
}

struct Rig {
    mem: TestMemory,
    driver: TestDriver,
    rng: Rng,
    worker: Box<dyn Worker>,
    interrupt: Arc<TestInterrupt>,
}

fn rig(source: Known) -> Rig {
    let mut mem = TestMemory::new(1 << 20);
    let driver = TestDriver::new(&mut mem, 16);
    let interrupt = Arc::new(TestInterrupt::default());
    let mut rng = Rng::new(Arc::new(source));
    let queues = vec![queue_state(&driver)];
    let worker = rng
        .activate(activation(&mem, queues, Features::COMMON, &interrupt))
        .unwrap()
        .remove(0);
    Rig {
        mem,
        driver,
        rng,
        worker,
        interrupt,
    }
}

#[test]
fn request_is_filled_over_all_its_buffers() {
    let mut rig = rig(Known::Counting);
    let chain = ChainBuilder::new()
        .writable(&mut rig.mem, 3)
        .writable(&mut rig.mem, 2);
    rig.driver.add(&mut rig.mem, &chain);
    kick(&mut *rig.worker, 0).unwrap();
    assert_eq!(rig.driver.pop_used().unwrap().written, 5);
    assert_eq!(rig.mem.read(chain.buffers()[0].addr, 3), [1, 2, 3]);
    assert_eq!(rig.mem.read(chain.buffers()[1].addr, 2), [4, 5]);
    assert_eq!(rig.interrupt.take_used(0), 1);
    let metrics = VirtioDevice::<Space>::metrics(&rig.rng);
    assert_eq!(
        (counter(&metrics, "requests"), counter(&metrics, "bytes")),
        (1, 5)
    );
}

#[test]
fn request_at_the_cap_is_filled_and_past_it_cut_short() {
    let mut rig = rig(Known::Counting);
    for (len, given) in [
        (MAX_REQUEST_BYTES, 4096),
        (MAX_REQUEST_BYTES + 1, 4096),
        (900_000, 4096),
    ] {
        let chain = ChainBuilder::new().raw(0x8000, u32::try_from(len).unwrap(), 2);
        rig.driver.add(&mut rig.mem, &chain);
        kick(&mut *rig.worker, 0).unwrap();
        assert_eq!(rig.driver.pop_used().unwrap().written, given);
    }
}

#[test]
fn request_without_writable_bytes_retires_the_device() {
    let mut rig = rig(Known::Counting); // virtio v1.3 §5.4.6.1
    let chain = ChainBuilder::new().readable(&mut rig.mem, b"seed");
    rig.driver.add(&mut rig.mem, &chain);
    assert!(matches!(
        kick(&mut *rig.worker, 0),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn source_that_fails_retires_the_device_and_gives_nothing() {
    let mut rig = rig(Known::Broken);
    let chain = ChainBuilder::new().writable(&mut rig.mem, 8);
    rig.driver.add(&mut rig.mem, &chain);
    let error = kick(&mut *rig.worker, 0).unwrap_err();
    assert!(matches!(
        error,
        DeviceError::Host {
            device: DeviceId::RNG,
            ..
        }
    ));
    assert!(rig.driver.pop_used().is_none());
}

#[test]
fn host_entropy_fills_everything() {
    let mut bytes = [0; 4096];
    HostEntropy.fill(&mut bytes).unwrap();
    // The chance that a run of 64 zero bytes is random is 2^-512 for each place.
    assert!(
        bytes
            .chunks(64)
            .all(|chunk| chunk.iter().any(|byte| *byte != 0))
    );
}

#[test]
fn restored_device_serves_what_was_waiting_and_foreign_state_is_refused() {
    let mut rig = rig(Known::Counting);
    let chain = ChainBuilder::new().writable(&mut rig.mem, 8);
    rig.driver.add(&mut rig.mem, &chain);
    let queues = rig
        .worker
        .pause()
        .into_iter()
        .map(|(_, state)| state)
        .collect();
    let state = VirtioDevice::<Space>::save(&rig.rng);

    let mut other = Rng::new(Arc::new(HostEntropy));
    VirtioDevice::<Space>::restore(&mut other, &state).unwrap();
    let activation = activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    let mut worker = other.activate(activation).unwrap().remove(0);
    kick(&mut *worker, 0).unwrap();
    assert_eq!(rig.driver.pop_used().unwrap().written, 8);

    for text in [r#"{"Rng":{"version":2}}"#, r#"{"Console":{"version":1}}"#] {
        let state: DeviceState = serde_json::from_str(text).unwrap();
        assert!(
            VirtioDevice::<Space>::restore(&mut other, &state).is_err(),
            "{text}"
        );
    }
}
