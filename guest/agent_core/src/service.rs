// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent behind ttrpc: decode, call, encode.
//!
//! ttrpc drops a handler's future when the caller's deadline passes, so whatever changes state runs in a task of its own.

use std::sync::Arc;

use agent_proto::{api, service};
use async_trait::async_trait;
use ttrpc::r#async::TtrpcContext;

use crate::agent::Agent;
use crate::plan::{ContainerPlan, ExecPlan, SandboxPlan, container_id, process_key};
use crate::system::System;
use crate::volume_plan::PutPlan;
use crate::{Code, Error};

/// [`Agent`] as a ttrpc service.
pub struct Service<S>(Arc<Agent<S>>);

impl<S: System> Service<S> {
    /// The methods to register with a ttrpc server.
    pub fn methods(
        agent: Arc<Agent<S>>,
    ) -> std::collections::HashMap<String, ttrpc::r#async::Service> {
        service::create_agent(Arc::new(Self(agent)))
    }
}

fn status(error: &Error) -> ttrpc::Error {
    let code = match error.code() {
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::Internal => ttrpc::Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.chain()))
}

/// Runs `work` to its end, whatever becomes of the caller.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    tokio::spawn(work)
        .await
        .unwrap_or(Err(Error::Internal("working for a request")))
        .map_err(|error| status(&error))
}

fn parsed<T>(result: Result<T, Error>) -> ttrpc::Result<T> {
    result.map_err(|error| status(&error))
}

#[async_trait]
impl<S: System> service::Agent for Service<S> {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureSandboxRequest,
    ) -> ttrpc::Result<api::Empty> {
        let plan = parsed(SandboxPlan::parse(request))?;
        let agent = self.0.clone();
        finish(async move { agent.configure(plan).await }).await?;
        Ok(api::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::ProcessStarted> {
        let plan = parsed(ContainerPlan::parse(request))?;
        let agent = self.0.clone();
        let guest_pid = finish(async move { agent.create_container(plan).await }).await?;
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
        let id = parsed(container_id(&request.container_id))?;
        let agent = self.0.clone();
        finish(async move { agent.start_container(&id).await }).await?;
        Ok(api::Empty::new())
    }

    async fn start_exec(
        &self,
        _: &TtrpcContext,
        request: api::StartExecRequest,
    ) -> ttrpc::Result<api::ProcessStarted> {
        let plan = parsed(ExecPlan::parse(request))?;
        let agent = self.0.clone();
        let guest_pid = finish(async move { agent.start_exec(plan).await }).await?;
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
        let key = parsed(process_key(request.process.get_or_default()))?;
        parsed(self.0.signal(&key, request.signal, request.all).await)?;
        Ok(api::Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let key = parsed(process_key(request.process.get_or_default()))?;
        parsed(self.0.resize(&key, request.columns, request.rows))?;
        Ok(api::Empty::new())
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: api::CloseStdinRequest,
    ) -> ttrpc::Result<api::Empty> {
        let key = parsed(process_key(request.process.get_or_default()))?;
        parsed(self.0.close_stdin(&key, request.bytes))?;
        Ok(api::Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::ProcessList> {
        let id = parsed(container_id(&request.container_id))?;
        let processes = parsed(self.0.processes(&id).await)?
            .into_iter()
            .map(|process| api::Process {
                guest_pid: process.pid,
                exec_id: process.exec.unwrap_or_default(),
                ..Default::default()
            })
            .collect();
        Ok(api::ProcessList {
            processes,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        let id = parsed(container_id(&request.container_id))?;
        let agent = self.0.clone();
        finish(async move { agent.pause(&id).await }).await?;
        Ok(api::Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        let id = parsed(container_id(&request.container_id))?;
        let agent = self.0.clone();
        finish(async move { agent.resume(&id).await }).await?;
        Ok(api::Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let id = parsed(container_id(&request.container_id))?;
        let resources = serde_json::from_slice(&request.resources_json)
            .map_err(|error| Error::bad("resources_json", error.to_string()));
        let resources = parsed(resources)?;
        let agent = self.0.clone();
        finish(async move { agent.update(&id, resources).await }).await?;
        Ok(api::Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::ContainerStats> {
        let id = parsed(container_id(&request.container_id))?;
        parsed(self.0.stats(&id).await)
    }

    async fn put_files(
        &self,
        _: &TtrpcContext,
        request: api::PutFilesRequest,
    ) -> ttrpc::Result<api::Empty> {
        let plan = parsed(PutPlan::parse(request))?;
        let agent = self.0.clone();
        finish(async move { agent.put_files(plan).await }).await?;
        Ok(api::Empty::new())
    }

    async fn read_copied_file(
        &self,
        _: &TtrpcContext,
        request: api::ReadCopiedFileRequest,
    ) -> ttrpc::Result<api::FileEnd> {
        let id = parsed(container_id(&request.container_id))?;
        let read = self.0.read_copied(&id, request.index, request.max_bytes);
        let end = parsed(read.await)?;
        Ok(api::FileEnd {
            size: end.size,
            data: end.data,
            ..Default::default()
        })
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRef,
    ) -> ttrpc::Result<api::Empty> {
        let id = parsed(container_id(&request.container_id))?;
        let agent = self.0.clone();
        finish(async move { agent.remove_container(&id).await }).await?;
        Ok(api::Empty::new())
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        request: api::NextEventsRequest,
    ) -> ttrpc::Result<api::Events> {
        self.0.follow_clock(request.wall_clock_ns);
        let events = self.0.events().next(request.after).await;
        Ok(api::Events {
            events,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.0.system().power_off();
        Ok(api::Empty::new())
    }

    async fn dump(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::DumpResponse> {
        Ok(api::DumpResponse {
            json: self.0.dump(),
            ..Default::default()
        })
    }
}
