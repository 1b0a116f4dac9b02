// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How much of something may pass in a second.

use std::num::NonZeroU64;

/// So many in a second, on average, and so many at once after a rest. What is counted, bytes or operations, is the user's
/// affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// On average.
    pub per_second: NonZeroU64,
    /// At once. One that is larger is let pass whole, and paid for afterwards.
    pub burst: NonZeroU64,
}

impl Rate {
    /// The rate with a burst of a tenth of a second; no rate for zero, which means that there is no limit.
    #[must_use]
    pub fn new(per_second: u64) -> Option<Self> {
        let per_second = NonZeroU64::new(per_second)?;
        let burst = NonZeroU64::new(per_second.get() / 10).unwrap_or(NonZeroU64::MIN);
        Some(Self { per_second, burst })
    }

    /// The same with another burst.
    #[must_use]
    pub fn with_burst(self, burst: NonZeroU64) -> Self {
        Self { burst, ..self }
    }
}

/// Limits of one kind of traffic; both hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Bytes.
    pub bytes: Option<Rate>,
    /// Frames or disk requests.
    pub operations: Option<Rate>,
}

/// Limits of a VM: all its network cards share one, and all its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Frames to the guest.
    pub ingress: Limit,
    /// Frames from the guest.
    pub egress: Limit,
    /// Requests of the disks, reads and writes together.
    pub disk: Limit,
}
