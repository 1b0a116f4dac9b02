// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The seam to the node: what a sandbox has prepared on the host before the guest can use it.

use std::any::Any;
use std::net::TcpListener;

use agent_proto::api;
use hypervisor::{Disk, VmSpec};
use ids::Mib;
use pod_spec::{HostFolder, Limits, LiveVolume};
use pod_storage::{BlockVolume, EmptyDirVolume, WrittenBack};

use crate::error::SandboxError;
use crate::request::{CreateTask, InterfaceCounters};

/// Prepares what VM and containers are made of. Every method may block; the sandbox calls them on blocking threads, any
/// number at a time. A call that nobody waits for any more goes on, and its plan is dropped.
///
/// What a method has made on the host is undone by dropping the plan's `guard`, which happens after VM or container are
/// gone; a method that fails leaves nothing behind.
pub trait Host: Send + Sync {
    /// The pod's VM.
    ///
    /// # Errors
    /// Whatever keeps the pod from being run, in words for the user.
    fn plan_pod(&self) -> Result<PodPlan, SandboxError>;

    /// A container of the pod.
    ///
    /// # Errors
    /// Whatever keeps the container from being made, in words for the user.
    fn plan_container(&self, task: &CreateTask) -> Result<ContainerPlan, SandboxError>;

    /// The most memory that the VM can have within the pod's cgroup on the host, as that is now; `None` if it has no limit.
    ///
    /// # Errors
    /// The pod's cgroup cannot be found.
    fn memory_limit(&self) -> Result<Option<Mib>, SandboxError>;

    /// What has passed through the pod's network interfaces; none if it has none, or they are gone.
    fn interfaces(&self) -> Vec<InterfaceCounters> {
        Vec::new()
    }
}

/// A pod's VM, ready to be launched.
pub struct PodPlan {
    /// For the driver.
    pub vm: VmSpec,
    /// Memory that the VM has beyond its containers' limits.
    pub overhead: Mib,
    /// For the agent, once it is there.
    pub configure: api::ConfigureSandboxRequest,
    /// Takes the TCP connections to the pod's loopback on the host, for the guest; non-blocking. `None` where they cannot
    /// be taken.
    pub loopback: Option<TcpListener>,
    /// Undoes on drop what was made on the host.
    pub guard: Box<dyn Any + Send>,
}

/// A container, ready to be made.
pub struct ContainerPlan {
    /// What there is to make.
    pub kind: ContainerKind,
    /// Undoes on drop what was made on the host.
    pub guard: Box<dyn Any + Send>,
}

/// What a container is to the pod.
pub enum ContainerKind {
    /// CRI's sandbox container: it stands for the VM and has no process in the guest.
    Sandbox,
    /// A container in the guest.
    Guest(Box<GuestContainer>),
}

/// A container in the guest.
pub struct GuestContainer {
    /// The OCI runtime spec as JSON, translated for the guest.
    pub spec_json: Vec<u8>,
    /// How precious it is to the node's OOM killer (`process.oomScoreAdj`); `None` if nobody has said.
    pub oom_score_adj: Option<i32>,
    /// What it may use, to make the VM large enough; `None` for one that is to make do with what there is.
    pub limits: Option<Limits>,
    /// The rootfs.
    pub rootfs: GuestRootfs,
    /// Host files that go into guest memory.
    pub copied_mounts: Vec<api::CopiedMount>,
    /// Those of them that the host gets back when the container has ended.
    pub written_back: Vec<WrittenBack>,
    /// Volumes of the pod that are put into the guest and kept current.
    pub live: Vec<LiveVolume>,
    /// EmptyDirs that it mounts.
    pub volumes: Vec<EmptyDirVolume>,
    /// Parts of them that the container mounts.
    pub sub_paths: Vec<api::SubPath>,
    /// The host's own directories that it mounts.
    pub host_folders: Vec<HostFolder>,
    /// The host's block devices that it has.
    pub block_devices: Vec<BlockVolume>,
}

/// The root file system of a container in the guest.
pub enum GuestRootfs {
    /// Read-only images under an overlay, topmost first.
    Layered(Vec<GuestDisk>),
    /// One file system.
    Disk(GuestDisk),
}

/// A disk, and how the guest mounts it.
pub struct GuestDisk {
    /// For the driver.
    pub disk: Disk,
    /// "erofs", "ext4", "xfs".
    pub fs_type: String,
    /// As mount(8) takes them.
    pub mount_options: Vec<String>,
}
