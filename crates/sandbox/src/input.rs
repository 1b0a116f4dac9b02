// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Everything that a sandbox's owner task reads.

use std::any::Any;

use agent_client::{AgentEvent, TerminalSize};
use hypervisor::Console;
use ids::{ContainerId, DiskSerial, Generation, Limits};
use pod_storage::WrittenBack;
use task_state::{Exit, Pid, ProcessId, Role};
use tokio::sync::oneshot;

use crate::error::SandboxError;
use crate::request::{
    CreateTask, Deleted, ExecTask, KillScope, ProcessInfo, ProcessState, TaskStats,
};
use crate::vm::Failure;

/// Where the answer to a request goes. The caller may have gone away.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What the owner task reads, one at a time.
pub(crate) enum Input {
    /// A caller asks.
    Request(Request),
    /// A container was made, or not.
    Created(ContainerId, Generation, Result<Made, SandboxError>),
    /// A process was started, or not; an exec has a number of its own.
    Started(ProcessId, Generation, Result<Option<Pid>, SandboxError>),
    /// A container was frozen, or not.
    Paused(ContainerId, Generation, Result<(), SandboxError>),
    /// A container goes on, or does not.
    Resumed(ContainerId, Generation, Result<(), SandboxError>),
    /// A process was let go of.
    Removed(ProcessId, Generation),
    /// The guest tells; the sender is waited for before it is asked again.
    Guest(Vec<AgentEvent>, oneshot::Sender<()>),
    /// What an init left in its files is on the host, as far as it will ever be: its exit can be told.
    Settled(ProcessId),
    /// The VM has ended, or never came up; its task is done.
    VmGone(Failure),
}

/// A container that was made.
pub(crate) struct Made {
    pub(crate) role: Role,
    pub(crate) pid: Pid,
    /// Shares to give back when it is removed.
    pub(crate) disks: Vec<DiskSerial>,
    /// Files that the host gets back when it has ended.
    pub(crate) written_back: Vec<WrittenBack>,
    /// Undoes on drop what was made on the host.
    pub(crate) guard: Box<dyn Any + Send>,
}

/// What a caller asks; see the methods of [`crate::SandboxHandle`].
#[derive(Debug)]
pub(crate) enum Request {
    Boot(Reply<()>),
    Create(CreateTask, Reply<Pid>),
    Start(ProcessId, Reply<Pid>),
    Exec(ExecTask, Reply<()>),
    State(ProcessId, Reply<ProcessState>),
    Wait(ProcessId, Reply<Exit>),
    Kill(ProcessId, u32, KillScope, Reply<()>),
    Delete(ProcessId, Reply<Deleted>),
    ResizePty(ProcessId, TerminalSize, Reply<()>),
    CloseStdin(ProcessId, Reply<()>),
    Pids(ContainerId, Reply<Vec<ProcessInfo>>),
    Pause(ContainerId, Reply<()>),
    Resume(ContainerId, Reply<()>),
    Update(ContainerId, Vec<u8>, Reply<()>),
    SetLimits(Limits, Reply<()>),
    Stats(ContainerId, Reply<TaskStats>),
    VmEnded(Reply<()>),
    Shutdown(Reply<()>),
    Terminate,
    Dump(Reply<serde_json::Value>),
    Console(Option<u64>, Reply<Console>),
}
