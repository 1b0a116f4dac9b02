// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `coffer.shim.v1.Inspect`: what a shim tells the operator, beside the Task service. Nothing here changes anything.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use sandbox::{EventSink, SandboxHandle, TaskEvent};
use shim_api::LINES_WAIT;
use shim_api::api;
use shim_api::service::{Inspect, create_inspect};
use tokio::time::timeout;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::events;
use crate::history::History;
use crate::log;
use crate::status::to_status;

/// What is kept for the operator.
#[derive(Debug, Clone, Default)]
pub(crate) struct Histories {
    /// The lines of this process's log.
    pub(crate) log: Arc<History>,
    /// The events for containerd, each as a JSON object.
    pub(crate) events: Arc<History>,
}

/// The Inspect service of one sandbox.
pub(crate) struct InspectService {
    sandbox: SandboxHandle,
    histories: Histories,
}

impl InspectService {
    /// For the server: under its name.
    pub(crate) fn services(
        sandbox: SandboxHandle,
        histories: Histories,
    ) -> HashMap<String, Service> {
        create_inspect(Arc::new(Self { sandbox, histories }))
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
        let dump = self.sandbox.dump().await;
        let mut response = api::DumpResponse::new();
        response.json = dump.map_err(|error| to_status(&error))?.to_string();
        Ok(response)
    }

    async fn console(
        &self,
        _: &TtrpcContext,
        _: api::ConsoleRequest,
    ) -> ttrpc::Result<api::ConsoleResponse> {
        let tail = self.sandbox.console().await;
        let mut response = api::ConsoleResponse::new();
        response.tail = tail.map_err(|error| to_status(&error))?;
        Ok(response)
    }

    async fn logs(
        &self,
        _: &TtrpcContext,
        request: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        Ok(self.lines(&self.histories.log, &request).await)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        Ok(self.lines(&self.histories.events, &request).await)
    }
}

/// Keeps the events that pass.
pub(crate) struct RecordingSink {
    pub(crate) sink: Arc<dyn EventSink>,
    pub(crate) history: Arc<History>,
}

impl EventSink for RecordingSink {
    fn publish(&self, event: TaskEvent) {
        match events::line(&event, &log::timestamp()) {
            Ok(line) => self.history.push(&line),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an event cannot be shown"
            ),
        }
        self.sink.publish(event);
    }
}
