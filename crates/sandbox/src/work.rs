// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What takes time: making, starting, signalling and removing. Each runs beside the owner and ends with an input or an
//! answer; each has a bound; and what it has done when it fails is undone.

use std::sync::Arc;
use std::time::Duration;

use agent_client::{AgentCode, AgentError, HostStdio, TerminalSize};
use agent_proto::{ProcessKey, api};
use ids::{ContainerId, DiskSerial, Generation};
use pod_storage::WrittenBack;
use task_state::{Pid, ProcessId, Role};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::host::{ContainerKind, ContainerPlan, GuestContainer, GuestDisk, GuestRootfs};
use crate::input::{Made, Reply};
use crate::owner::Shared;
use crate::phase::{Of, phase};
use crate::record::ProcessIo;
use crate::request::{CreateTask, KillScope};
use crate::vm::{self, Guest};

/// How often the guest is asked to remove a container whose init has been killed and is about to end.
const REMOVE_ATTEMPTS: u32 = 40;

/// How long to wait between two of these.
const REMOVE_PAUSE: Duration = Duration::from_millis(50);

/// A container to make.
pub(crate) struct Creation {
    pub(crate) shared: Arc<Shared>,
    pub(crate) task: Arc<CreateTask>,
    pub(crate) generation: Generation,
    pub(crate) io: Arc<ProcessIo>,
    pub(crate) abort: watch::Receiver<bool>,
}

impl Creation {
    /// Makes the container, or leaves nothing of it. Told to abort, it gives up at once until the guest has been asked
    /// for the container; after that, the guest decides.
    pub(crate) async fn run(mut self) -> Result<Made, SandboxError> {
        let mut shares = Vec::new();
        let mut abort = self.abort.clone();
        let prepared = tokio::select! {
            biased;
            _ = abort.wait_for(|abort| *abort) => Err(aborted(&self.task.container)),
            prepared = self.prepare(&mut shares) => prepared,
        };
        let result = match prepared {
            Ok(Prepared::Sandbox(made)) => return Ok(made),
            Ok(Prepared::Guest(ready)) => self.make(*ready, &shares).await,
            Err(error) => Err(error),
        };
        if result.is_err()
            && !shares.is_empty()
            && let Ok(guest) = vm::ready(self.shared.vm.subscribe()).await
        {
            for serial in shares {
                guest.disks.detach(serial).await;
            }
        }
        result
    }

