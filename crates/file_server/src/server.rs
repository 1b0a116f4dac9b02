// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The server's process, and what its root holds.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::UnshareFlags;
use tokio::sync::{oneshot, watch};

use crate::{FileServerError, MAX_SHARES, Share, ShareName, mounts};

/// How long the server may take to build its jail; milliseconds on hardware.
const READY_DEADLINE: Duration = Duration::from_secs(20);
/// Stack of the guardian, which only waits.
const STACK_BYTES: usize = 64 << 10;
/// What is kept of the server's standard error.
const MAX_STDERR_BYTES: u64 = 2048;

/// How a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerExit {
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The end of what it said on standard error, without control characters.
    pub message: String,
}

impl fmt::Display for ServerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "the file server ended with exit code {code}")?,
            (None, Some(signal)) => write!(f, "the file server was ended by signal {signal}")?,
            (None, None) => f.write_str("the file server could not be waited for")?,
        }
        match self.message.trim() {
            "" => Ok(()),
            message => write!(f, ": {message}"),
        }
    }
}

/// A running file server; dropping it kills the process.
#[derive(Debug)]
pub struct FileServer {
    pid: u32,
    pidfd: OwnedFd,
    shares: Mutex<BTreeSet<ShareName>>,
    exit: watch::Receiver<Option<ServerExit>>,
}

impl FileServer {
    /// Starts `program`, shares `shares`, and answers the vhost-user connection for the VMM.
    ///
    /// # Errors
    /// [`FileServerError`]; the process is then gone.
    pub async fn spawn(
        program: &Path,
        shares: &[Share],
    ) -> Result<(Self, UnixStream), FileServerError> {
        let failed = |source: io::Error| FileServerError::Start {
            program: program.to_owned(),
            source,
        };
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|error| failed(error.into()))?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let (send_process, process) = oneshot::channel();
        let (send_exit, mut exit) = watch::channel(None);
        thread::Builder::new()
            .name("fs-guardian".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || guard(command, send_process, &send_exit))
            .map_err(failed)?;
        let (pid, pidfd) = match process.await {
            Ok(result) => result.map_err(failed)?,
            Err(_) => return Err(failed(io::ErrorKind::BrokenPipe.into())),
        };
        let server = Self {
            pid,
            pidfd,
            shares: Mutex::default(),
            exit: exit.clone(),
        };
        let ready = tokio::task::spawn_blocking(move || ready(&ours)).await;
        let connection = match ready.map_err(io::Error::other).and_then(|result| result) {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let exit = exit.wait_for(Option::is_some).await;
                let exit = exit.ok().and_then(|exit| exit.clone());
                let reason = exit.map_or_else(|| error.to_string(), |exit| exit.to_string());
                return Err(FileServerError::NotReady { reason });
            }
            Err(error) => {
                let reason = error.to_string();
                return Err(FileServerError::NotReady { reason });
            }
        };
        shares.iter().try_for_each(|share| server.add(share))?;
        Ok((server, connection))
    }

    /// Shares one more directory. It is there when this answers. Blocks for some mount system calls.
    ///
    /// # Errors
    /// [`FileServerError`]; nothing has changed then.
    pub fn add(&self, share: &Share) -> Result<(), FileServerError> {
        let mut shares = self.shares();
        if shares.contains(&share.name) {
            return Err(FileServerError::Exists {
                name: share.name.clone(),
            });
        }
        if shares.len() >= MAX_SHARES {
            return Err(FileServerError::TooMany);
        }
        mounts::add(self.pidfd.as_fd(), share)?;
        shares.insert(share.name.clone());
        Ok(())
    }

    /// Shares a directory no more; nothing if there is none of that name. What the guest has open stays open.
    ///
    /// # Errors
    /// [`FileServerError::Mount`].
    pub fn remove(&self, name: &ShareName) -> Result<(), FileServerError> {
        let mut shares = self.shares();
        if shares.contains(name) {
            mounts::remove(self.pidfd.as_fd(), name)?;
            shares.remove(name);
        }
        Ok(())
    }

    fn shares(&self) -> MutexGuard<'_, BTreeSet<ShareName>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the server's end. Any number of callers, also later.
    pub async fn wait(&self) -> ServerExit {
        let mut exit = self.exit.clone();
        let exit = exit.wait_for(Option::is_some).await;
        exit.ok()
            .and_then(|exit| exit.clone())
            .unwrap_or_else(|| ServerExit {
                code: None,
                signal: None,
                message: "its guardian is gone".to_owned(),
            })
    }

    /// Ends the server now and waits until it is gone. Idempotent.
    pub async fn kill(&self) -> ServerExit {
        self.signal();
        self.wait().await
    }

    fn signal(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, %error, "cannot kill the file server"),
        }
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.signal();
    }
}

/// What a guardian answers: process id and pidfd.
type Spawned = io::Result<(u32, OwnedFd)>;

/// Spawns the server, as the first process of a PID namespace, and reaps it. It is a thread and not a task because
/// `PR_SET_PDEATHSIG`, which the server sets, means the thread that spawned it, and because a thread that has left the PID
/// namespace for its children cannot come back.
fn guard(
    mut command: Command,
    process: oneshot::Sender<Spawned>,
    exit: &watch::Sender<Option<ServerExit>>,
) {
    let spawned =
        own_pid_namespace()
            .and_then(|()| command.spawn())
            .and_then(|mut child| match open(&child) {
                Ok(pidfd) => Ok((child, pidfd)),
                Err(error) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    Err(error)
                }
            });
    // The command holds the server's end of the socket.
    drop(command);
    match spawned {
        Ok((mut child, pidfd)) => {
            if process.send(Ok((child.id(), pidfd))).is_err() {
                let _ = child.kill(); // the spawn was given up
            }
            let status = child.wait().ok();
            let stderr = child.stderr.take().map(last_words).unwrap_or_default();
            exit.send_replace(Some(server_exit(status, stderr)));
        }
        Err(error) => {
            let _ = process.send(Err(error));
        }
    }
}

#[expect(unsafe_code, reason = "unshare has no safe wrapper")]
fn own_pid_namespace() -> io::Result<()> {
    // SAFETY: changes the namespace of this thread's future children, nothing else.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
    Ok(())
}

fn server_exit(status: Option<ExitStatus>, message: String) -> ServerExit {
    ServerExit {
        code: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        message,
    }
}

/// The child is not reaped yet, so its pid is still its own.
fn open(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// What the process has left in the pipe.
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

/// Waits for the server's one message.
fn ready(socket: &OwnedFd) -> io::Result<UnixStream> {
    let deadline = Timespec::try_from(READY_DEADLINE).map_err(io::Error::other)?;
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut fds, Some(&deadline)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let connection = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match (received.bytes, connection) {
        (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
        (_, Some(connection)) => Ok(UnixStream::from(connection)),
        (_, None) => Err(io::ErrorKind::InvalidData.into()),
    }
}
