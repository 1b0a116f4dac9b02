// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The one owner task of a pod.
#![forbid(unsafe_code)]

mod error;
mod event;
mod handle;
mod host;
mod input;
mod owner;
mod request;

pub use agent_client::{StdioPaths, TerminalSize};
pub use error::{SandboxError, SandboxErrorKind};
pub use event::{EventSink, TaskEvent};
pub use handle::SandboxHandle;
pub use host::{
    ContainerKind, ContainerPlan, GuestContainer, GuestDisk, GuestRootfs, Host, PodPlan,
};
pub use owner::{Deadlines, SandboxOptions, spawn};
pub use request::{
    CreateTask, Deleted, ExecTask, KillScope, ProcessInfo, ProcessState, RootfsMount,
};
pub use task_state::{Exit, Pid, ProcessId, Status};
