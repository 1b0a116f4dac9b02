// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The thread that starts a VMM, waits for its end and reaps it.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hypervisor::{DriverError, DriverErrorKind};
use ids::SandboxId;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;
use tokio::time::timeout;
use vmm::control::ControlSocket;

/// Stack of the thread; it only waits.
const STACK_BYTES: usize = 64 << 10;
/// How long the host may take to start the program: one on a file system that is gone takes for ever.
const SPAWN_DEADLINE: Duration = Duration::from_secs(20);
/// What is kept of a VMM's standard error: a panic's message.
const MAX_STDERR_BYTES: u64 = 2048;

/// A VMM process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pidfd: Arc<OwnedFd>,
}

/// How a VMM process ended.
#[derive(Debug)]
pub(crate) struct ProcessEnd {
    pub(crate) status: Option<ExitStatus>,
    pub(crate) stderr: String,
}

impl Process {
    /// Sends SIGKILL; nothing if the process is gone.
    pub(crate) fn kill(&self) {
        match pidfd_send_signal(&*self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, %error, "cannot kill the VMM"),
        }
    }
}

/// Starts a VMM with `socket` as its standard input. The receiver has its end once it is reaped.
///
/// # Errors
/// [`DriverErrorKind::Node`] if the program cannot be started.
pub(crate) async fn start(
    program: &Path,
    sandbox: &SandboxId,
    socket: ControlSocket,
) -> Result<(Process, oneshot::Receiver<ProcessEnd>), DriverError> {
    let mut command = Command::new(program);
    command
        .arg(sandbox.to_string())
        .env_clear()
        .stdin(Stdio::from(socket.into_fd()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let failed = |source: std::io::Error| {
        let text = format!(
            "cannot start {}: check that it is installed",
            program.display()
        );
        DriverError::new(DriverErrorKind::Node, text).because(source)
    };
    let (send_process, process) = oneshot::channel();
    let (send_end, end) = oneshot::channel();
    thread::Builder::new()
        .name("vmm-guardian".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || guard(command, send_process, send_end))
        .map_err(failed)?;
    // One that comes later finds nobody to take it, and is killed.
    match timeout(SPAWN_DEADLINE, process).await {
        Ok(Ok(Ok(process))) => Ok((process, end)),
        Ok(Ok(Err(source))) => Err(failed(source)),
        Ok(Err(_)) => Err(failed(std::io::ErrorKind::BrokenPipe.into())),
        Err(elapsed) => Err(failed(elapsed.into())),
    }
}

fn guard(
    mut command: Command,
    process: oneshot::Sender<std::io::Result<Process>>,
    end: oneshot::Sender<ProcessEnd>,
) {
    let spawned = command.spawn().and_then(|mut child| match open(&child) {
        Ok(process) => Ok((child, process)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    });
    // The command holds the VMM's end of the control socket.
    drop(command);
    match spawned {
        Ok((mut child, opened)) => {
            if let Err(Ok(process)) = process.send(Ok(opened)) {
                process.kill(); // the launch was given up
            }
            let status = child.wait().ok();
            let stderr = child.stderr.take().map(last_words).unwrap_or_default();
            let _ = end.send(ProcessEnd { status, stderr });
        }
        Err(error) => {
            let _ = process.send(Err(error));
        }
    }
}

/// The child is not reaped yet, so its pid is still its own.
fn open(child: &Child) -> std::io::Result<Process> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(Process {
        pid: child.id(),
        pidfd: Arc::new(pidfd),
    })
}

/// What the process has left in the pipe, without waiting for others who may hold its other end.
fn last_words(stderr: ChildStderr) -> String {
    if fcntl_setfl(&stderr, OFlags::NONBLOCK).is_err() {
        return String::new();
    }
    let mut bytes = Vec::new();
    let _ = stderr.take(MAX_STDERR_BYTES).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
