// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! containerd's Sandbox service (`containerd.runtime.sandbox.v1.Sandbox`, containerd 2.x with `sandboxer = "shim"`): the
//! pod's VM without a pause container.
//!
//! ```text
//! start ─> CreateSandbox ─> StartSandbox ─> Task calls of the members ... ─> StopSandbox ─> ShutdownSandbox
//!          describes the    waits for the   WaitSandbox, SandboxStatus,      ends the VM    ends the shim
//!          pod, VM begins   guest           PingSandbox, SandboxMetrics
//! ```
//!
//! The sandbox is a task like the one that a pause container is: its life, its one exit and the order of calls are the
//! task table's. It has no events, for containerd makes those of a sandbox itself. Every call may be repeated:
//! CreateSandbox answers `ALREADY_EXISTS` then, StopSandbox nothing new. As in the Task service nothing is decided here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use ids::{ContainerId, SandboxId};
use sandbox::{
    CreateTask, KillScope, ProcessId, ProcessState, SandboxError, SandboxErrorKind, SandboxHandle,
    Status, StdioPaths,
};
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::error::{ShimError, report};
use crate::events::exited_at;
use crate::host_cgroup;
use crate::keeper::Hold;
use crate::metrics;
use crate::pod_source::{DescribeError, DescribedPod, PodSource};
use crate::state_dir::StateDir;
use crate::status::{status, to_status};

/// The states as CRI names them (`PodSandboxState`), which is what containerd reads.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The keys of a verbose status; pid and state are there twice, as shimtest wants them.
const PID: &str = "pid";
const STATE: &str = "state";
const DUMP: &str = "dump";
const NETWORK: &str = "networkSandboxPath";

/// How long a stop may take that names no limit. The VM's end has bounds of its own, which are shorter.
const STOP_LIMIT: Duration = Duration::from_secs(10);

const SIGKILL: u32 = 9;

/// The Sandbox service of one sandbox.
pub(crate) struct SandboxService {
    sandbox: SandboxHandle,
    id: SandboxId,
    source: PodSource,
    state: StateDir,
    /// Let go of when containerd has shown that it knows this shim.
    hold: Arc<Hold>,
}

impl SandboxService {
    /// For the server: under its name. `state` is the directory of the sandbox `id`.
    pub(crate) fn services(
        sandbox: SandboxHandle,
        id: SandboxId,
        source: PodSource,
        state: StateDir,
        hold: Arc<Hold>,
    ) -> HashMap<String, Service> {
        create_sandbox(Arc::new(Self {
            sandbox,
            id,
            source,
            state,
            hold,
        }))
    }

    /// The pod that CreateSandbox has described.
    fn pod(&self, id: &str) -> ttrpc::Result<&DescribedPod> {
        let not_created = format!("sandbox {id} is not created: call CreateSandbox first");
        match &self.source {
            PodSource::Described(cell) => {
                let pod = cell
                    .get()
                    .ok_or_else(|| status(Code::FAILED_PRECONDITION, not_created))?;
                self.check_id(id)?;
                Ok(pod)
            }
            PodSource::Bundle(_) => Err(status(Code::FAILED_PRECONDITION, not_created)),
        }
    }

    fn check_id(&self, id: &str) -> ttrpc::Result<()> {
        if id == self.id.as_str() {
            return Ok(());
        }
        let text = format!("sandbox {id} is not here: this is the shim of {}", self.id);
        Err(status(Code::NOT_FOUND, text))
    }

    fn process(&self) -> ProcessId {
        ProcessId::init(ContainerId::from(&self.id))
    }

    async fn state(&self) -> ttrpc::Result<ProcessState> {
        let state = self.sandbox.state(self.process()).await;
        state.map_err(|error| to_status(&error))
    }

    /// Makes what the pod has on the host beside its VM, and moves the shim, and so the VM, into the pod's cgroup.
    async fn prepare(&self, pod: &DescribedPod) -> ttrpc::Result<()> {
        let (pod, state) = (pod.clone(), self.state.clone());
        let prepared = tokio::task::spawn_blocking(move || prepare(&pod, &state)).await;
        prepared
            .map_err(|error| status(Code::INTERNAL, error.to_string()))?
            .map_err(|error| status(Code::INTERNAL, report(&error)))
    }
}

fn prepare(pod: &DescribedPod, state: &StateDir) -> Result<(), ShimError> {
    let files = pod.files.as_ref().map(|files| files.write(state.path()));
    files
        .transpose()
        .map_err(ShimError::file("write to", state.path()))?;
    if let Some(network) = &pod.network_namespace {
        state
            .record_network(network)
            .map_err(ShimError::file("write to", state.path()))?;
    }
    if let Some(path) = &pod.cgroups_path {
        let cgroups = host_cgroup::plan(path)?;
        host_cgroup::enter_all(&cgroups, rustix::process::getpid(), state)?;
    }
    Ok(())
}

