// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The register side of the entropy device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_wire::{DeviceId, Features};

use super::worker::RngWorker;
use super::{EntropySource, QUEUE_SIZE, RngMetrics};
use crate::device::read_config_bytes;
use crate::{Activation, DeviceError, DeviceState, GuestSpace, VirtioDevice, Worker};

const STATE_VERSION: u16 = 1;

/// An entropy device; see the module's documentation.
pub struct Rng {
    source: Arc<dyn EntropySource>,
    metrics: Arc<RngMetrics>,
}

/// Saved state of an entropy device: it has none but its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    version: u16,
}

impl Rng {
    /// An entropy device that passes on what `source` gives.
    #[must_use]
    pub fn new(source: Arc<dyn EntropySource>) -> Self {
        Self {
            source,
            metrics: Arc::default(),
        }
    }
}

impl<S: GuestSpace> VirtioDevice<S> for Rng {
    fn kind(&self) -> DeviceId {
        DeviceId::RNG
    }

    fn features(&self) -> Features {
        Features::COMMON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation<S>) -> Result<Vec<Box<dyn Worker>>, DeviceError> {
        // Lengths are capped per request, not refused: a driver may offer what it likes.
        let Some(queue) = activation.queue(0, u32::MAX)? else {
            return Ok(Vec::new());
        };
        let (source, metrics) = (Arc::clone(&self.source), Arc::clone(&self.metrics));
        Ok(vec![Box::new(RngWorker::new(
            source,
            metrics,
            queue,
            &activation,
        ))])
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {
            version: STATE_VERSION,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match state {
            DeviceState::Rng(RngState {
                version: STATE_VERSION,
            }) => Ok(()),
            DeviceState::Rng(_) => Err(DeviceError::unknown_state_version(DeviceId::RNG)),
            _ => Err(DeviceError::foreign_state(DeviceId::RNG)),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.snapshot()
    }
}
