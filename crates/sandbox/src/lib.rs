// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The one owner task of a pod: runs its VM and its tasks, and tells containerd.
//!
//! ```text
//!  SandboxHandle ── Request ──┐                         ┌── TaskEvent ──> EventSink (in order)
//!  the VM's task ── Input ────┼──> Owner ──> TaskTable ─┤
//!  work (make, start, ...) ───┘      ^      (decides)   └── Effect ──> work, on tasks of its own
//!                                    └───────────── Input ──────────────────┘
//! ```
//!
//! * One task owns the sandbox and never waits; what takes time runs beside it and has a bound.
//! * The VM is started with the sandbox, before any container is asked for; or when it is asked for, where the pod is
//!   described only after the sandbox is there.
//! * Each phase of making a container undoes what it did if it fails or is told to stop. [`SandboxHandle::terminate`] ends
//!   everything from any phase, any number of times, whoever has died before.
//! * The VM ends when the sandbox container does, when the last task is deleted, or by itself; every task that lives
//!   then exits with 137, once.
#![forbid(unsafe_code)]

mod convert;
mod creation;
mod disks;
mod dump;
mod effects;
mod error;
mod event;
mod handle;
mod host;
mod host_folders;
mod input;
mod live;
mod oom_score;
mod owner;
mod phase;
mod record;
mod request;
mod requests;
mod sizing;
mod stats;
#[cfg(test)]
mod tests;
mod vm;
mod work;
mod write_back;

pub use agent_client::{StdioPaths, TerminalSize};
pub use error::{SandboxError, SandboxErrorKind};
pub use event::{EventSink, TaskEvent};
pub use handle::SandboxHandle;
pub use host::{
    ContainerKind, ContainerPlan, GuestContainer, GuestDisk, GuestRootfs, Host, PodPlan,
};
pub use hypervisor::Console;
pub use owner::{Boot, Deadlines, SandboxOptions, spawn};
pub use request::{
    CgroupStats, CreateTask, Deleted, ExecTask, InterfaceCounters, KillScope, ProcessInfo,
    ProcessState, RootfsMount, Shell, TaskStats, Traffic,
};
pub use task_state::{Exit, Pid, ProcessId, Status};
