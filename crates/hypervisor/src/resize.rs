// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Another size for a VM that runs.

use std::time::Duration;

use async_trait::async_trait;
use ids::{Mib, VcpuCount};

use crate::DriverError;

/// How large a VM shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmTarget {
    /// Virtual CPUs, at most [`VmSpec::max_vcpus`](crate::VmSpec::max_vcpus).
    pub vcpus: VcpuCount,
    /// Guest memory, at most [`VmSpec::max_memory`](crate::VmSpec::max_memory).
    pub memory: Mib,
}

/// How large a VM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resized {
    /// Virtual CPUs that the guest can bring up: never fewer than before, since a VMM takes none away. The guest takes down
    /// what it is to do without.
    pub vcpus: VcpuCount,
    /// Memory that the guest has, by its own account. It need not be what was asked for: a guest that is busy takes its time
    /// to take memory, and one that needs it gives none back.
    pub memory: Mib,
    /// The platform device that the guest must bind to take memory, as in
    /// [`AttachedDisk::bind_device`](crate::AttachedDisk::bind_device).
    pub bind_device: Option<String>,
}

/// A VM that can be resized while it runs.
#[async_trait]
pub trait Resize: Send + Sync {
    /// Asks the guest to be of another size, and answers what it is once it is that, or after `within`. What was asked
    /// stays asked: the guest may still come nearer to it. Idempotent.
    ///
    /// Whatever the guest does, it has no more memory of the host than the larger of what it was asked to have and what it
    /// has not given back yet.
    ///
    /// # Errors
    /// [`DriverErrorKind::Unsupported`](crate::DriverErrorKind::Unsupported) for more than the VM was started to become.
    async fn resize(&self, target: VmTarget, within: Duration) -> Result<Resized, DriverError>;
}
