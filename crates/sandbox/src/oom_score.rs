// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Which pod the node's OOM killer takes first: `/proc/PID/oom_score_adj` (proc(5)) of the processes that hold a pod's memory.
//!
//! kubelet gives each container a value by its pod's QoS class, from -997 (Guaranteed) to 1000 (BestEffort). Under runc the
//! container's processes have it; a container of a VM has its memory in the pod's VMM, which has the lowest value of its
//! containers, for a pod goes as a whole. containerd's own value for the sandbox container (-998), whose process is not
//! there, is none of them.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// The adjustment of a pod's processes on the host.
///
/// It only falls: a container that has gone leaves its value, as the scheduler, which reserves for a pod the most that an
/// init container or all others together ask for, leaves the pod its request.
#[derive(Debug, Default)]
pub(crate) struct OomScore(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The lowest of the containers' so far; `None` if none has said any.
    lowest: Option<i32>,
    /// The files of the pod's processes. One that is open means its process also when another has got its number.
    files: Vec<File>,
}

impl OomScore {
    /// The value now. Without a container that says another it is 0, whatever containerd's own is.
    pub(crate) fn adjustment(&self) -> i32 {
        self.lock().adjustment()
    }

    /// Gives a new process of the pod the pod's value, in place of the shim's, which it has inherited.
    pub(crate) fn add(&self, process: u32) {
        let path = format!("/proc/{process}/oom_score_adj");
        match File::options().write(true).open(path) {
            Ok(file) => {
                let mut state = self.lock();
                state.files.push(file);
                state.write();
            }
            Err(error) => warn(&error),
        }
    }

    /// A container is to be made with this value.
    pub(crate) fn lower(&self, wanted: i32) {
        let mut state = self.lock();
        state.lowest = Some(state.lowest.map_or(wanted, |lowest| lowest.min(wanted)));
        state.write();
    }

    /// Held while the files are written, so that the last value is the last that is written; procfs does not make anybody
    /// wait.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn adjustment(&self) -> i32 {
        self.lowest.unwrap_or_default()
    }

    fn write(&self) {
        let value = self.adjustment().to_string();
        for mut file in &self.files {
            match file.write_all(value.as_bytes()) {
                Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {} // it has ended
                Err(error) => warn(&error),
                Ok(()) => {}
            }
        }
    }
}

fn warn(error: &io::Error) {
    tracing::warn!(%error, "the OOM killer does not know how precious the pod is");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn score_of(child: &Child) -> String {
        fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).unwrap()
    }

    /// Values above those of the test itself, which anybody may set.
    #[test]
    fn lowest_of_the_containers_is_that_of_every_process() {
        let (mut vmm, mut server) = (sleeper(), sleeper());
        let score = OomScore::default();
        score.add(vmm.id());
        assert_eq!(score_of(&vmm), "0\n", "nobody has said anything");
        for (wanted, expected) in [(1000, "1000\n"), (500, "500\n"), (900, "500\n")] {
            score.lower(wanted);
            assert_eq!(score_of(&vmm), expected, "after {wanted}");
        }
        score.add(server.id());
        assert_eq!(score_of(&server), "500\n", "also of one that comes late");
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        score.lower(400);
        assert_eq!(score_of(&server), "400\n", "also when another has ended");
        assert_eq!(score.adjustment(), 400);
        server.kill().unwrap();
        server.wait().unwrap();
    }

    #[test]
    fn value_that_cannot_be_written_is_no_failure() {
        let mut child = sleeper();
        let score = OomScore::default();
        score.add(child.id());
        score.lower(1001);
        assert_eq!(score_of(&child), "0\n", "the kernel knows no such value");
        score.add(1 << 22);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
