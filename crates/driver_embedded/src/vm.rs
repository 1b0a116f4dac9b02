// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One VM of this driver.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hypervisor::{
    Adjustable, AttachedDisk, AttachedFileSystem, Console, Disk, DriverError, DriverErrorKind,
    FileSystem, Resize, Resized, RunningVm, VmExit, VmProcesses, VmSpec, VmTarget,
};
use ids::{Bytes, DiskSerial, Limits, Mib, VcpuCount, VsockPort};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use vmm::ExitCode;
use vmm::control::{Answer, ControlSocket, Request};
use vmm::layout;

use crate::disk_config;
use crate::guardian::{self, Process, ProcessEnd};
use crate::guest_memory::SharedMemory;
use crate::link::{LastWords, Link, Silence, WAITING_CONNECTIONS, gone};
use crate::out_of_memory;
use crate::vsock::GuestSocket;

/// signal(7)
const SIGKILL: i32 = 9;

/// How long building a VM may take; milliseconds on hardware, most of a second in a nested emulator under load.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long every other call may take. Milliseconds, but a node that starts more pods than it has processors for makes its
/// VMMs wait for their turn; one that has died is noticed at once in any case.
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// How long moving guest memory may take: a guest of tens of GiB that uses all of it copies them.
const SHARE_DEADLINE: Duration = Duration::from_secs(60);
/// How often the VMM is asked how far the guest has come, at first and at last.
const RESIZE_POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// How long the last messages of a VMM that is gone may take to be read.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// A VM whose VMM process has been started. Dropping it kills the process.
pub(crate) struct EmbeddedVm {
    process: Process,
    /// All memory that the guest can ever have.
    memory: Bytes,
    link: Arc<Link>,
    socket: GuestSocket,
    connections: Mutex<mpsc::Receiver<(VsockPort, UnixStream)>>,
    exit: watch::Receiver<Option<VmExit>>,
    killed: Arc<AtomicBool>,
}

impl EmbeddedVm {
    /// Starts a VMM, which then waits for its configuration.
    ///
    /// # Errors
    /// [`DriverErrorKind::Node`] if it cannot be started.
    pub(crate) async fn spawn(
        program: &Path,
        spec: &VmSpec,
        socket: GuestSocket,
    ) -> Result<Self, DriverError> {
        let failed = |source: std::io::Error| {
            let text = "cannot make a control socket";
            DriverError::new(DriverErrorKind::Failed, text).because(source)
        };
        let (ours, theirs) = ControlSocket::pair().map_err(failed)?;
        let link = Arc::new(Link::new(ours).map_err(failed)?);
        let (process, end) = guardian::start(program, &spec.sandbox, theirs).await?;
        let (send_connections, connections) = mpsc::channel(WAITING_CONNECTIONS);
        let (send_exit, exit) = watch::channel(None);
        let killed = Arc::new(AtomicBool::new(false));
        let listener = tokio::spawn({
            let (link, process) = (Arc::clone(&link), process.clone());
            async move {
                if link.listen(send_connections).await == Silence::Violation {
                    process.kill();
                }
            }
        });
        tokio::spawn(watch_end(
            end,
            listener,
            Arc::clone(&link),
            Arc::clone(&killed),
            send_exit,
        ));
        Ok(Self {
            process,
            memory: all_memory(spec),
            link,
            socket,
            connections: Mutex::new(connections),
            exit,
            killed,
        })
    }

