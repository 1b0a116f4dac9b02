// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The control connection: one hello, then calls, each with a deadline and a cap on its answer.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use agent_proto::{MAX_ANSWER_LEN, NEXT_EVENTS_WAIT, api, hello, stats};
use protobuf::Message;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use crate::error::AgentError;

const SERVICE: &str = "coffer.agent.v1.Agent";

/// ttrpc's cap on a message, less room for the names around the payload.
const MAX_REQUEST_LEN: usize = (4 << 20) - 1024;

/// How long calls may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallDeadlines {
    /// From the connection until the hello is read.
    pub hello: Duration,
    /// For calls that make, start or remove a process or container: `CreateContainer`, `StartContainer`, `StartExec` and
    /// `RemoveContainer`.
    pub create: Duration,
    /// For every other call.
    pub call: Duration,
}

/// The host's end of the agent. Calls run side by side; dropping a call's future gives up on its answer only.
pub struct AgentClient {
    rpc: ttrpc::asynchronous::Client,
    hello: api::Hello,
    deadlines: CallDeadlines,
    pending: Mutex<Pending>,
}

/// The calls that wait for an answer, for dumps.
#[derive(Default)]
struct Pending {
    last: u64,
    calls: BTreeMap<u64, (&'static str, Instant, Duration)>,
}

/// A call that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingCall {
    /// Its name.
    pub method: &'static str,
    /// How long it has waited.
    pub age: Duration,
    /// How long it waits at most.
    pub deadline: Duration,
}

/// Takes a call off the list when its future ends or is dropped.
struct PendingCall<'a> {
    pending: &'a Mutex<Pending>,
    number: u64,
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        lock(self.pending).calls.remove(&self.number);
    }
}

/// The host's wall clock as the agent takes it, in ns since the epoch.
pub fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or_default()
}

