// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Ends a test that hangs: it then fails by itself, is named, and leaves the logs that say why.

use std::fs;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use crate::processes::{all, named};
use crate::scale::count;

/// How long a test may take. Several times what the longest takes on a slow machine.
const TEST_LIMIT: Duration = Duration::from_secs(600);

/// How many times as long in a whole soak.
const SOAK: u32 = 20;

/// How long the shims may take to log what they know.
const DUMP_TIME: Duration = Duration::from_secs(5);

/// Watches one test until it is dropped.
#[derive(Debug)]
pub(crate) struct Watchdog {
    leash: Option<Sender<()>>,
    thread: Option<JoinHandle<bool>>,
}

impl Watchdog {
    pub(crate) fn new(test: &str) -> Self {
        let (leash, pulled) = channel();
        let test = test.to_owned();
        let limit = TEST_LIMIT * count(1, SOAK);
        let thread = thread::spawn(move || {
            let hangs = pulled.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if hangs {
                eprintln!("{test} hangs: not done within {limit:?}");
                end_what_it_waits_for();
            }
            hangs
        });
        Self {
            leash: Some(leash),
            thread: Some(thread),
        }
    }

    /// Ends the watch; whether the test had to be ended.
    pub(crate) fn call_off(&mut self) -> bool {
        self.leash = None;
        self.thread
            .take()
            .is_some_and(|thread| thread.join().unwrap_or(true))
    }
}

/// The commands that the test has started, and the shims that they may wait for, with a dump of those first.
fn end_what_it_waits_for() {
    let shims = named("containerd-shim-coffer-v2");
    for id in shims.iter().chain(&named("coffer-vmm")) {
        show_threads(*id);
    }
    for shim in &shims {
        let _gone = kill(Pid::from_raw(*shim), Signal::SIGUSR1);
    }
    // Nothing says when a log has been written.
    thread::sleep(DUMP_TIME);
    let own = getpid().as_raw();
    let commands = all()
        .into_iter()
        .filter(|(_, process)| process.parent == own);
    for id in commands.map(|(id, _)| id).chain(shims) {
        let _gone = kill(Pid::from_raw(id), Signal::SIGKILL);
    }
}

/// Where each thread of a process waits.
fn show_threads(id: i32) {
    let threads = fs::read_dir(format!("/proc/{id}/task"));
    for thread in threads.into_iter().flatten().flatten() {
        let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        eprintln!(
            "{id}: {} {} {}",
            read("comm").trim(),
            read("wchan").trim(),
            read("syscall").trim()
        );
    }
}