fn describe_error(error: &DescribeError) -> ttrpc::Error {
    let code = match error {
        DescribeError::Type(_) | DescribeError::Decode(_) => Code::INVALID_ARGUMENT,
        DescribeError::Rootfs | DescribeError::UserNamespace => Code::UNIMPLEMENTED,
    };
    status(code, report(error))
}

fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(time))
}

/// A sandbox that has ended is as one that is stopped.
fn unless_gone<T: Default>(result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    match result {
        Err(error)
            if matches!(
                error.kind(),
                SandboxErrorKind::NotFound | SandboxErrorKind::Unavailable
            ) =>
        {
            Ok(T::default())
        }
        result => result.map_err(|error| to_status(&error)),
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        self.hold.let_go();
        let PodSource::Described(cell) = &self.source else {
            let text = format!(
                "this shim was started for container {}, which describes its pod by itself: start one without a \
                 container's spec in its bundle",
                self.id
            );
            return Err(status(Code::FAILED_PRECONDITION, text));
        };
        if cell.get().is_some() {
            let text = format!("sandbox {} already exists", self.id);
            return Err(status(Code::ALREADY_EXISTS, text));
        }
        self.check_id(&request.sandbox_id)?;
        let described = DescribedPod::new(&request, &self.id, SystemTime::now())
            .map_err(|error| describe_error(&error))?;
        if cell.set(described.clone()).is_err() {
            let text = format!("sandbox {} already exists", self.id);
            return Err(status(Code::ALREADY_EXISTS, text));
        }
        self.prepare(&described).await?;
        let task = CreateTask {
            container: ContainerId::from(&self.id),
            bundle: PathBuf::from(request.bundle_path),
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            shell: None,
        };
        let created = async {
            self.sandbox.boot().await?;
            self.sandbox.create(task).await
        };
        created.await.map_err(|error| to_status(&error))?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let created_at = self.pod(&request.sandbox_id)?.created_at;
        let started = self.sandbox.start(self.process()).await;
        let mut response = api::StartSandboxResponse::new();
        response.pid = started.map_err(|error| to_status(&error))?.get();
        response.created_at = timestamp(created_at);
        Ok(response)
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.check_id(&request.sandbox_id)?;
        let mut response = api::PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        // In Go's words, as the OCI image spec has them.
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let limit = match request.timeout_secs {
            0 => STOP_LIMIT,
            seconds => Duration::from_secs(seconds.into()),
        };
        let stopped = timeout(limit, async {
            let killed = self.sandbox.kill(self.process(), SIGKILL, KillScope::All);
            unless_gone(killed.await)?;
            // What comes next takes the pod's network down.
            unless_gone(self.sandbox.vm_ended().await)
        });
        let late = |_| {
            let text = format!("sandbox {} did not end within {limit:?}", self.id);
            status(Code::DEADLINE_EXCEEDED, text)
        };
        stopped.await.map_err(late)??;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        self.pod(&request.sandbox_id)?;
        let exit = self.sandbox.wait(self.process()).await;
        let exit = exit.map_err(|error| to_status(&error))?;
        let mut response = api::WaitSandboxResponse::new();
        response.exit_status = exit.status;
        response.exited_at = exited_at(&exit);
        Ok(response)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let state = self.state().await?;
        let mut response = api::SandboxStatusResponse::new();
        response.sandbox_id = request.sandbox_id;
        response.pid = state.pid.get();
        let name = match state.status {
            Status::Running | Status::Pausing | Status::Paused => READY,
            Status::Created | Status::Stopped => NOT_READY,
        };
        name.clone_into(&mut response.state);
        response.created_at = timestamp(pod.created_at);
        if let Some(exit) = &state.exit {
            response.exited_at = exited_at(exit);
        }
        if request.verbose {
            let pid = response.pid.to_string();
            response.info.insert(PID.to_owned(), pid);
            response.info.insert(STATE.to_owned(), name.to_owned());
            if let Some(path) = &pod.network_namespace {
                let path = path.display().to_string();
                response.info.insert(NETWORK.to_owned(), path);
            }
            let dump = self.sandbox.dump().await;
            let dump = dump.map_err(|error| to_status(&error))?.to_string();
            response.info.insert(DUMP.to_owned(), dump);
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        self.pod(&request.sandbox_id)?;
        if self.state().await?.status == Status::Running {
            return Ok(api::PingResponse::new());
        }
        let text = format!("sandbox {} does not run", self.id);
        Err(status(Code::UNAVAILABLE, text))
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        self.sandbox.terminate().await;
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        self.pod(&request.sandbox_id)?;
        let stats = self.sandbox.stats(ContainerId::from(&self.id)).await;
        // The cgroup is there before the pod is started, its network is not.
        let interfaces = stats.map_or_else(|_| Vec::new(), |stats| stats.interfaces);
        let figures = tokio::task::spawn_blocking(move || metrics::of_this_process(&interfaces))
            .await
            .map_err(|error| status(Code::INTERNAL, error.to_string()))?;
        let figures = figures.map_err(|error| status(Code::INTERNAL, report(&error)))?;
        let mut response = api::SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(figures);
        Ok(response)
    }
}