    fn of(&self) -> Of<'_> {
        Of::Container(&self.shared.id, &self.task.container)
    }

    /// Everything up to the guest. `shares` are the disks to give back if it is left.
    async fn prepare(&mut self, shares: &mut Vec<DiskSerial>) -> Result<Prepared, SandboxError> {
        let plan = phase(self.of(), "prepare", self.plan()).await?;
        let ContainerPlan { kind, guard } = plan.0;
        let container = match kind {
            ContainerKind::Sandbox => {
                let vm = vm::launched(self.shared.vm.subscribe()).await?;
                return Ok(Prepared::Sandbox(Made {
                    role: Role::Sandbox,
                    pid: Pid::of_host_process(vm.processes().vmm),
                    disks: Vec::new(),
                    written_back: Vec::new(),
                    guard,
                }));
            }
            ContainerKind::Guest(container) => *container,
        };
        let guest = vm::ready(self.shared.vm.subscribe()).await?;
        let (request, host, written_back) = phase(self.of(), "attach", async {
            let GuestContainer {
                spec_json,
                rootfs,
                copied_mounts,
                written_back,
                live,
                volumes,
                sub_paths,
            } = container;
            for volume in live {
                guest.live.put(volume).await?;
            }
            let rootfs = attach_rootfs(&guest, rootfs, shares).await?;
            let host = plan.1;
            let request = api::CreateContainerRequest {
                container_id: self.task.container.to_string(),
                generation: self.generation.0,
                spec_json,
                rootfs: Some(rootfs),
                stdio: Some(host.wanted(self.io.size())).into(),
                copied_mounts,
                volumes,
                sub_paths,
                ..Default::default()
            };
            Ok((request, host, written_back))
        })
        .await?;
        Ok(Prepared::Guest(Box::new(Ready {
            guest,
            request,
            host,
            written_back,
            guard,
        })))
    }

    async fn plan(&self) -> Result<(ContainerPlan, HostStdio), SandboxError> {
        let shared = Arc::clone(&self.shared);
        let (task, io) = (Arc::clone(&self.task), Arc::clone(&self.io));
        vm::blocking(move || {
            let host = io
                .open(&task.stdio)
                .map_err(|error| convert::stdio("open the container's stdio", error))?;
            Ok((shared.host.plan_container(&task)?, host))
        })
        .await?
    }

    async fn make(&self, ready: Ready, shares: &[DiskSerial]) -> Result<Made, SandboxError> {
        let Ready {
            guest,
            request,
            host,
            written_back,
            guard,
        } = ready;
        let container = &self.task.container;
        let what = || format!("create container {container}");
        let pid = phase(self.of(), "create", async {
            let created = guest.agent.create_container(&request).await;
            let late = matches!(created, Err(AgentError::Timeout { .. }));
            match created {
                Ok(pid) => Ok(pid),
                Err(error) => {
                    if late {
                        discard(&guest, container, self.generation).await;
                    }
                    Err(convert::agent_start(what(), error))
                }
            }
        })
        .await?;
        let key = ProcessKey {
            container: container.clone(),
            exec: None,
            generation: self.generation,
        };
        let connected = host.connect(&key, &*guest, &guest.agent).await;
        let made = connected
            .map_err(|error| convert::stdio(what(), error))
            .and_then(|()| guest_pid(pid));
        match made {
            Ok(pid) => Ok(Made {
                role: Role::Guest,
                pid,
                disks: shares.to_vec(),
                written_back,
                guard,
            }),
            Err(error) => {
                discard(&guest, container, self.generation).await;
                Err(error)
            }
        }
    }
}

enum Prepared {
    Sandbox(Made),
    Guest(Box<Ready>),
}

struct Ready {
    guest: Arc<Guest>,
    request: api::CreateContainerRequest,
    host: HostStdio,
    written_back: Vec<WrittenBack>,
    guard: Box<dyn std::any::Any + Send>,
}

fn aborted(container: &ContainerId) -> SandboxError {
    let message = format!("the creation of container {container} was given up: it was stopped");
    SandboxError::new(SandboxErrorKind::Aborted, message)
}

fn guest_pid(pid: u32) -> Result<Pid, SandboxError> {
    Pid::of_guest_process(pid).ok_or_else(|| {
        let message = format!("the guest says that a process has pid {pid}, which cannot be");
        SandboxError::new(SandboxErrorKind::Internal, message)
    })
}

async fn attach_rootfs(
    guest: &Guest,
    rootfs: GuestRootfs,
    shares: &mut Vec<DiskSerial>,
) -> Result<api::create_container_request::Rootfs, SandboxError> {
    use api::create_container_request::Rootfs;
    match rootfs {
        GuestRootfs::Layered(layers) => {
            let mut attached = Vec::with_capacity(layers.len());
            for layer in layers {
                attached.push(attach(guest, layer, shares).await?);
            }
            Ok(Rootfs::Layered(api::LayeredRootfs {
                layers: attached,
                ..Default::default()
            }))
        }
        GuestRootfs::Disk(disk) => Ok(Rootfs::Disk(attach(guest, disk, shares).await?)),
    }
}

