// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a sandbox is asked for, and what it answers.

use std::path::PathBuf;

use agent_client::StdioPaths;
use agent_proto::api;
use ids::{ContainerId, ExecId};
pub use task_state::KillScope;
use task_state::{Exit, Pid, ProcessId, Status};

/// containerd's `Create`, or the operator's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateTask {
    /// The container's id.
    pub container: ContainerId,
    /// The bundle directory, with `config.json` in it.
    pub bundle: PathBuf,
    /// The mounts that make up the rootfs.
    pub rootfs: Vec<RootfsMount>,
    /// Where init's streams go.
    pub stdio: StdioPaths,
    /// Set for a debugging shell, which has no bundle; containerd's tasks have none.
    pub shell: Option<Shell>,
}

/// A debugging shell: a container with the guest's own processes, network and files in sight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The environment variable `TERM`; empty for none.
    pub term: String,
}

/// A mount as a snapshotter hands it over (containerd's `types.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// "overlay", "bind", "ext4", "erofs", ...
    pub fs_type: String,
    /// The device or directory.
    pub source: String,
    /// Relative to the rootfs; mostly empty.
    pub target: String,
    /// As mount(8) takes them.
    pub options: Vec<String>,
}

/// containerd's `Exec`: registers a further process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecTask {
    /// The container.
    pub container: ContainerId,
    /// The exec's id.
    pub exec: ExecId,
    /// The OCI runtime spec's `Process`, as JSON.
    pub process_json: Vec<u8>,
    /// Where the process's streams go.
    pub stdio: StdioPaths,
}

/// containerd's answer to `State`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// The process.
    pub process: ProcessId,
    /// The container's bundle directory.
    pub bundle: PathBuf,
    /// 0 before there is a process.
    pub pid: Pid,
    /// Created, running, stopped, or about to be paused or paused.
    pub status: Status,
    /// Where the streams go.
    pub stdio: StdioPaths,
    /// Set once stopped.
    pub exit: Option<Exit>,
}

/// containerd's answer to `Delete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// The number that the process had.
    pub pid: Pid,
    /// How and when it ended.
    pub exit: Exit,
}

/// One line of containerd's answer to `Pids`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// The process's number.
    pub pid: Pid,
    /// The exec that it is, if containerd started it as one.
    pub exec: Option<ExecId>,
}

/// What answers `Stats`.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskStats {
    /// The cgroup's figures.
    pub cgroup: CgroupStats,
    /// The pod's network interfaces, for the container that stands for the pod; none for its other containers, which
    /// share them.
    pub interfaces: Vec<InterfaceCounters>,
}

/// Whose cgroup it is.
#[derive(Debug, Clone, PartialEq)]
pub enum CgroupStats {
    /// A container's in the guest.
    Guest(Box<api::ContainerStats>),
    /// The sandbox container stands for the VM: its figures are those of the host processes of the pod.
    Host,
}

/// What has passed through an interface of the pod, as the pod sees it (Linux, Documentation/networking/statistics.rst).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Its name.
    pub name: String,
    /// What the pod has received.
    pub received: Traffic,
    /// What the pod has sent.
    pub sent: Traffic,
}

/// One direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of the packets below.
    pub bytes: u64,
    /// Packets that have passed.
    pub packets: u64,
    /// Packets that were broken.
    pub errors: u64,
    /// Packets for which there was no room.
    pub dropped: u64,
}
