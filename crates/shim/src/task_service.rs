// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! containerd's Task service, v2 and v3 (the messages are the same): decodes, asks the sandbox, encodes.
//!
//! Nothing is decided here and no state is kept: ttrpc drops a handler when its caller's deadline passes, and the
//! sandbox's owner task goes on with what it was asked. Every RPC is written out, because the generated default answers
//! `NOT_FOUND`, which containerd reads as "the task is gone".

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use ids::{ContainerId, InvalidId};
use sandbox::{
    CgroupStats, CreateTask, ExecTask, KillScope, ProcessId, ProcessInfo, RootfsMount,
    SandboxErrorKind, SandboxHandle, Status, StdioPaths, TaskStats, TerminalSize,
};
use ttrpc::Code;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::error::report;
use crate::events::exited_at;
use crate::keeper::Hold;
use crate::metrics;
use crate::shells::Shells;
use crate::status::{status, to_status};
use crate::traffic::PodTraffic;

/// The service's name up to containerd 1.7, and in 2.x for shims that answer `start` with an address.
const TASK_V2: &str = "containerd.task.v2.Task";

/// What `Connect` names as the shim's version: the Task API's.
const CONNECT_VERSION: &str = "3";

/// The type of an update's resources, as containerd's typeurl package names the OCI runtime spec's `LinuxResources`.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The Task service of one sandbox.
#[derive(Clone)]
pub struct TaskService {
    sandbox: SandboxHandle,
    shells: Arc<Shells>,
    traffic: Arc<PodTraffic>,
    /// Let go of when containerd has shown that it knows this shim.
    hold: Arc<Hold>,
}

impl TaskService {
    /// The service of `sandbox`, whose debugging shells are `shells`, and whose traffic is held to `traffic`.
    pub(crate) fn new(
        sandbox: SandboxHandle,
        shells: Arc<Shells>,
        traffic: PodTraffic,
        hold: Arc<Hold>,
    ) -> Self {
        Self {
            sandbox,
            shells,
            traffic: Arc::new(traffic),
            hold,
        }
    }

    /// The service under both of its names, for a ttrpc server.
    pub fn services(self) -> HashMap<String, Service> {
        let mut services = create_task(Arc::new(self.clone()));
        let v2 = create_task(Arc::new(self))
            .into_values()
            .map(|service| (TASK_V2.to_owned(), service));
        services.extend(v2);
        services
    }
}

/// Whether an update was about the pod's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limited {
    Changed,
    Unchanged,
}

impl TaskService {
    /// Changes the pod's limits to what the annotations of an update of one of its containers say.
    async fn limit(
        &self,
        container: &ContainerId,
        annotations: &HashMap<String, String>,
    ) -> ttrpc::Result<Limited> {
        let known = self.sandbox.state(ProcessId::init(container.clone())).await;
        known.map_err(|error| to_status(&error))?;
        let limits = self
            .traffic
            .update(annotations)
            .map_err(|error| status(Code::INVALID_ARGUMENT, report(&error)))?;
        let Some(limits) = limits else {
            return Ok(Limited::Unchanged);
        };
        let set = self.sandbox.set_limits(limits).await;
        set.map(|()| Limited::Changed)
            .map_err(|error| to_status(&error))
    }
}

fn invalid(error: &InvalidId) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, error.to_string())
}

fn container(id: &str) -> ttrpc::Result<ContainerId> {
    id.parse().map_err(|error| invalid(&error))
}

fn process(id: &str, exec_id: &str) -> ttrpc::Result<ProcessId> {
    let container = container(id)?;
    if exec_id.is_empty() {
        return Ok(ProcessId::init(container));
    }
    let exec = exec_id.parse().map_err(|error| invalid(&error))?;
    Ok(ProcessId::exec(container, exec))
}

fn unimplemented(what: &str) -> ttrpc::Error {
    status(
        Code::UNIMPLEMENTED,
        format!(
            "{what} is not implemented by the coffer runtime: a microVM's state cannot be saved yet"
        ),
    )
}

