// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The calls to a sandbox's shim, on the socket on which it serves containerd.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use containerd_shim_protos::api::{ResizePtyRequest, StatsRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use serde::Deserialize;
use serde_json::Value;
use shim_api::LINES_WAIT;
use shim_api::api::{
    ConsoleRequest, ConsoleResponse, DumpRequest, ExecRequest, LinesRequest, LinesResponse,
};
use shim_api::service::InspectClient;
use tokio::time::timeout;
use ttrpc::context::{Context as Deadline, with_duration};

use crate::node::Sandbox;

/// How long a shim may take to answer: it gives its own VMM and guest two seconds each.
const LIMIT: Duration = Duration::from_secs(5);

/// A shim that answers.
pub(crate) struct Shim {
    inspect: InspectClient,
    task: TaskClient,
}

/// What is followed line by line.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lines {
    Logs,
    Events,
}

/// What a shim says of its sandbox; only what is needed here.
#[derive(Debug, Deserialize)]
pub(crate) struct Dump {
    pub(crate) processes: Vec<Process>,
    pub(crate) vm: Vm,
}

/// An init or an exec.
#[derive(Debug, Deserialize)]
pub(crate) struct Process {
    pub(crate) container_id: String,
    pub(crate) exec_id: Option<String>,
    pub(crate) pid: u32,
    pub(crate) status: String,
    pub(crate) exit_status: Option<u32>,
}

/// The VM.
#[derive(Debug, Deserialize)]
pub(crate) struct Vm {
    /// "starting", "launched", "ready" or "failed".
    pub(crate) state: String,
    /// Why it failed.
    pub(crate) reason: Option<String>,
}

impl Shim {
    /// The shim of `sandbox`.
    pub(crate) async fn connect(sandbox: &Sandbox) -> Result<Self> {
        let name = || format!("sandbox {}", sandbox.id);
        let socket = sandbox
            .socket()
            .with_context(|| format!("{} has no socket: it starts or has just ended", name()))?;
        let address = format!("unix://{socket}");
        let client = timeout(LIMIT, Client::connect(&address))
            .await
            .map_err(|_| anyhow!("{}: no answer at {socket}", name()))?
            .map_err(error)
            .with_context(|| format!("{}: its shim does not serve {socket}", name()))?;
        Ok(Self {
            inspect: InspectClient::new(client.clone()),
            task: TaskClient::new(client),
        })
    }

    /// All that the shim knows.
    pub(crate) async fn dump(&self) -> Result<Value> {
        let request = DumpRequest::new();
        let response = self.inspect.dump(deadline(LIMIT), &request).await;
        let response = response.map_err(error).context("dump")?;
        serde_json::from_str(&response.json).context("the shim's dump is not JSON")
    }

    /// The same, as far as it is understood here.
    pub(crate) async fn state(&self) -> Result<Dump> {
        let dump = self.dump().await?;
        serde_json::from_value(dump)
            .context("the shim's dump has another form: cofferctl and shim are of one release")
    }

    /// The guest's console from byte number `from` on.
    pub(crate) async fn console(&self, from: u64) -> Result<ConsoleResponse> {
        let mut request = ConsoleRequest::new();
        request.from = Some(from);
        let response = self.inspect.console(deadline(LIMIT), &request).await;
        response.map_err(error).context("read the console")
    }

    /// Lines from number `from` on; `wait`s for the first.
    pub(crate) async fn lines(&self, of: Lines, from: u64, wait: bool) -> Result<LinesResponse> {
        let request = LinesRequest {
            from,
            wait,
            ..Default::default()
        };
        let deadline = deadline(LINES_WAIT.saturating_add(LIMIT));
        let response = match of {
            Lines::Logs => self.inspect.logs(deadline, &request).await,
            Lines::Events => self.inspect.events(deadline, &request).await,
        };
        response.map_err(error).context("read lines")
    }

    /// Runs a debugging shell and answers its exit status, however long that takes.
    pub(crate) async fn exec(&self, request: &ExecRequest) -> Result<u32> {
        let response = self.inspect.exec(Deadline::default(), request).await;
        Ok(response
            .map_err(error)
            .context("run the shell")?
            .exit_status)
    }

    /// Resizes a shell's terminal.
    pub(crate) async fn resize(&self, id: &str, columns: u32, rows: u32) -> Result<()> {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            width: columns,
            height: rows,
            ..Default::default()
        };
        let response = self.task.resize_pty(deadline(LIMIT), &request).await;
        response.map(drop).map_err(error)
    }

    /// containerd's metrics of a container.
    pub(crate) async fn metrics(&self, container: &str) -> Result<Any> {
        let request = StatsRequest {
            id: container.to_owned(),
            ..Default::default()
        };
        let response = self.task.stats(deadline(LIMIT), &request).await;
        let response = response
            .map_err(error)
            .with_context(|| format!("measure {container}"))?;
        Ok(response.stats.unwrap_or_default())
    }
}

fn deadline(limit: Duration) -> Deadline {
    with_duration(limit)
}

/// A call's failure in the shim's own words.
fn error(error: ttrpc::Error) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => anyhow!(status.message),
        other => other.into(),
    }
}