    /// Sends the configuration and waits until the vCPUs run.
    ///
    /// # Errors
    /// The VMM's refusal; the VMM is then on its way out.
    pub(crate) async fn start(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), DriverError> {
        match self.link.call(request, descriptors, START_DEADLINE).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == DriverErrorKind::Gone => {
                let text = format!("the VMM ended while it built the VM: {}", self.wait().await);
                Err(DriverError::new(DriverErrorKind::Failed, text))
            }
            Err(error) => {
                self.kill().await;
                Err(error)
            }
        }
    }

    async fn call(&self, request: Request) -> Result<Answer, DriverError> {
        self.link.call(request, &[], CALL_DEADLINE).await
    }

    async fn text(&self, request: Request) -> Result<String, DriverError> {
        match self.call(request).await? {
            Answer::Text(text) => Ok(text),
            Answer::Done | Answer::Attached { .. } | Answer::Size(_) | Answer::Console { .. } => {
                Err(unexpected())
            }
        }
    }

    async fn ask_for(&self, target: VmTarget) -> Result<Resized, DriverError> {
        let request = Request::Resize {
            vcpus: target.vcpus.get(),
            memory_mib: target.memory.0,
        };
        match self.call(request).await? {
            Answer::Size(size) => Ok(Resized {
                vcpus: VcpuCount::new(size.vcpus).ok_or_else(unexpected)?,
                memory: Mib(size.memory_mib),
                bind_device: size.device,
            }),
            Answer::Done | Answer::Attached { .. } | Answer::Text(_) | Answer::Console { .. } => {
                Err(unexpected())
            }
        }
    }
}

#[async_trait]
impl Resize for EmbeddedVm {
    async fn resize(&self, target: VmTarget, within: Duration) -> Result<Resized, DriverError> {
        let end = Instant::now().checked_add(within);
        let (mut pause, longest) = RESIZE_POLL;
        let mut now = self.ask_for(target).await?;
        let grows = now.memory < target.memory;
        loop {
            let done = if grows {
                now.memory >= target.memory
            } else {
                now.memory <= target.memory
            };
            if done || end.is_none_or(|end| Instant::now() >= end) {
                return Ok(now);
            }
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(longest);
            now = self.ask_for(target).await?;
        }
    }
}

/// What a VM starts with, and all that can be plugged into it.
fn all_memory(spec: &VmSpec) -> Bytes {
    let pluggable = layout::pluggable(spec.memory, spec.max_memory);
    let more = pluggable.end.saturating_sub(pluggable.start);
    Bytes(Bytes::from(spec.memory).0.saturating_add(more))
}

fn unexpected() -> DriverError {
    DriverError::new(
        DriverErrorKind::Failed,
        "the VMM has answered something else: shim and VMM must be of one version",
    )
}

/// Publishes the VM's end once the process is reaped and its last words are read.
async fn watch_end(
    end: oneshot::Receiver<ProcessEnd>,
    listener: JoinHandle<()>,
    link: Arc<Link>,
    killed: Arc<AtomicBool>,
    exit: watch::Sender<Option<VmExit>>,
) {
    let end = end.await.unwrap_or(ProcessEnd {
        status: None,
        stderr: String::new(),
    });
    // The process is gone, so its end of the socket is closed, unless a descriptor of it is still on the way to us.
    let _ = timeout(DRAIN_DEADLINE, listener).await;
    let reason = reason(&end, link.last_words(), killed.load(Ordering::SeqCst));
    exit.send_replace(Some(reason));
}

fn reason(end: &ProcessEnd, last_words: Option<LastWords>, killed: bool) -> VmExit {
    let status = end.status;
    let said = |text: String| match end.stderr.trim() {
        "" => text,
        stderr => format!("{text}; {stderr}"),
    };
    match (
        status.and_then(|s| s.code()),
        status.and_then(|s| s.signal()),
    ) {
        _ if killed => VmExit::Killed,
        (Some(code), _) if code == i32::from(ExitCode::Guest as u8) => VmExit::Guest,
        (Some(code), _) => VmExit::Failed {
            code,
            message: said(
                last_words.map_or_else(|| "it said nothing".to_owned(), |words| words.text),
            ),
        },
        (None, Some(SIGKILL)) if out_of_memory::kills() > 0 => VmExit::OutOfMemory,
        (None, Some(signal)) => {
            tracing::error!(signal, stderr = end.stderr, "a signal has ended the VMM");
            VmExit::Signal(signal)
        }
        (None, None) => VmExit::Failed {
            code: -1,
            message: said("it could not be waited for".to_owned()),
        },
    }
}

