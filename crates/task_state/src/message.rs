// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What goes into the table and what comes out of it.

use std::time::SystemTime;

use ids::{ContainerId, ExecId, Generation};

use crate::denied::Denied;
use crate::process::{Exit, Pid, ProcessId};

/// Names a request whose answer comes later. The caller chooses it and never uses it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Whom a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillScope {
    /// The process itself.
    Process,
    /// Every process of the container.
    All,
}

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// CRI's sandbox container: it stands for the VM, has no process in the guest, and ends by a signal that would end one.
    Sandbox,
    /// A container whose init runs in the guest.
    Guest,
}

/// What the table is told: what containerd asks for, and what became of the work that the table had asked for.
/// `E` is why such work failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input<E> {
    /// Make a task.
    Create(ContainerId, Ticket),
    /// Register an exec. Needs no ticket: it is done or denied at once.
    AddExec(ContainerId, ExecId),
    /// Start an init or exec.
    Start(ProcessId, Ticket),
    /// Tell how a process ended, once it has.
    Wait(ProcessId, Ticket),
    /// Send a signal.
    Kill {
        /// To whom.
        process: ProcessId,
        /// Which; 0 only asks whether the process lives.
        signal: u32,
        /// To the process alone or to all of its container.
        scope: KillScope,
        /// For the answer.
        ticket: Ticket,
    },
    /// Forget a process that has ended or never ran.
    Delete(ProcessId, Ticket),
    /// Freeze a container.
    Pause(ContainerId, Ticket),
    /// Let a frozen container go on.
    Resume(ContainerId, Ticket),

    /// [`Effect::Create`] came to this.
    Created {
        /// The container.
        container: ContainerId,
        /// As in the effect.
        generation: Generation,
        /// Its role and its number; on failure nothing of it is left.
        result: Result<(Role, Pid), E>,
    },
    /// [`Effect::Start`] came to this.
    Started {
        /// The process.
        process: ProcessId,
        /// As in the effect.
        generation: Generation,
        /// An exec's number; an init keeps the one it has.
        result: Result<Option<Pid>, E>,
    },
    /// [`Effect::Pause`] came to this; on failure the container goes on.
    Paused {
        /// The container.
        container: ContainerId,
        /// As in the effect.
        generation: Generation,
        /// Why it could not be frozen.
        result: Result<(), E>,
    },
    /// [`Effect::Resume`] came to this; on failure the container is still frozen.
    Resumed {
        /// The container.
        container: ContainerId,
        /// As in the effect.
        generation: Generation,
        /// Why it could not go on.
        result: Result<(), E>,
    },
    /// [`Effect::Remove`] is done.
    Removed {
        /// The process.
        process: ProcessId,
        /// As in the effect.
        generation: Generation,
    },
    /// The guest says that a process has ended.
    Exited {
        /// The process.
        process: ProcessId,
        /// Tells it from an earlier one of the same name.
        generation: Generation,
        /// How and when.
        exit: Exit,
    },
    /// The guest says that the OOM killer has struck in a container.
    OutOfMemory(ContainerId),
    /// The VM has ended, and everything in it.
    VmGone,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect<E> {
    /// Tell containerd.
    Publish(Event),
    /// Answer a request.
    Answer(Ticket, Answer<E>),
    /// Make the container and its init; end with [`Input::Created`].
    Create(ContainerId, Generation),
    /// Give up on a [`Effect::Create`] as soon as can be; it still ends with [`Input::Created`].
    AbortCreate(ContainerId, Generation),
    /// Let a process run; end with [`Input::Started`].
    Start(ProcessId, Generation),
    /// Send a signal in the guest, and answer the ticket, if there is one, with what came of it.
    Signal {
        /// To whom.
        process: ProcessId,
        /// Which.
        generation: Generation,
        /// The signal.
        signal: u32,
        /// To the process alone or to all of its container.
        scope: KillScope,
        /// Whom to answer.
        ticket: Option<Ticket>,
    },
    /// Freeze everything in a container; end with [`Input::Paused`].
    Pause(ContainerId, Generation),
    /// Let everything in a container go on; end with [`Input::Resumed`].
    Resume(ContainerId, Generation),
    /// Pass on the last of a process's output, and let go of what it has in the guest and on the host; end with
    /// [`Input::Removed`].
    Remove(ProcessId, Generation),
    /// The sandbox container has ended: end the VM.
    EndVm,
}

/// What a ticket gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<E> {
    /// To `Create` and `Start`: the process's number.
    Pid(Pid),
    /// To `Wait`.
    Exit(Exit),
    /// To `Delete`: the process's number, and how and when it ended.
    Deleted(Pid, Exit),
    /// To `Kill`, `Pause` and `Resume`.
    Done,
    /// The work for it failed.
    Failed(E),
    /// The state of things forbids it by now.
    Denied(Denied),
}

/// What containerd is told. Within one container the order is: `Created`, `Started`, any number of execs
/// (`ExecAdded`, `ExecStarted`, `Exited`) and pauses (`Paused`, `Resumed`), `OutOfMemory`, `Exited`, `Deleted`; containerd
/// docs/runtime-v2.md, "Events". A paused container that is killed exits without being resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A task was made.
    Created(ContainerId, Pid),
    /// A task's init runs.
    Started(ContainerId, Pid),
    /// An exec was registered.
    ExecAdded(ContainerId, ExecId),
    /// An exec runs.
    ExecStarted(ContainerId, ExecId, Pid),
    /// The OOM killer has struck; once for each task.
    OutOfMemory(ContainerId),
    /// Nothing of a container runs any more.
    Paused(ContainerId),
    /// A paused container goes on.
    Resumed(ContainerId),
    /// A process has ended.
    Exited(ProcessId, Pid, Exit),
    /// A task is gone.
    Deleted(ContainerId, Pid, Exit),
}

/// A process as the table sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Tells the process from an earlier one of the same name.
    pub generation: Generation,
    /// 0 before there is a process.
    pub pid: Pid,
    /// As containerd may see it.
    pub status: crate::Status,
    /// Where it is in the table's own states, for dumps.
    pub phase: &'static str,
    /// Set once stopped.
    pub exit: Option<Exit>,
}

impl Exit {
    /// Ended with the VM, or before it could run, at `at`.
    pub(crate) fn killed(at: SystemTime) -> Self {
        Self {
            status: Self::KILLED,
            at,
        }
    }

    /// Never ran.
    pub(crate) fn never_started(at: SystemTime) -> Self {
        Self {
            status: Self::NEVER_STARTED,
            at,
        }
    }
}
