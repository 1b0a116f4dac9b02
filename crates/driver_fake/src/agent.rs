// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The fake agent's ttrpc service.

use std::sync::Arc;

use agent_proto::{ProcessKey, api, service};
use async_trait::async_trait;
use ids::{ContainerId, Generation};
use ttrpc::Code;
use ttrpc::asynchronous::TtrpcContext;

use crate::guest::Guest;
use crate::program::Program;

pub(crate) struct Service {
    pub(crate) guest: Arc<Guest>,
    /// Ends the VM.
    pub(crate) die: Arc<dyn Fn(hypervisor::VmExit) + Send + Sync>,
}

fn refuse(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

fn container(id: &str) -> ttrpc::Result<ContainerId> {
    id.parse()
        .map_err(|error: ids::InvalidId| refuse(Code::INVALID_ARGUMENT, error.to_string()))
}

fn key(process: Option<&api::ProcessRef>) -> ttrpc::Result<ProcessKey> {
    let process = process.ok_or_else(|| refuse(Code::INVALID_ARGUMENT, "no process"))?;
    let exec = match process.exec_id.as_str() {
        "" => None,
        id => Some(
            id.parse()
                .map_err(|_| refuse(Code::INVALID_ARGUMENT, "no exec id"))?,
        ),
    };
    Ok(ProcessKey {
        container: container(&process.container_id)?,
        exec,
        generation: Generation(process.generation),
    })
}

fn program(json: &[u8]) -> ttrpc::Result<Program> {
    Program::from_json(json)
        .ok_or_else(|| refuse(Code::INVALID_ARGUMENT, "the fake guest has no such program"))
}

impl Service {
    /// Does what the script says about a call.
    async fn enter(&self, method: &str, object: &str) -> ttrpc::Result<()> {
        let script = &self.guest.script;
        script.enter(method, object).await;
        if script.is_deadly(method) {
            (self.die)(hypervisor::VmExit::Signal(9));
            std::future::pending::<()>().await;
        }
        match script.refusal(method) {
            Some((code, message)) => Err(refuse(code, message)),
            None => Ok(()),
        }
    }

    fn init(&self, id: &str) -> ttrpc::Result<ProcessKey> {
        self.guest
            .init_of(&container(id)?)
            .ok_or_else(|| refuse(Code::NOT_FOUND, format!("container {id} does not exist")))
    }

    /// Lets a process run. Yields first or last, so that its end is told after or before the answer.
    async fn run(&self, key: &ProcessKey) {
        if self.guest.script.exits_first() {
            self.guest.start(key);
            // The event goes out on the poll that is waiting for it, before this answer.
            for _ in 0..32 {
                tokio::task::yield_now().await;
            }
        } else {
            let (guest, key) = (Arc::clone(&self.guest), key.clone());
            tokio::spawn(async move {
                tokio::task::yield_now().await;
                guest.start(&key);
            });
        }
    }
}

#[async_trait]
impl service::Agent for Service {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::ConfigureSandboxRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("ConfigureSandbox", "").await?;
        Ok(api::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::ProcessStarted> {
        self.enter("CreateContainer", &request.container_id).await?;
        let key = ProcessKey {
            container: container(&request.container_id)?,
            exec: None,
            generation: Generation(request.generation),
        };
        let program = program(&request.spec_json)?;
        let stdio = request.stdio.unwrap_or_default();
        let pid = self.guest.add(&key, program, stdio);
        let guest_pid =
            pid.ok_or_else(|| refuse(Code::ALREADY_EXISTS, "the container exists already"))?;
        Ok(api::ProcessStarted {
            guest_pid,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("StartContainer", &request.container_id).await?;
        let key = self.init(&request.container_id)?;
        if !self.guest.lives(&key) || self.guest.runs(&key) {
            return Err(refuse(Code::FAILED_PRECONDITION, "init is not waiting"));
        }
        self.run(&key).await;
        Ok(api::Empty::new())
    }

    async fn start_exec(
        &self,
        _: &TtrpcContext,
        request: api::StartExecRequest,
    ) -> ttrpc::Result<api::ProcessStarted> {
        let key = key(request.process.as_ref())?;
        let exec = request.process.exec_id.clone();
        self.enter("StartExec", &exec).await?;
        let init = self.init(key.container.as_str())?;
        if !self.guest.runs(&init) || self.guest.is_frozen(&key.container) {
            return Err(refuse(Code::FAILED_PRECONDITION, "init does not run"));
        }
        let program = program(&request.process_json)?;
        let stdio = request.stdio.unwrap_or_default();
        let pid = self.guest.add(&key, program, stdio);
        let guest_pid =
            pid.ok_or_else(|| refuse(Code::ALREADY_EXISTS, "the exec exists already"))?;
        self.run(&key).await;
        Ok(api::ProcessStarted {
            guest_pid,
            ..Default::default()
        })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: api::SignalRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("Signal", &request.signal.to_string()).await?;
        let key = key(request.process.as_ref())?;
        if !self.guest.lives(&key) {
            return Err(refuse(Code::NOT_FOUND, "process already finished"));
        }
        if request.signal != 0 {
            self.guest.end(&key, request.signal.saturating_add(128));
        }
        Ok(api::Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("ResizePty", "").await?;
        let key = key(request.process.as_ref())?;
        if self.guest.resize(&key, (request.columns, request.rows)) {
            Ok(api::Empty::new())
        } else {
            Err(refuse(Code::NOT_FOUND, "no such process"))
        }
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: api::CloseStdinRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("CloseStdin", "").await?;
        let key = key(request.process.as_ref())?;
        if self.guest.close_stdin(&key, request.bytes) {
            Ok(api::Empty::new())
        } else {
            Err(refuse(Code::NOT_FOUND, "no such process"))
        }
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::ProcessList> {
        self.enter("ListProcesses", &request.container_id).await?;
        Ok(api::ProcessList {
            processes: self.guest.list(&container(&request.container_id)?),
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("PauseContainer", &request.container_id).await?;
        let init = self.init(&request.container_id)?;
        if !self.guest.runs(&init) {
            return Err(refuse(Code::FAILED_PRECONDITION, "init does not run"));
        }
        self.guest.set_frozen(init.container, true);
        Ok(api::Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("ResumeContainer", &request.container_id).await?;
        let init = self.init(&request.container_id)?;
        self.guest.set_frozen(init.container, false);
        Ok(api::Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("UpdateContainer", &request.container_id).await?;
        let init = self.init(&request.container_id)?;
        self.guest.update(init.container, request.resources_json);
        Ok(api::Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::ContainerStats> {
        self.enter("Stats", &request.container_id).await?;
        let init = self.init(&request.container_id)?;
        Ok(self.guest.stats(&init.container))
    }

    async fn resize_guest(
        &self,
        _: &TtrpcContext,
        request: api::ResizeGuestRequest,
    ) -> ttrpc::Result<api::GuestSize> {
        self.enter("ResizeGuest", "").await?;
        self.guest.set_vcpus(request.vcpus);
        Ok(api::GuestSize {
            vcpus: request.vcpus,
            ..Default::default()
        })
    }

    async fn put_files(
        &self,
        _: &TtrpcContext,
        request: api::PutFilesRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("PutFiles", &request.volume).await?;
        self.guest.put(request);
        Ok(api::Empty::new())
    }

    async fn read_copied_file(
        &self,
        _: &TtrpcContext,
        request: api::ReadCopiedFileRequest,
    ) -> ttrpc::Result<api::FileEnd> {
        self.enter("ReadCopiedFile", &request.container_id).await?;
        let left = self.guest.left(&self.init(&request.container_id)?);
        let max = usize::try_from(request.max_bytes).unwrap_or(usize::MAX);
        let from = left.len().saturating_sub(max);
        Ok(api::FileEnd {
            size: u64::try_from(left.len()).unwrap_or(u64::MAX),
            data: left.as_bytes().get(from..).unwrap_or_default().to_vec(),
            ..Default::default()
        })
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        self.enter("RemoveContainer", &request.container_id).await?;
        let id = container(&request.container_id)?;
        if let Some(init) = self.guest.init_of(&id)
            && self.guest.lives(&init)
        {
            return Err(refuse(Code::FAILED_PRECONDITION, "init lives"));
        }
        self.guest.remove(&id);
        Ok(api::Empty::new())
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        request: api::NextEventsRequest,
    ) -> ttrpc::Result<api::Events> {
        Ok(api::Events {
            events: self.guest.events_after(request.after).await,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.enter("Shutdown", "").await?;
        (self.die)(hypervisor::VmExit::Guest);
        Ok(api::Empty::new())
    }

    async fn dump(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::DumpResponse> {
        self.enter("Dump", "").await?;
        Ok(api::DumpResponse {
            json: "{\"fake\":true}".to_owned(),
            ..Default::default()
        })
    }
}
