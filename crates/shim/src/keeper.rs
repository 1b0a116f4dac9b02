// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Who cleans up when `start` and the shim are killed before containerd knows the shim.
//!
//! ```text
//! start ──── forks ────> keeper ── end of file ──> removes what the two have made
//!   └ hold ─ hand-over ─> shim ──── let go ─────────> ends
//! ```
//!
//! containerd calls `delete` for a shim to which it has connected; to one that dies before, it never comes back. So
//! `start` forks before it makes anything, and the child waits for the end of all holds on it. The shim lets go with the
//! first container that containerd asks it for.
#![expect(
    unsafe_code,
    reason = "std cannot fork, and the keeper is to cost no exec"
)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::unistd::{ForkResult, fork};
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::delete;
use crate::process::ProcessIdentity;
use crate::state_dir::StateDir;

/// While one of these is open, the keeper waits.
#[derive(Debug)]
pub(crate) struct Hold(UnixStream);

impl Hold {
    /// Tells the keeper that containerd knows the shim. May be repeated.
    pub(crate) fn let_go(&self) {
        // It has ended already, or was killed.
        let _gone = (&self.0).write_all(b"k");
    }
}

impl AsFd for Hold {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Hold {
    fn from(end: OwnedFd) -> Self {
        Self(end.into())
    }
}

/// The keeper, as its parent has it.
#[derive(Debug)]
pub(crate) struct Keeper {
    process: Pid,
    hold: Hold,
}

impl Keeper {
    /// Forks a keeper of what the process `start`, this one, makes and records in `state`.
    ///
    /// # Errors
    /// Those of socketpair(2) and fork(2).
    pub(crate) fn fork(state: &StateDir, start: ProcessIdentity) -> io::Result<Self> {
        let (hold, end) = UnixStream::pair()?;
        debug_assert!(is_alone(), "`start` has one thread");
        // SAFETY: this process has one thread, so no lock is held by a thread that the child has not.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                process: Pid::from_raw(child.as_raw()).ok_or(io::ErrorKind::InvalidData)?,
                hold: Hold(hold),
            }),
            ForkResult::Child => {
                drop(hold);
                keep(end, state, start)
            }
        }
    }

    /// What the shim is to hold too.
    pub(crate) fn hold(&self) -> &Hold {
        &self.hold
    }

    /// Has it clean up, and waits until it has. Nobody else may hold it.
    pub(crate) fn clean_up(self) {
        drop(self.hold);
        // If it was killed, the next `start` cleans up.
        let _gone = waitpid(Some(self.process), WaitOptions::empty());
    }
}

fn keep(mut end: UnixStream, state: &StateDir, start: ProcessIdentity) -> ! {
    // Without it `start` would seem to go on for containerd, which waits until nobody has its output open.
    if detach().is_ok() && !matches!(end.read(&mut [0]), Ok(1)) {
        delete::abandon(state, start);
    }
    std::process::exit(0)
}

fn detach() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::process::setsid()?;
    std::env::set_current_dir("/")
}

fn is_alone() -> bool {
    fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1)
}
