// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Commands with a deadline.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long anything may take. Generous: the nested node is slow, and other work may run beside it.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// How often a condition without an event of its own is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; 128 plus the signal if one ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    /// The same, if the command succeeded.
    ///
    /// # Panics
    /// With both outputs, if it did not.
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }
}

/// Starts a command with piped output.
///
/// # Panics
/// If it cannot be started.
pub fn spawn(program: &str, arguments: &[&str]) -> Child {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {program} {arguments:?}: {error}"))
}

/// Runs a command to its end, with an empty stdin.
///
/// # Panics
/// If it is not done within [`DEADLINE`]; it is killed then.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    run_with_input(program, arguments, b"")
}

/// Runs a command to its end, with `input` on its stdin.
///
/// # Panics
/// If it is not done within [`DEADLINE`]; it is killed then.
pub fn run_with_input(program: &str, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = spawn(program, arguments);
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        // A command that ends without reading its input is none of ours to judge.
        let _ = stdin.write_all(&input);
    });
    let stdout = collect(child.stdout.take().expect("stdout is piped"));
    let stderr = collect(child.stderr.take().expect("stderr is piped"));
    let code = wait(&mut child, &format!("{program} {arguments:?}"));
    writer.join().expect("the writer does not panic");
    let text = |bytes: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&bytes.join().expect("the reader does not panic")).into_owned()
    };
    Output {
        code,
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

/// Waits for a child within [`DEADLINE`] and gives its exit code, 128 plus the signal if one ended it.
///
/// # Panics
/// If it is not done in time; it is killed then.
pub(crate) fn wait(child: &mut Child, what: &str) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("open a pidfd");
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    let limit = Timespec::try_from(DEADLINE).expect("a timespec");
    if poll(&mut ended, Some(&limit)).expect("wait for a child") == 0 {
        child.kill().expect("kill a child");
        panic!("{what} took longer than {DEADLINE:?}");
    }
    let status = child.wait().expect("the status of a child");
    let code = status.code();
    code.unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// With `what`, if it does not within [`DEADLINE`].
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        thread::sleep(POLL);
    }
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("read a child's output");
        bytes
    })
}
