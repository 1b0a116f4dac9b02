// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What takes time: starting, signalling, changing and removing (making is in [`crate::creation`]). Each runs beside the
//! owner and ends with an input or an answer; each has a bound; and what it has done when it fails is undone.

use std::sync::Arc;
use std::time::Duration;

use agent_client::{AgentCode, AgentError, TerminalSize};
use agent_proto::{ProcessKey, api};
use ids::{ContainerId, DiskSerial, Generation, Limits};
use pod_spec::ResourceUpdate;
use task_state::{Pid, ProcessId, Role};
use tokio::time::{sleep, timeout};

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::input::Reply;
use crate::owner::Shared;
use crate::phase::{Of, phase};
use crate::record::ProcessIo;
use crate::request::KillScope;
use crate::vm::{self, Guest};

/// How often the guest is asked to remove a container whose init has been killed and is about to end.
const REMOVE_ATTEMPTS: u32 = 40;

/// How long all of that may take, whatever the guest answers: as long as one call for a container may.
const REMOVE_LIMIT: Duration = Duration::from_secs(110);

/// How long to wait between two of these.
const REMOVE_PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn guest_pid(pid: u32) -> Result<Pid, SandboxError> {
    Pid::of_guest_process(pid).ok_or_else(|| {
        let message = format!("the guest says that a process has pid {pid}, which cannot be");
        SandboxError::new(SandboxErrorKind::Internal, message)
    })
}

pub(crate) async fn remove_container(guest: &Guest, container: &ContainerId) {
    let id = container.as_str();
    match timeout(REMOVE_LIMIT, try_remove(guest, container)).await {
        Ok(Ok(())) | Ok(Err(AgentError::Disconnected { .. })) => {}
        Ok(Err(error)) => {
            tracing::warn!(container_id = id, %error, "the guest did not remove a container");
        }
        Err(_) => tracing::warn!(
            container_id = id,
            "a killed container does not end in the guest"
        ),
    }
}

async fn try_remove(guest: &Guest, container: &ContainerId) -> Result<(), AgentError> {
    let request = container_ref(container);
    let mut attempt = 1;
    loop {
        match guest.agent.remove_container(&request).await {
            Err(error)
                if error.code() == Some(AgentCode::FailedPrecondition)
                    && attempt < REMOVE_ATTEMPTS =>
            {
                attempt = attempt.saturating_add(1);
                sleep(REMOVE_PAUSE).await;
            }
            done => return done,
        }
    }
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
                let exec_id = process.exec.as_ref().map(|exec| exec.as_str());
                tracing::debug!(
                    container_id = process.container.as_str(),
                    exec_id,
                    error = error.report(),
                    "a signal did not arrive"
                );
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

/// Freezes a container, or leaves it as it was.
pub(crate) async fn pause(shared: &Shared, container: &ContainerId) -> Result<(), SandboxError> {
    let of = Of::Container(&shared.id, container);
    phase(of, "pause", async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        let request = container_ref(container);
        let frozen = guest.agent.pause_container(&request).await;
        if let Err(AgentError::Timeout { .. }) = frozen {
            // It may be frozen by now, or soon: whoever asked is told that it runs.
            drop(guest.agent.resume_container(&request).await);
        }
        frozen.map_err(|error| convert::agent(format!("pause container {container}"), error))
    })
    .await
}

/// Lets a container go on.
pub(crate) async fn resume(shared: &Shared, container: &ContainerId) -> Result<(), SandboxError> {
    let of = Of::Container(&shared.id, container);
    phase(of, "resume", async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        let thawed = guest
            .agent
            .resume_container(&container_ref(container))
            .await;
        thawed.map_err(|error| convert::agent(format!("resume container {container}"), error))
    })
    .await
}

/// Sets a container's limits, and has the VM be as large as they want.
pub(crate) async fn update(
    shared: &Shared,
    container: &ContainerId,
    role: Role,
    update: ResourceUpdate,
) -> Result<(), SandboxError> {
    let of = Of::Container(&shared.id, container);
    phase(of, "update", async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        guest.sizing.update(container.clone(), role, update).await
    })
    .await
}

/// Holds the pod's traffic to other limits.
pub(crate) async fn set_limits(shared: &Shared, limits: Limits) -> Result<(), SandboxError> {
    phase(Of::Sandbox(&shared.id), "limit", async {
        let vm = vm::launched(shared.vm.subscribe()).await?;
        let set = vm.set_limits(limits).await;
        set.map_err(|error| convert::driver("change the limits of the pod's traffic", error))
    })
    .await
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
                let exec_id = self.process.exec.as_ref().map(|exec| exec.as_str());
                tracing::warn!(
                    container_id = self.process.container.as_str(),
                    exec_id,
                    streams = %streams.dump(),
                    "output is given up"
                );
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
            guest.sizing.forget(self.process.container.clone());
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
