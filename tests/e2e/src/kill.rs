// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What tests kill.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{eventually, run};
use crate::processes::{named, process_exists};

/// Kills a process and waits until it is gone.
///
/// # Panics
/// If it cannot be killed or does not go.
pub fn kill_9(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill a process");
    eventually("a killed process is gone", || {
        (!process_exists(pid)).then_some(())
    });
}

/// A node without containerd, until it is started again when this is dropped.
#[derive(Debug)]
pub struct ContainerdDown(());

impl ContainerdDown {
    /// Kills containerd.
    ///
    /// # Panics
    /// If there is not just one.
    pub fn kill() -> Self {
        let all = named("containerd");
        let [pid] = all.as_slice() else {
            panic!("containerd is to run once: {all:?}");
        };
        kill_9(*pid);
        Self(())
    }
}

impl Drop for ContainerdDown {
    /// Starts containerd as the node's boot did.
    fn drop(&mut self) {
        let start = "setsid containerd >> /run/containerd.log 2>&1 < /dev/null &";
        run("sh", &["-c", start]).success();
        eventually("containerd serves again", || {
            (run("ctr", &["version"]).code == 0).then_some(())
        });
    }
}