async fn attach(
    guest: &Guest,
    disk: GuestDisk,
    shares: &mut Vec<DiskSerial>,
) -> Result<api::Disk, SandboxError> {
    let serial = disk.disk.serial.clone();
    // Before the attachment, which goes on when this future is dropped.
    shares.push(serial.clone());
    let attached = guest.disks.attach(disk.disk).await;
    let attached =
        attached.map_err(|error| convert::driver(format!("attach disk {serial}"), error))?;
    Ok(api::Disk {
        serial: serial.to_string(),
        bind_device: attached.bind_device.unwrap_or_default(),
        fs_type: disk.fs_type,
        mount_options: disk.mount_options,
        ..Default::default()
    })
}

/// Kills a container that nobody has been told of, and removes it.
async fn discard(guest: &Guest, container: &ContainerId, generation: Generation) {
    let init = ProcessId::init(container.clone());
    let kill = signal_request(&init, generation, 9, KillScope::All);
    // It may have ended, or never been there.
    drop(guest.agent.signal(&kill).await);
    remove_container(guest, container).await;
}

async fn remove_container(guest: &Guest, container: &ContainerId) {
    let request = container_ref(container);
    for _ in 0..REMOVE_ATTEMPTS {
        match guest.agent.remove_container(&request).await {
            Err(error) if error.code() == Some(AgentCode::FailedPrecondition) => {
                sleep(REMOVE_PAUSE).await;
            }
            Ok(()) | Err(AgentError::Disconnected { .. }) => return,
            Err(error) => {
                tracing::warn!(container_id = container.as_str(), %error, "the guest did not remove a container");
                return;
            }
        }
    }
    tracing::warn!(
        container_id = container.as_str(),
        "a killed container does not end in the guest"
    );
}

/// Lets an init run, or waits for the guest that a sandbox container stands for.
pub(crate) async fn start_init(
    shared: Arc<Shared>,
    container: ContainerId,
    role: Role,
    io: Option<Arc<ProcessIo>>,
) -> Result<Option<Pid>, SandboxError> {
    let of = Of::Container(&shared.id, &container);
    phase(of, "start", async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        if role == Role::Guest {
            let started = guest
                .agent
                .start_container(&container_ref(&container))
                .await;
            started.map_err(|error| {
                convert::agent_start(format!("start container {container}"), error)
            })?;
            if let Some(streams) = io.as_ref().and_then(|io| io.streams()) {
                streams.begin_stdin();
            }
        }
        Ok(None)
    })
    .await
}

/// An exec to start.
pub(crate) struct ExecStart {
    pub(crate) shared: Arc<Shared>,
    pub(crate) process: ProcessId,
    pub(crate) generation: Generation,
    pub(crate) process_json: Arc<Vec<u8>>,
    pub(crate) stdio: agent_client::StdioPaths,
    pub(crate) io: Arc<ProcessIo>,
}

impl ExecStart {
    /// Starts the exec and connects its streams.
    pub(crate) async fn run(self) -> Result<Option<Pid>, SandboxError> {
        let of = Of::Process(&self.shared.id, &self.process);
        phase(of, "exec", self.start()).await.map(Some)
    }

    async fn start(&self) -> Result<Pid, SandboxError> {
        let what = || format!("start {}", self.process);
        let guest = vm::ready(self.shared.vm.subscribe()).await?;
        let (io, paths) = (Arc::clone(&self.io), self.stdio.clone());
        let host = vm::blocking(move || io.open(&paths)).await?;
        let host = host.map_err(|error| convert::stdio("open the exec's stdio", error))?;
        host.streams().begin_stdin();
        let request = api::StartExecRequest {
            process: Some(process_ref(&self.process, self.generation)).into(),
            process_json: self.process_json.to_vec(),
            stdio: Some(host.wanted(self.io.size())).into(),
            ..Default::default()
        };
        let pid = guest.agent.start_exec(&request).await;
        let pid = pid.map_err(|error| convert::agent_start(what(), error))?;
        let key = ProcessKey {
            container: self.process.container.clone(),
            exec: self.process.exec.clone(),
            generation: self.generation,
        };
        let connected = host.connect(&key, &*guest, &guest.agent).await;
        connected.map_err(|error| convert::stdio(what(), error))?;
        guest_pid(pid)
    }
}