#[async_trait]
impl Adjustable for EmbeddedVm {
    async fn set_limits(&self, limits: Limits) -> Result<(), DriverError> {
        self.call(Request::SetLimits(limits.into()))
            .await
            .map(|_| ())
    }
}

#[async_trait]
impl RunningVm for EmbeddedVm {
    fn processes(&self) -> VmProcesses {
        VmProcesses {
            vmm: self.process.pid,
        }
    }

    async fn connect(&self, port: VsockPort) -> Result<UnixStream, DriverError> {
        if self.exit.borrow().is_some() {
            return Err(gone());
        }
        self.socket.connect(port).await
    }

    async fn accept(&self) -> Result<(VsockPort, UnixStream), DriverError> {
        self.connections.lock().await.recv().await.ok_or_else(gone)
    }

    async fn attach_disk(&self, disk: Disk) -> Result<AttachedDisk, DriverError> {
        let request = Request::AttachDisk(disk_config(&disk));
        let descriptors = [disk.file.as_fd()];
        let answer = self.link.call(request, &descriptors, CALL_DEADLINE).await?;
        match answer {
            Answer::Attached { device } => Ok(AttachedDisk {
                serial: disk.serial,
                bind_device: Some(device),
            }),
            Answer::Done | Answer::Text(_) | Answer::Size(_) | Answer::Console { .. } => {
                Err(unexpected())
            }
        }
    }

    async fn detach_disk(&self, serial: &DiskSerial) -> Result<(), DriverError> {
        let serial = serial.to_string();
        self.call(Request::DetachDisk { serial }).await.map(|_| ())
    }

    async fn attach_file_system(
        &self,
        file_system: FileSystem,
    ) -> Result<AttachedFileSystem, DriverError> {
        if self.exit.borrow().is_some() {
            return Err(gone());
        }
        let pid = self.process.pid;
        let memory = self.memory;
        let files = tokio::task::spawn_blocking(move || SharedMemory::prepare(pid, memory));
        let files = files
            .await
            .map_err(std::io::Error::other)
            .and_then(|files| files)
            .map_err(|source| {
                let text = "cannot make a file for guest memory";
                DriverError::new(DriverErrorKind::Failed, text).because(source)
            })?;
        let descriptors = [
            file_system.connection.as_fd(),
            files.memory.as_fd(),
            files.pagemap.as_fd(),
        ];
        let request = Request::AttachFileSystem {
            tag: file_system.tag,
        };
        let answer = self.link.call(request, &descriptors, SHARE_DEADLINE).await;
        match answer? {
            Answer::Attached { device } => Ok(AttachedFileSystem {
                bind_device: Some(device),
            }),
            Answer::Done | Answer::Text(_) | Answer::Size(_) | Answer::Console { .. } => {
                Err(unexpected())
            }
        }
    }

    async fn wait(&self) -> VmExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(VmExit::Killed),
            // The runtime is shutting down and has dropped the task that would tell.
            Err(_) => VmExit::Killed,
        }
    }

    async fn kill(&self) -> VmExit {
        if self.exit.borrow().is_none() {
            self.killed.store(true, Ordering::SeqCst);
            self.process.kill();
        }
        self.wait().await
    }

    async fn console(&self, from: Option<u64>) -> Console {
        match self.call(Request::Console { from }).await {
            Ok(Answer::Console { from, next, text }) => Console { from, next, text },
            // A VM that has ended has left the end of its console with its last words.
            _ if from.is_none() => Console {
                text: self.link.last_words().unwrap_or_default().console,
                ..Console::default()
            },
            _ => {
                let from = from.unwrap_or_default();
                Console {
                    from,
                    next: from,
                    text: String::new(),
                }
            }
        }
    }

    async fn dump(&self) -> Result<String, DriverError> {
        self.text(Request::Dump).await
    }
}

impl Drop for EmbeddedVm {
    fn drop(&mut self) {
        self.killed.store(true, Ordering::SeqCst);
        self.process.kill();
    }
}