fn create_request(request: api::CreateTaskRequest) -> ttrpc::Result<CreateTask> {
    if !request.checkpoint.is_empty() {
        return Err(unimplemented("creating a task from a checkpoint"));
    }
    let rootfs = request.rootfs.into_iter().map(|mount| RootfsMount {
        fs_type: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    Ok(CreateTask {
        container: container(&request.id)?,
        bundle: PathBuf::from(request.bundle),
        rootfs: rootfs.collect(),
        stdio: StdioPaths {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        },
        shell: None,
    })
}

fn task_status(status: Status) -> api::Status {
    match status {
        Status::Created => api::Status::CREATED,
        Status::Running => api::Status::RUNNING,
        Status::Stopped => api::Status::STOPPED,
        Status::Pausing => api::Status::PAUSING,
        Status::Paused => api::Status::PAUSED,
    }
}

fn process_info(process: ProcessInfo) -> ttrpc::Result<api::ProcessInfo> {
    let mut info = api::ProcessInfo::new();
    info.pid = process.pid.get();
    if let Some(exec) = process.exec {
        let mut details = ProcessDetails::new();
        details.exec_id = exec.to_string();
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.ProcessDetails".to_owned();
        any.value = details
            .write_to_bytes()
            .map_err(|error| status(Code::INTERNAL, error.to_string()))?;
        info.info = MessageField::some(any);
    }
    Ok(info)
}

#[async_trait]
impl Task for TaskService {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let state = self
            .sandbox
            .state(process)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::StateResponse::new();
        response.id = request.id;
        response.exec_id = request.exec_id;
        response.bundle = state.bundle.display().to_string();
        response.pid = state.pid.get();
        response.status = task_status(state.status).into();
        response.terminal = state.stdio.terminal;
        response.stdin = state.stdio.stdin;
        response.stdout = state.stdio.stdout;
        response.stderr = state.stdio.stderr;
        if let Some(exit) = state.exit {
            response.exit_status = exit.status;
            response.exited_at = exited_at(&exit);
        }
        Ok(response)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        self.hold.let_go();
        let task = create_request(request)?;
        let pid = self
            .sandbox
            .create(task)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::CreateTaskResponse::new();
        response.pid = pid.get();
        Ok(response)
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let pid = self
            .sandbox
            .start(process)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::StartResponse::new();
        response.pid = pid.get();
        Ok(response)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let deleted = self
            .sandbox
            .delete(process)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::DeleteResponse::new();
        response.pid = deleted.pid.get();
        response.exit_status = deleted.exit.status;
        response.exited_at = exited_at(&deleted.exit);
        Ok(response)
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let container = container(&request.id)?;
        let processes = self
            .sandbox
            .pids(container)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::PidsResponse::new();
        response.processes = processes
            .into_iter()
            .map(process_info)
            .collect::<ttrpc::Result<_>>()?;
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        let scope = if request.all {
            KillScope::All
        } else {
            KillScope::Process
        };
        let killed = self.sandbox.kill(process, request.signal, scope).await;
        killed
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let exec = request.exec_id.parse().map_err(|error| invalid(&error))?;
        let task = ExecTask {
            container: container(&request.id)?,
            exec,
            process_json: request.spec.into_option().unwrap_or_default().value,
            stdio: StdioPaths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
        };
        let registered = self.sandbox.exec(task).await;
        registered
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        let size = TerminalSize {
            columns: request.width,
            rows: request.height,
        };
        let resized = self.sandbox.resize_pty(process, size).await;
        resized
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        if !request.stdin {
            return Ok(api::Empty::new());
        }
        let closed = self.sandbox.close_stdin(process).await;
        closed
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let exit = self
            .sandbox
            .wait(process)
            .await
            .map_err(|error| to_status(&error))?;
        let mut response = api::WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = exited_at(&exit);
        Ok(response)
    }

    /// Never fails: a task that is not there has pid 0 (containerd asks after its restart).
    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.version = CONNECT_VERSION.to_owned();
        if let Ok(process) = process(&request.id, "")
            && let Ok(state) = self.sandbox.state(process).await
        {
            response.task_pid = state.pid.get();
        }
        Ok(response)
    }

    /// Follows every Delete: does nothing while there are tasks, unless it must be now.
    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<api::Empty> {
        if request.now {
            self.sandbox.terminate().await;
            return Ok(api::Empty::new());
        }
        let mut ended = self.sandbox.shutdown().await;
        if ended.is_err() && self.shells.are_alone() {
            if !self.shells.end_all(&self.sandbox).await {
                self.sandbox.terminate().await;
                return Ok(api::Empty::new());
            }
            ended = self.sandbox.shutdown().await;
        }
        match ended {
            Ok(()) => Ok(api::Empty::new()),
            Err(error) => match error.kind() {
                SandboxErrorKind::FailedPrecondition | SandboxErrorKind::Unavailable => {
                    Ok(api::Empty::new())
                }
                _ => Err(to_status(&error)),
            },
        }
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: api::PauseRequest,
    ) -> ttrpc::Result<api::Empty> {
        let paused = self.sandbox.pause(container(&request.id)?).await;
        paused
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: api::ResumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        let resumed = self.sandbox.resume(container(&request.id)?).await;
        resumed
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        Err(unimplemented("checkpointing a task"))
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = container(&request.id)?;
        if !request.annotations.is_empty() {
            let limited = self.limit(&container, &request.annotations).await?;
            if limited == Limited::Changed && request.resources.is_none() {
                return Ok(api::Empty::new());
            }
        }
        let resources = request.resources.into_option().unwrap_or_default();
        if resources.type_url != RESOURCES_TYPE {
            let text = format!(
                "the resources of an update are of type {:?}, {RESOURCES_TYPE:?} was expected",
                resources.type_url
            );
            return Err(status(Code::INVALID_ARGUMENT, text));
        }
        let updated = self.sandbox.update(container, resources.value).await;
        updated
            .map(|()| api::Empty::new())
            .map_err(|error| to_status(&error))
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.sandbox.stats(container(&request.id)?).await;
        let TaskStats { cgroup, interfaces } = stats.map_err(|error| to_status(&error))?;
        let metrics = match cgroup {
            CgroupStats::Guest(stats) => metrics::of_cgroup_v2(&stats, &interfaces),
            CgroupStats::Host => {
                tokio::task::spawn_blocking(move || metrics::of_this_process(&interfaces))
                    .await
                    .map_err(|error| status(Code::INTERNAL, error.to_string()))?
            }
        };
        let metrics = metrics.map_err(|error| status(Code::INTERNAL, report(&error)))?;
        let mut response = api::StatsResponse::new();
        response.stats = MessageField::some(metrics);
        Ok(response)
    }
}