fn lock(pending: &Mutex<Pending>) -> std::sync::MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AgentClient {
    /// Reads the hello from a connection that the guest opened, and takes the connection over. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`AgentError::HelloTimeout`], [`AgentError::HelloRead`] or [`AgentError::Hello`].
    pub async fn handshake(
        mut stream: UnixStream,
        deadlines: CallDeadlines,
    ) -> Result<Self, AgentError> {
        let hello = timeout(deadlines.hello, read_hello(&mut stream))
            .await
            .map_err(|_| AgentError::HelloTimeout(deadlines.hello))??;
        let socket = ttrpc::asynchronous::transport::Socket::new(stream);
        Ok(Self {
            rpc: ttrpc::asynchronous::Client::new(socket),
            hello,
            deadlines,
            pending: Mutex::default(),
        })
    }

    /// What the agent said of itself.
    pub fn hello(&self) -> &api::Hello {
        &self.hello
    }

    /// `ConfigureSandbox`: once, before anything else.
    ///
    /// # Errors
    /// As every call: [`AgentError::Refused`] with the agent's code, [`AgentError::Timeout`],
    /// [`AgentError::Disconnected`], [`AgentError::RequestTooLong`] or [`AgentError::Protocol`].
    pub async fn configure_sandbox(
        &self,
        request: &api::ConfigureSandboxRequest,
    ) -> Result<(), AgentError> {
        self.done("ConfigureSandbox", request, self.deadlines.create)
            .await
    }

    /// `CreateContainer`. Answers init's pid in the guest.
    ///
    /// # Errors
    /// As every call.
    pub async fn create_container(
        &self,
        request: &api::CreateContainerRequest,
    ) -> Result<u32, AgentError> {
        let started: api::ProcessStarted = self
            .call("CreateContainer", request, self.deadlines.create)
            .await?;
        Ok(started.guest_pid)
    }

    /// `StartContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn start_container(&self, request: &api::ContainerRef) -> Result<(), AgentError> {
        self.done("StartContainer", request, self.deadlines.create)
            .await
    }

    /// `StartExec`. Answers the process's pid in the guest.
    ///
    /// # Errors
    /// As every call.
    pub async fn start_exec(&self, request: &api::StartExecRequest) -> Result<u32, AgentError> {
        let started: api::ProcessStarted = self
            .call("StartExec", request, self.deadlines.create)
            .await?;
        Ok(started.guest_pid)
    }

    /// `Signal`.
    ///
    /// # Errors
    /// As every call; [`crate::AgentCode::NotFound`] if the process has ended.
    pub async fn signal(&self, request: &api::SignalRequest) -> Result<(), AgentError> {
        self.done("Signal", request, self.deadlines.call).await
    }

    /// `ResizePty`.
    ///
    /// # Errors
    /// As every call.
    pub async fn resize_pty(&self, request: &api::ResizePtyRequest) -> Result<(), AgentError> {
        self.done("ResizePty", request, self.deadlines.call).await
    }

    /// `CloseStdin`.
    ///
    /// # Errors
    /// As every call.
    pub async fn close_stdin(&self, request: &api::CloseStdinRequest) -> Result<(), AgentError> {
        self.done("CloseStdin", request, self.deadlines.call).await
    }

    /// `ListProcesses`.
    ///
    /// # Errors
    /// As every call.
    pub async fn list_processes(
        &self,
        request: &api::ContainerRef,
    ) -> Result<Vec<api::Process>, AgentError> {
        let list: api::ProcessList = self
            .call("ListProcesses", request, self.deadlines.call)
            .await?;
        Ok(list.processes)
    }

    /// `PauseContainer`.
    ///
    /// # Errors
    /// As every call; after [`AgentError::Timeout`] the container may be frozen or not.
    pub async fn pause_container(&self, request: &api::ContainerRef) -> Result<(), AgentError> {
        self.done("PauseContainer", request, self.deadlines.call)
            .await
    }

    /// `ResumeContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn resume_container(&self, request: &api::ContainerRef) -> Result<(), AgentError> {
        self.done("ResumeContainer", request, self.deadlines.call)
            .await
    }

    /// `UpdateContainer`.
    ///
    /// # Errors
    /// As every call; [`crate::AgentCode::InvalidArgument`] names the field that cannot be applied.
    pub async fn update_container(
        &self,
        request: &api::UpdateContainerRequest,
    ) -> Result<(), AgentError> {
        self.done("UpdateContainer", request, self.deadlines.call)
            .await
    }

    /// `ResizeGuest`: how many vCPUs are up then, as the guest says.
    ///
    /// # Errors
    /// As every call.
    pub async fn resize_guest(&self, request: &api::ResizeGuestRequest) -> Result<u32, AgentError> {
        let size: api::GuestSize = self
            .call("ResizeGuest", request, self.deadlines.call)
            .await?;
        Ok(size.vcpus)
    }

    /// `Stats`: figures that the guest has written, within the caps of [`stats`].
    ///
    /// # Errors
    /// As every call.
    pub async fn stats(
        &self,
        request: &api::ContainerRef,
    ) -> Result<api::ContainerStats, AgentError> {
        let figures = self.call("Stats", request, self.deadlines.call).await?;
        Ok(stats::bounded(figures))
    }

    /// `PutFiles`.
    ///
    /// # Errors
    /// As every call.
    pub async fn put_files(&self, request: &api::PutFilesRequest) -> Result<(), AgentError> {
        self.done("PutFiles", request, self.deadlines.call).await
    }

    /// `ReadCopiedFile`. The answer has no more bytes than were asked for, nor than it says the file has.
    ///
    /// # Errors
    /// As every call.
    pub async fn read_copied_file(
        &self,
        request: &api::ReadCopiedFileRequest,
    ) -> Result<api::FileEnd, AgentError> {
        const METHOD: &str = "ReadCopiedFile";
        let end: api::FileEnd = self.call(METHOD, request, self.deadlines.call).await?;
        let len = u64::try_from(end.data.len()).unwrap_or(u64::MAX);
        if len > u64::from(request.max_bytes).min(end.size) {
            let what = format!(
                "{len} bytes of a file of {}, at most {} were asked for",
                end.size, request.max_bytes
            );
            return Err(AgentError::protocol(METHOD, what));
        }
        Ok(end)
    }

    /// `RemoveContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_container(&self, request: &api::ContainerRef) -> Result<(), AgentError> {
        self.done("RemoveContainer", request, self.deadlines.create)
            .await
    }

    /// `Shutdown`: the guest powers off, and the connection with it.
    ///
    /// # Errors
    /// As every call, apart from the loss of the connection, which is the answer.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let empty = api::Empty::new();
        match self.done("Shutdown", &empty, self.deadlines.call).await {
            Err(AgentError::Disconnected { .. }) => Ok(()),
            other => other,
        }
    }

    /// `Dump`: JSON for people, written by the guest.
    ///
    /// # Errors
    /// As every call.
    pub async fn dump(&self) -> Result<String, AgentError> {
        let empty = api::Empty::new();
        let dump: api::DumpResponse = self.call("Dump", &empty, self.deadlines.call).await?;
        Ok(dump.json)
    }

    /// The calls that wait for an answer.
    pub fn pending(&self) -> Vec<WaitingCall> {
        let pending = lock(&self.pending);
        let calls = pending.calls.values();
        calls
            .map(|(method, since, deadline)| WaitingCall {
                method,
                age: since.elapsed(),
                deadline: *deadline,
            })
            .collect()
    }

    pub(crate) async fn next_events(&self, after: u64) -> Result<api::Events, AgentError> {
        let request = api::NextEventsRequest {
            after,
            wall_clock_ns: wall_clock_ns(),
            ..Default::default()
        };
        let deadline = NEXT_EVENTS_WAIT.saturating_add(self.deadlines.call);
        self.call("NextEvents", &request, deadline).await
    }

    async fn done<Q: Message>(
        &self,
        method: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        let _: api::Empty = self.call(method, request, deadline).await?;
        Ok(())
    }

    /// The deadline is kept on this side alone: ttrpc's own would have the agent drop a handler half-way.
    async fn call<Q: Message, A: Message>(
        &self,
        method: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<A, AgentError> {
        let payload = request
            .write_to_bytes()
            .map_err(|error| AgentError::protocol(method, error))?;
        if payload.len() > MAX_REQUEST_LEN {
            let len = payload.len();
            return Err(AgentError::RequestTooLong { method, len });
        }
        let request = ttrpc::Request {
            service: SERVICE.to_owned(),
            method: method.to_owned(),
            payload,
            ..Default::default()
        };
        let _pending = self.enter(method, deadline);
        let response = timeout(deadline, self.rpc.request(request))
            .await
            .map_err(|_| AgentError::Timeout {
                method,
                after: deadline,
            })?
            .map_err(|error| AgentError::from_ttrpc(method, error))?;
        let len = response.payload.len();
        if len > MAX_ANSWER_LEN {
            let what = format!("it is {len} bytes long, at most {MAX_ANSWER_LEN} are allowed");
            return Err(AgentError::protocol(method, what));
        }
        A::parse_from_bytes(&response.payload).map_err(|error| AgentError::protocol(method, error))
    }

    fn enter(&self, method: &'static str, deadline: Duration) -> PendingCall<'_> {
        let mut pending = lock(&self.pending);
        pending.last = pending.last.wrapping_add(1);
        let number = pending.last;
        pending
            .calls
            .insert(number, (method, Instant::now(), deadline));
        PendingCall {
            pending: &self.pending,
            number,
        }
    }
}

async fn read_hello(stream: &mut UnixStream) -> Result<api::Hello, AgentError> {
    let mut prefix = [0; 4];
    stream
        .read_exact(&mut prefix)
        .await
        .map_err(AgentError::HelloRead)?;
    let len = hello::decode_len(prefix).map_err(AgentError::Hello)?;
    let mut body = vec![0; len];
    stream
        .read_exact(&mut body)
        .await
        .map_err(AgentError::HelloRead)?;
    hello::decode(&body).map_err(AgentError::Hello)
}
