// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A process that may be signalled later without hitting another one that has got its number.
//!
//! A pid is used again; a pid with the process's start time is not. The time is read after a pidfd was opened, so the
//! pidfd is that process's or the process is gone.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Has the OOM killer spare this process (proc(5)): the shim is small, and tells what became of the pod. Its children
/// inherit that, until the sandbox gives them the pod's own value.
///
/// # Errors
/// Those of writing to the file; it takes CAP_SYS_RESOURCE.
pub(crate) fn hide_from_oom_killer() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

/// What names a process beyond its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    pub(crate) pid: i32,
    /// In clock ticks since boot (proc(5), field 22 of `/proc/pid/stat`).
    pub(crate) start_time: u64,
}

impl ProcessIdentity {
    /// The identity of the process that has `pid` now.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time =
            field(&stat, START_TIME).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self { pid, start_time })
    }

    /// The identity of a child of this process.
    pub(crate) fn of_child(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        if field(&stat, PARENT) != Some(u64::from(std::process::id())) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Self::of(pid)
    }

    /// This process.
    pub(crate) fn current() -> io::Result<Self> {
        Self::of(Pid::as_raw(Some(rustix::process::getpid())))
    }

    /// A hold on the process, or `None` if it has ended.
    pub(crate) fn open(self) -> io::Result<Option<Process>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match Self::of(self.pid) {
            Ok(found) if found == self => Ok(Some(Process { pidfd })),
            Ok(_) => Ok(None),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A process that was there when it was opened.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// Sends `signal`; a process that has ended is not an error.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits at most `limit` for the end; whether it came.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now().checked_add(limit);
        loop {
            let left = deadline.map_or(Duration::ZERO, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            let timeout = Timespec::try_from(left)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            match poll(
                &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
                Some(&timeout),
            ) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A process that ends while its file is read answers so.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Where a field of `/proc/pid/stat` is behind the name (proc(5) counts from 1, and the name is the second).
const PARENT: usize = 4 - 3;
const START_TIME: usize = 22 - 3;

/// A number in `/proc/pid/stat`. The name, in parentheses, may hold spaces and parentheses of its own.
fn field(stat: &str, index: usize) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn start_time_is_found_behind_a_hostile_name() {
        let fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        let stat = format!("7 (a) b (c) {}\n", fields.join(" "));
        assert_eq!(field(&stat, START_TIME), Some(22));
        assert_eq!(field("7 (a) S 1", START_TIME), None);
        assert_eq!(field("", START_TIME), None);
    }

    #[test]
    fn process_is_signalled_and_waited_for() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let process = identity.open().unwrap().unwrap();
        assert!(!process.wait(Duration::ZERO).unwrap());
        process.signal(Signal::KILL).unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert!(identity.open().unwrap().is_none());
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn only_a_child_is_taken_for_one() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(ProcessIdentity::of_child(pid).unwrap().pid, pid);
        assert!(ProcessIdentity::of_child(1).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn process_with_a_reused_pid_is_another_one() {
        let mut identity = ProcessIdentity::current().unwrap();
        assert!(identity.open().unwrap().is_some());
        identity.start_time += 1;
        assert!(identity.open().unwrap().is_none());
        assert!(
            ProcessIdentity {
                pid: 0,
                start_time: 0
            }
            .open()
            .unwrap()
            .is_none()
        );
    }
}
