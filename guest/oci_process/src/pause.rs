// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The first process of a pid namespace that containers share: it reaps whatever is orphaned in it, and does nothing else.

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{WaitOptions, wait};

/// The process's whole life. Called by the program's `main` and by nothing else; the namespace ends with the process, which
/// as its process 1 takes no signal from inside (pid_namespaces(7)).
pub fn pause_main() -> ExitCode {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    if ended.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        // One signal may stand for many children, and some may have ended before it was blocked.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if ended.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
