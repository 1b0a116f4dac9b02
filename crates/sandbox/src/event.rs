// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a sandbox tells containerd.

use std::sync::Arc;

use ids::{ContainerId, ExecId};
use task_state::{Exit, Pid, ProcessId};

use crate::request::CreateTask;

/// Takes a sandbox's events, in the order in which containerd must get them (containerd docs/runtime-v2.md, "Events").
///
/// Called from the sandbox's owner task: `publish` must neither block nor fail. An implementation queues, and retries in
/// order.
pub trait EventSink: Send + Sync {
    /// Queues `event`.
    fn publish(&self, event: TaskEvent);
}

/// A task's event; each has containerd's topic in its description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskEvent {
    /// `/tasks/create`
    Created {
        /// What was asked for.
        request: Arc<CreateTask>,
        /// The task's number.
        pid: Pid,
    },
    /// `/tasks/start`
    Started {
        /// The container.
        container: ContainerId,
        /// The task's number.
        pid: Pid,
    },
    /// `/tasks/exec-added`
    ExecAdded {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// `/tasks/exec-started`
    ExecStarted {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
        /// The exec's number.
        pid: Pid,
    },
    /// `/tasks/oom`
    OutOfMemory {
        /// The container.
        container: ContainerId,
    },
    /// `/tasks/paused`
    Paused {
        /// The container.
        container: ContainerId,
    },
    /// `/tasks/resumed`
    Resumed {
        /// The container.
        container: ContainerId,
    },
    /// `/tasks/exit`; once for each process, after its start, and for an init after all its execs'.
    Exited {
        /// The process; its id in the event is the exec's, or the container's for an init.
        process: ProcessId,
        /// The process's number.
        pid: Pid,
        /// How and when.
        exit: Exit,
    },
    /// `/tasks/delete`; for inits only.
    Deleted {
        /// The container.
        container: ContainerId,
        /// The task's number.
        pid: Pid,
        /// How and when init ended.
        exit: Exit,
    },
}
