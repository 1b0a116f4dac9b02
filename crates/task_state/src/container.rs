// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One container's processes and the states they are in.

use std::collections::BTreeMap;

use ids::{ExecId, Generation};

use crate::message::{KillScope, Role, Ticket, View};
use crate::process::{Exit, Pid, Status};

/// Where a process is between its making and its removal.
///
/// ```text
/// init:  Creating ─> Created ─> Starting ─> Running ─> Held ─> Stopped ─> Removing
///            │          └───────────┼──────────┴──────────────^              │
///            v (failed)             └─ Failing ────────────────^              v
///          gone                                                             gone
///        Running ─> Pausing ─> Paused ─> Resuming ─> Running; each of them ends like Running
/// exec:  Registered ─> Starting ─> Running ─> Stopped ─> Removing ─> gone
/// ```
#[derive(Debug, Clone)]
pub(crate) enum State<E> {
    /// Init only: being made. Nobody has been told of it.
    Creating {
        ticket: Ticket,
        /// Killed or deleted meanwhile.
        interrupted: bool,
        /// Ended before the guest's answer arrived.
        ended: Option<Exit>,
    },
    /// An exec that has not been started: no process yet.
    Registered,
    /// An init that waits for its start.
    Created,
    /// The guest was asked to let it run.
    Starting {
        ticket: Ticket,
        /// Ended before the guest's answer arrived; reported after the start.
        ended: Option<Exit>,
    },
    /// Init only: its start failed and it is being killed.
    Failing {
        ticket: Ticket,
        error: E,
    },
    Running,
    /// Init only: the container is to be frozen. The guest is asked once no exec is being started: a process that is
    /// frozen before it runs would never answer.
    Pausing {
        ticket: Ticket,
        asked: bool,
    },
    /// Init only: nothing of the container runs.
    Paused,
    /// Init only: the guest was asked to let the container go on.
    Resuming {
        ticket: Ticket,
    },
    /// Init only: has ended, but is reported after the execs that are just being started.
    Held(Exit),
    Stopped(Exit),
    /// Being let go of.
    Removing(Exit),
}

/// A signal that waits for its process to be there.
#[derive(Debug, Clone)]
pub(crate) struct HeldKill {
    pub(crate) signal: u32,
    pub(crate) scope: KillScope,
    pub(crate) ticket: Ticket,
}

#[derive(Debug, Clone)]
pub(crate) struct Process<E> {
    pub(crate) generation: Generation,
    pub(crate) pid: Pid,
    pub(crate) state: State<E>,
    /// Who waits for its end.
    pub(crate) waits: Vec<Ticket>,
    /// Who waits for its removal.
    pub(crate) deletes: Vec<Ticket>,
    /// Exec only: signals that came while it was being started.
    pub(crate) kills: Vec<HeldKill>,
}

#[derive(Debug, Clone)]
pub(crate) struct Container<E> {
    pub(crate) role: Role,
    pub(crate) init: Process<E>,
    pub(crate) execs: BTreeMap<ExecId, Process<E>>,
    pub(crate) oom: Oom,
}

impl<E> Container<E> {
    /// An exec's view: it is paused with its container.
    pub(crate) fn exec_view(&self, exec: &Process<E>) -> View {
        let (mut view, init) = (exec.view(), self.init.view());
        if view.status == Status::Running && matches!(init.status, Status::Pausing | Status::Paused)
        {
            (view.status, view.phase) = (init.status, init.phase);
        }
        view
    }

    /// Whether an exec is just being started.
    pub(crate) fn starts_an_exec(&self) -> bool {
        self.execs.values().any(Process::is_starting)
    }
}

/// Whether containerd was told of an OOM kill. Once is enough: it only sets a flag, and a guest could send millions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Oom {
    None,
    /// To be told when the task may be spoken of.
    Held,
    Told,
}

impl<E> Process<E> {
    pub(crate) fn new(generation: Generation, state: State<E>) -> Self {
        Self {
            generation,
            pid: Pid::NONE,
            state,
            waits: Vec::new(),
            deletes: Vec::new(),
            kills: Vec::new(),
        }
    }

    /// How it ended, once containerd may know.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self.state {
            State::Stopped(exit) | State::Removing(exit) => Some(exit),
            _ => None,
        }
    }

    /// Init only: frozen, or about to be or to go on.
    pub(crate) fn is_paused(&self) -> bool {
        matches!(
            self.state,
            State::Pausing { .. } | State::Paused | State::Resuming { .. }
        )
    }

    pub(crate) fn is_starting(&self) -> bool {
        matches!(self.state, State::Starting { .. })
    }

    pub(crate) fn view(&self) -> View {
        let (status, phase) = match &self.state {
            State::Creating { .. } => (Status::Created, "creating"),
            State::Registered => (Status::Created, "registered"),
            State::Created => (Status::Created, "created"),
            State::Starting { .. } => (Status::Created, "starting"),
            State::Failing { .. } => (Status::Created, "failing"),
            State::Running => (Status::Running, "running"),
            State::Pausing { .. } => (Status::Pausing, "pausing"),
            State::Paused => (Status::Paused, "paused"),
            State::Resuming { .. } => (Status::Paused, "resuming"),
            State::Held(_) => (Status::Running, "held"),
            State::Stopped(_) => (Status::Stopped, "stopped"),
            State::Removing(_) => (Status::Stopped, "removing"),
        };
        View {
            generation: self.generation,
            pid: self.pid,
            status,
            phase,
            exit: self.exit(),
        }
    }
}