/// Sends a signal and answers who asked.
pub(crate) async fn signal(
    shared: Arc<Shared>,
    process: ProcessId,
    request: api::SignalRequest,
    reply: Option<Reply<()>>,
) {
    let result = async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        let sent = guest.agent.signal(&request).await;
        sent.map_err(|error| convert::agent(format!("signal {process}"), error))
    }
    .await;
    match reply {
        // The caller may have gone away.
        Some(reply) => drop(reply.send(result)),
        None => {
            if let Err(error) = result {
                tracing::debug!(process = %process, error = error.report(), "a signal did not arrive");
            }
        }
    }
}

/// Sets a terminal's size and answers who asked.
pub(crate) async fn resize(
    shared: Arc<Shared>,
    process: ProcessId,
    generation: Generation,
    size: TerminalSize,
    reply: Option<Reply<()>>,
) {
    let request = api::ResizePtyRequest {
        process: Some(process_ref(&process, generation)).into(),
        columns: size.columns,
        rows: size.rows,
        ..Default::default()
    };
    let result = async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        match guest.agent.resize_pty(&request).await {
            // It has ended meanwhile: there is no terminal any more, and nothing to set.
            Err(error) if error.code() == Some(AgentCode::NotFound) => Ok(()),
            sent => sent.map_err(|error| convert::agent(format!("resize {process}"), error)),
        }
    }
    .await;
    if let Some(reply) = reply {
        drop(reply.send(result));
    }
}

/// A process to let go of.
pub(crate) struct Removal {
    pub(crate) shared: Arc<Shared>,
    pub(crate) process: ProcessId,
    pub(crate) role: Role,
    pub(crate) io: Option<Arc<ProcessIo>>,
    pub(crate) disks: Vec<DiskSerial>,
    /// The VM goes with its last task: it needs no tidying.
    pub(crate) last: bool,
}

impl Removal {
    /// Waits for the last of the output, then lets go of what the process has in the guest.
    pub(crate) async fn run(self) {
        let of = Of::Process(&self.shared.id, &self.process);
        // There is no failure: what the guest does not tidy up goes with the VM.
        drop(
            phase(of, "delete", async {
                self.remove().await;
                Ok(())
            })
            .await,
        );
    }

    async fn remove(&self) {
        if let Some(streams) = self.io.as_ref().and_then(|io| io.streams()) {
            if timeout(self.shared.deadlines.drain, streams.drained())
                .await
                .is_err()
            {
                tracing::warn!(process = %self.process, streams = %streams.dump(), "output is given up");
            }
            streams.cancel();
        }
        if self.process.exec.is_some() {
            return;
        }
        if self.role == Role::Sandbox {
            // containerd takes the pod's network down next.
            self.shared.vm_ended().await;
            return;
        }
        if self.last {
            return;
        }
        if let Ok(guest) = vm::ready(self.shared.vm.subscribe()).await {
            remove_container(&guest, &self.process.container).await;
            for serial in self.disks.clone() {
                guest.disks.detach(serial).await;
            }
        }
    }
}

pub(crate) fn signal_request(
    process: &ProcessId,
    generation: Generation,
    signal: u32,
    scope: KillScope,
) -> api::SignalRequest {
    api::SignalRequest {
        process: Some(process_ref(process, generation)).into(),
        signal,
        all: scope == KillScope::All,
        ..Default::default()
    }
}

pub(crate) fn container_ref(container: &ContainerId) -> api::ContainerRef {
    api::ContainerRef {
        container_id: container.to_string(),
        ..Default::default()
    }
}

fn process_ref(process: &ProcessId, generation: Generation) -> api::ProcessRef {
    api::ProcessRef {
        container_id: process.container.to_string(),
        exec_id: process
            .exec
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        generation: generation.0,
        ..Default::default()
    }
}
