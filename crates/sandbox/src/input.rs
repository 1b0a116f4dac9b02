// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Everything that a sandbox's owner task reads.

use agent_client::TerminalSize;
use ids::ContainerId;
use task_state::{Exit, Pid, ProcessId};
use tokio::sync::oneshot;

use crate::error::SandboxError;
use crate::request::{CreateTask, Deleted, ExecTask, KillScope, ProcessInfo, ProcessState};

/// Where the answer to a request goes. The caller may have gone away.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What the owner task reads, one at a time.
#[derive(Debug)]
pub(crate) enum Input {
    /// A caller asks.
    Request(Request),
}

/// What a caller asks; see the methods of [`crate::SandboxHandle`].
#[derive(Debug)]
pub(crate) enum Request {
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
    Shutdown(Reply<()>),
    Terminate,
    Dump(Reply<serde_json::Value>),
}
