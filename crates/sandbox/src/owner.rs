// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The owner task.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::Driver;
use ids::SandboxId;
use tokio::sync::{mpsc, watch};

use crate::event::EventSink;
use crate::handle::SandboxHandle;
use crate::host::Host;

/// What a sandbox is made from.
pub struct SandboxOptions {
    /// The pod's id, or the container's that has a VM of its own.
    pub id: SandboxId,
    /// The VMM.
    pub driver: Arc<dyn Driver>,
    /// The node.
    pub host: Arc<dyn Host>,
    /// containerd.
    pub events: Arc<dyn EventSink>,
    /// How long to wait for the guest.
    pub deadlines: Deadlines,
}

/// How long a sandbox waits for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// From the VM's launch until the agent has dialled.
    pub boot: Duration,
    /// For one call to the agent, other than making a container.
    pub call: Duration,
    /// For making a container in the guest.
    pub create: Duration,
    /// For the last of a process's output, before it is deleted.
    pub drain: Duration,
    /// For the guest to power off by itself.
    pub shutdown: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(30),
            call: Duration::from_secs(10),
            create: Duration::from_secs(60),
            drain: Duration::from_secs(10),
            shutdown: Duration::from_secs(2),
        }
    }
}

/// Starts a sandbox's owner task, and with it the VM. Must be called inside a tokio runtime.
pub fn spawn(_options: SandboxOptions) -> SandboxHandle {
    let (inputs, mut received) = mpsc::unbounded_channel();
    let (end, ended) = watch::channel(false);
    tokio::spawn(async move {
        while received.recv().await.is_some() {}
        end.send_replace(true);
    });
    SandboxHandle::new(inputs, ended)
}
