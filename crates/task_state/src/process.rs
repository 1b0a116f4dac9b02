// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What names a process, its number on the host, and how it ended.

use std::fmt;
use std::time::SystemTime;

use ids::{ContainerId, ExecId};

/// A process as containerd names it: a container's init, or an exec in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container: ContainerId,
    /// The exec, or `None` for the container's init.
    pub exec: Option<ExecId>,
}

impl ProcessId {
    /// The init of `container`.
    pub fn init(container: ContainerId) -> Self {
        Self {
            container,
            exec: None,
        }
    }

    /// The exec `exec` of `container`.
    pub fn exec(container: ContainerId, exec: ExecId) -> Self {
        Self {
            container,
            exec: Some(exec),
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

/// The number that containerd is given for a process: 0 before there is one.
///
/// It names no unrelated process of the host (docs/decisions/0004-pids.md): either the VMM's own, or a number above every
/// pid that a kernel can give out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Pid(u32);

/// Linux's `PID_MAX_LIMIT` on 64-bit machines: pids are below it, on the host and in the guest.
const PID_MAX_LIMIT: u32 = 4 * 1024 * 1024;

impl Pid {
    /// No process yet.
    pub const NONE: Self = Self(0);

    /// The host's own process that stands for a task without a guest process: the VMM.
    pub fn of_host_process(pid: u32) -> Self {
        Self(pid)
    }

    /// The number of a process in the guest, which is above every pid of the host. `None` if the guest named a pid that
    /// Linux cannot have given out.
    pub fn of_guest_process(guest_pid: u32) -> Option<Self> {
        (1..PID_MAX_LIMIT)
            .contains(&guest_pid)
            .then(|| Self(PID_MAX_LIMIT.saturating_add(guest_pid)))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 plus the signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    /// What everything that died with its VM reports: 128 + `SIGKILL`.
    pub const KILLED: u32 = 137;

    /// What a process reports that could never be started (containerd's `UnknownExitStatus`).
    pub const NEVER_STARTED: u32 = 255;
}

/// A task's state as containerd's `State` call shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Made, not started.
    Created,
    /// Started, not ended.
    Running,
    /// About to be frozen.
    Pausing,
    /// Frozen.
    Paused,
    /// Ended, not deleted.
    Stopped,
}

impl Status {
    /// The word for logs and dumps.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_pids_are_above_every_host_pid() {
        assert_eq!(Pid::of_guest_process(0), None);
        assert_eq!(Pid::of_guest_process(PID_MAX_LIMIT), None);
        assert_eq!(Pid::of_guest_process(u32::MAX), None);
        let lowest = Pid::of_guest_process(1).unwrap();
        let highest = Pid::of_guest_process(PID_MAX_LIMIT - 1).unwrap();
        assert!(lowest.get() > PID_MAX_LIMIT && highest > lowest);
        assert!(i32::try_from(highest.get()).is_ok(), "kill(2) takes an int");
    }

    #[test]
    fn processes_read_as_containerd_names_them() {
        let init = ProcessId::init("web".parse().unwrap());
        let exec = ProcessId::exec("web".parse().unwrap(), "probe".parse().unwrap());
        assert_eq!(init.to_string(), "container web");
        assert_eq!(exec.to_string(), "exec probe of container web");
    }
}
