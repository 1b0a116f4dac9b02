// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Debugging shells: tasks of the operator's, of which containerd knows nothing.
//!
//! ```text
//! run(): reserve the id ──> create ──> start ──> wait ──> delete ──> free the id
//! ```
//! While its id is reserved, a shell's events are not containerd's. A shell ends with its caller: when the call is dropped
//! it is killed. It keeps no sandbox alive: when containerd shuts down a sandbox in which nothing but shells is left,
//! [`Shells::end_all`] ends them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ids::ContainerId;
use sandbox::{
    CreateTask, KillScope, ProcessId, SandboxError, SandboxErrorKind, SandboxHandle, TaskEvent,
    TerminalSize,
};
use shim_api::SHELL_PREFIX;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::events;

/// The signal that ends a shell.
const SIGKILL: u32 = 9;

/// How long [`Shells::end_all`] waits for killed shells; containerd gives Shutdown a few seconds.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The shells of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Shells(watch::Sender<State>);

#[derive(Debug, Default)]
struct State {
    open: BTreeSet<ContainerId>,
    /// containerd's containers.
    containers: BTreeSet<ContainerId>,
}

impl Shells {
    /// Takes note of `event`, and says whether it is for containerd.
    pub(crate) fn is_public(&self, event: &TaskEvent) -> bool {
        let container = events::container(event);
        if self.0.borrow().open.contains(container) {
            return false;
        }
        self.0.send_if_modified(|state| match event {
            TaskEvent::Created { .. } => state.containers.insert(container.clone()),
            TaskEvent::Deleted { .. } => state.containers.remove(container),
            _ => false,
        });
        true
    }

    /// Whether there are shells, and nothing else.
    pub(crate) fn are_alone(&self) -> bool {
        let state = self.0.borrow();
        state.containers.is_empty() && !state.open.is_empty()
    }

    /// Runs a shell to its end and answers its exit status.
    ///
    /// # Errors
    /// [`SandboxErrorKind::InvalidArgument`] for an id that could be a container's;
    /// [`SandboxErrorKind::FailedPrecondition`] in a sandbox without containers; what creating and starting it says.
    pub(crate) async fn run(
        self: &Arc<Self>,
        sandbox: &SandboxHandle,
        task: CreateTask,
        size: Option<TerminalSize>,
    ) -> Result<u32, SandboxError> {
        let (caller, gone) = oneshot::channel::<()>();
        let (shells, sandbox) = (Arc::clone(self), sandbox.clone());
        let life = async move {
            let id = task.container.clone();
            shells.reserve(&sandbox, &id).await?;
            let ended = live(&sandbox, task, size, gone).await;
            shells.0.send_modify(|state| {
                state.open.remove(&id);
            });
            ended
        };
        // In a task of its own: dropping this future must not leave half a shell.
        let ended = tokio::spawn(life).await;
        drop(caller);
        ended.unwrap_or_else(|error| {
            let message = "the shell's task has ended";
            Err(SandboxError::new(SandboxErrorKind::Internal, message).because(error))
        })
    }

    /// Kills all shells and waits until they are gone. `false`: they are not within a bound.
    pub(crate) async fn end_all(&self, sandbox: &SandboxHandle) -> bool {
        let open = self.0.borrow().open.clone();
        for id in open {
            // One that has ended by itself is fine.
            let _ended = sandbox
                .kill(ProcessId::init(id), SIGKILL, KillScope::All)
                .await;
        }
        let mut state = self.0.subscribe();
        let empty = state.wait_for(|state| state.open.is_empty());
        let ended = timeout(END_LIMIT, empty).await.is_ok();
        if !ended {
            tracing::warn!("a debugging shell does not end: its VM does");
        }
        ended
    }

    async fn reserve(&self, sandbox: &SandboxHandle, id: &ContainerId) -> Result<(), SandboxError> {
        let refuse = |kind, message: String| Err(SandboxError::new(kind, message));
        if !id.as_str().starts_with(SHELL_PREFIX) {
            let message = format!("the id of a shell begins with {SHELL_PREFIX:?}");
            return refuse(SandboxErrorKind::InvalidArgument, message);
        }
        // containerd ends a sandbox after its last container, and none that never had one.
        if self.0.borrow().containers.is_empty() {
            let message = "the sandbox has no container: it starts or ends";
            return refuse(SandboxErrorKind::FailedPrecondition, message.to_owned());
        }
        // A container of this name is containerd's, and so are its events.
        match sandbox.state(ProcessId::init(id.clone())).await {
            Err(error) if error.kind() == SandboxErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(_) => {
                let message = format!("container {id} exists");
                return refuse(SandboxErrorKind::AlreadyExists, message);
            }
        }
        let new = self
            .0
            .send_if_modified(|state| state.open.insert(id.clone()));
        if new {
            Ok(())
        } else {
            refuse(
                SandboxErrorKind::AlreadyExists,
                format!("shell {id} exists"),
            )
        }
    }
}

async fn live(
    sandbox: &SandboxHandle,
    task: CreateTask,
    size: Option<TerminalSize>,
    gone: oneshot::Receiver<()>,
) -> Result<u32, SandboxError> {
    let init = || ProcessId::init(task.container.clone());
    let shell = init();
    sandbox.create(task.clone()).await?;
    let ended = match sandbox.start(init()).await {
        Ok(_) => {
            // Input ends with the caller's end of the FIFO.
            let _has_none = sandbox.close_stdin(init()).await;
            if let Some(size) = size {
                let _ended_already = sandbox.resize_pty(init(), size).await;
            }
            let wait = sandbox.wait(init());
            tokio::pin!(wait);
            tokio::select! {
                ended = &mut wait => ended,
                _ = gone => {
                    let _ended_already = sandbox.kill(init(), SIGKILL, KillScope::All).await;
                    wait.await
                }
            }
        }
        Err(error) => Err(error),
    };
    let deleted = sandbox.delete(shell).await;
    let status = ended?.status;
    deleted.map(|_| status)
}
