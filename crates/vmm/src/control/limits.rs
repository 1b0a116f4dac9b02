// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Limits of traffic as the shim says them.

use std::num::NonZeroU64;

use ids::{Limit, Limits, Rate};
use serde::{Deserialize, Serialize};

/// See [`Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsConfig {
    /// Frames to the guest.
    #[serde(default)]
    pub ingress: LimitConfig,
    /// Frames from the guest.
    #[serde(default)]
    pub egress: LimitConfig,
    /// Requests of the disks.
    #[serde(default)]
    pub disk: LimitConfig,
}

/// See [`Limit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {
    /// Bytes.
    pub bytes: Option<RateConfig>,
    /// Frames or requests.
    pub operations: Option<RateConfig>,
}

/// See [`Rate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateConfig {
    /// On average.
    pub per_second: NonZeroU64,
    /// At once.
    pub burst: NonZeroU64,
}

impl From<Limits> for LimitsConfig {
    fn from(limits: Limits) -> Self {
        let Limits {
            ingress,
            egress,
            disk,
        } = limits;
        let [ingress, egress, disk] = [ingress, egress, disk].map(|limit| LimitConfig {
            bytes: limit.bytes.map(RateConfig::from),
            operations: limit.operations.map(RateConfig::from),
        });
        Self {
            ingress,
            egress,
            disk,
        }
    }
}

impl From<LimitConfig> for Limit {
    fn from(limit: LimitConfig) -> Self {
        Self {
            bytes: limit.bytes.map(Rate::from),
            operations: limit.operations.map(Rate::from),
        }
    }
}

impl From<Rate> for RateConfig {
    fn from(Rate { per_second, burst }: Rate) -> Self {
        Self { per_second, burst }
    }
}

impl From<RateConfig> for Rate {
    fn from(RateConfig { per_second, burst }: RateConfig) -> Self {
        Self { per_second, burst }
    }
}
