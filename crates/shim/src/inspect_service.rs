// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `coffer.shim.v1.Inspect`: what a shim tells the operator, beside the Task service, and the debugging shells that it
//! runs for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ids::ContainerId;
use sandbox::{CreateTask, EventSink, SandboxHandle, Shell, StdioPaths, TaskEvent, TerminalSize};
use shim_api::LINES_WAIT;
use shim_api::api;
use shim_api::service::{Inspect, create_inspect};
use tokio::time::timeout;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::dump::Dump;
use crate::events;
use crate::history::History;
use crate::log::{self, Log};
use crate::shells::Shells;
use crate::status::{status, to_status};

/// What is there for the operator.
#[derive(Debug, Clone, Default)]
pub(crate) struct Operator {
    /// Their shells.
    pub(crate) shells: Arc<Shells>,
    /// This process's log.
    pub(crate) log: Arc<Log>,
    /// The events for containerd, each as a JSON object.
    pub(crate) events: Arc<History>,
}

/// The Inspect service of one sandbox.
pub(crate) struct InspectService {
    sandbox: SandboxHandle,
    operator: Operator,
    dump: Arc<Dump>,
}

impl InspectService {
    /// For the server: under its name.
    pub(crate) fn services(
        sandbox: SandboxHandle,
        operator: Operator,
        dump: Arc<Dump>,
    ) -> HashMap<String, Service> {
        create_inspect(Arc::new(Self {
            sandbox,
            operator,
            dump,
        }))
    }

    /// An answer is never later than the sandbox's end: who waits for a line must not hold up the shim's.
    async fn lines(&self, history: &History, request: &api::LinesRequest) -> api::LinesResponse {
        if request.wait {
            tokio::select! {
                _there_or_not = timeout(LINES_WAIT, history.has(request.from)) => {}
                () = self.sandbox.ended() => {}
            }
        }
        let (lines, next) = history.since(request.from);
        api::LinesResponse {
            lines,
            next,
            ..Default::default()
        }
    }
}

#[async_trait]
impl Inspect for InspectService {
    async fn dump(
        &self,
        _: &TtrpcContext,
        _: api::DumpRequest,
    ) -> ttrpc::Result<api::DumpResponse> {
        let dump = self.dump.take().await;
        let mut response = api::DumpResponse::new();
        response.json = dump.map_err(|error| to_status(&error))?.to_string();
        Ok(response)
    }

    async fn console(
        &self,
        _: &TtrpcContext,
        request: api::ConsoleRequest,
    ) -> ttrpc::Result<api::ConsoleResponse> {
        let console = self.sandbox.console(request.from).await;
        let console = console.map_err(|error| to_status(&error))?;
        Ok(api::ConsoleResponse {
            text: console.text,
            from: console.from,
            next: console.next,
            ..Default::default()
        })
    }

    async fn logs(
        &self,
        _: &TtrpcContext,
        request: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        Ok(self.lines(&self.operator.log.history, &request).await)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        Ok(self.lines(&self.operator.events, &request).await)
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecRequest,
    ) -> ttrpc::Result<api::ExecResponse> {
        let (task, size) = shell(request)?;
        let ended = self.operator.shells.run(&self.sandbox, task, size).await;
        let mut response = api::ExecResponse::new();
        response.exit_status = ended.map_err(|error| to_status(&error))?;
        Ok(response)
    }
}

fn shell(request: api::ExecRequest) -> ttrpc::Result<(CreateTask, Option<TerminalSize>)> {
    let terminal = request.terminal.into_option();
    let size = terminal
        .as_ref()
        .filter(|terminal| terminal.columns > 0 && terminal.rows > 0)
        .map(|terminal| TerminalSize {
            columns: terminal.columns,
            rows: terminal.rows,
        });
    let container = request.id.parse();
    let task = CreateTask {
        container: container.map_err(|error: ids::InvalidId| {
            status(ttrpc::Code::INVALID_ARGUMENT, error.to_string())
        })?,
        bundle: PathBuf::new(),
        rootfs: Vec::new(),
        stdio: StdioPaths {
            terminal: terminal.is_some(),
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        },
        shell: Some(Shell {
            args: request.args,
            term: terminal.unwrap_or_default().term,
        }),
    };
    Ok((task, size))
}

/// Keeps the events that pass, and keeps those of shells from containerd.
pub(crate) struct RecordingSink {
    pub(crate) sink: Arc<dyn EventSink>,
    pub(crate) operator: Operator,
    /// The sandbox that containerd knows by the Sandbox API: no task of its own, so no task's events.
    pub(crate) unspoken: Option<ContainerId>,
}

impl EventSink for RecordingSink {
    fn publish(&self, event: TaskEvent) {
        match events::line(&event, &log::timestamp()) {
            Ok(line) => self.operator.events.push(&line),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an event cannot be shown"
            ),
        }
        let unspoken = self.unspoken.as_ref() == Some(events::container(&event));
        if self.operator.shells.is_public(&event) && !unspoken {
            self.sink.publish(event);
        }
    }
}
