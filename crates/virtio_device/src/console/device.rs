// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the console.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_wire::console::{ConsoleConfig, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use virtio_wire::{DeviceId, Features};

use super::worker::ConsoleWorker;
use super::{ConsoleInput, ConsoleLog, ConsoleMetrics, MAX_CHAIN_BYTES, QUEUE_SIZE};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, VirtioDevice, Worker};

const STATE_VERSION: u16 = 1;

/// A console; see the module's documentation.
pub struct Console {
    shared: Arc<Shared>,
    input: Arc<ConsoleInput>,
}

/// What the device and its worker share.
pub(super) struct Shared {
    pub(super) log: Arc<ConsoleLog>,
    pub(super) metrics: ConsoleMetrics,
}

/// Saved state of a console: none but its version. Output stays with the pod that printed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    version: u16,
}

impl Console {
    /// A console that prints to `log`.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new(log: Arc<ConsoleLog>) -> Result<Self, DeviceError> {
        let input = ConsoleInput::new().map_err(|source| DeviceError::Host {
            device: DeviceId::CONSOLE,
            operation: "create an event descriptor",
            source,
        })?;
        Ok(Self {
            shared: Arc::new(Shared {
                log,
                metrics: ConsoleMetrics::default(),
            }),
            input: Arc::new(input),
        })
    }

    /// Where to put what the guest shall read.
    #[must_use]
    pub fn input(&self) -> Arc<ConsoleInput> {
        Arc::clone(&self.input)
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Console {
    fn kind(&self) -> DeviceId {
        DeviceId::CONSOLE
    }

    fn features(&self) -> Features {
        Features::COMMON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Without F_SIZE the size fields mean nothing (§5.3.4).
        read_config_bytes(&ConsoleConfig::default().to_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        let receive = activation.queue(RECEIVE_QUEUE, MAX_CHAIN_BYTES)?;
        let transmit = activation.queue(TRANSMIT_QUEUE, MAX_CHAIN_BYTES)?;
        let (shared, input) = (Arc::clone(&self.shared), Arc::clone(&self.input));
        Ok(vec![Box::new(ConsoleWorker::new(
            shared,
            input,
            receive,
            transmit,
            &activation,
        ))])
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            version: STATE_VERSION,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match state {
            DeviceState::Console(ConsoleState {
                version: STATE_VERSION,
            }) => Ok(()),
            DeviceState::Console(_) => Err(DeviceError::unknown_state_version(DeviceId::CONSOLE)),
            _ => Err(DeviceError::foreign_state(DeviceId::CONSOLE)),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.snapshot()
    }
}
