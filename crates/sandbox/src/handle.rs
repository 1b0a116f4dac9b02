// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The handle by which callers reach a sandbox's owner task.

use agent_client::TerminalSize;
use hypervisor::Console;
use ids::{ContainerId, Limits};
use task_state::{Exit, Pid, ProcessId};
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::{SandboxError, SandboxErrorKind};
use crate::input::{Input, Reply, Request};
use crate::request::{
    CreateTask, Deleted, ExecTask, KillScope, ProcessInfo, ProcessState, TaskStats,
};

/// Reaches a sandbox from any task. Cheap to clone.
///
/// Every method sends one message to the owner task and awaits its answer. Dropping the future of a call does not undo
/// the call: the owner goes on (ttrpc drops a handler on timeout, and containerd then asks again or deletes).
/// After the sandbox's end every method fails with [`SandboxErrorKind::Unavailable`].
#[derive(Debug, Clone)]
pub struct SandboxHandle {
    inputs: mpsc::UnboundedSender<Input>,
    ended: watch::Receiver<bool>,
}

impl SandboxHandle {
    pub(crate) fn new(inputs: mpsc::UnboundedSender<Input>, ended: watch::Receiver<bool>) -> Self {
        Self { inputs, ended }
    }

    /// Starts the VM of a sandbox that waits for this ([`crate::Boot::WhenAsked`]). Answers at once.
    ///
    /// # Errors
    /// [`SandboxErrorKind::AlreadyExists`] if it was started before; [`SandboxErrorKind::Unavailable`] if the sandbox is
    /// ending.
    pub async fn boot(&self) -> Result<(), SandboxError> {
        self.ask(Request::Boot).await
    }

    /// Makes a task and its init process, which waits for [`Self::start`]. Answers the task's number. The first task
    /// waits for the VM.
    ///
    /// # Errors
    /// [`SandboxErrorKind::AlreadyExists`] for a known id; any kind if the task cannot be made, with nothing of it left.
    pub async fn create(&self, task: CreateTask) -> Result<Pid, SandboxError> {
        self.ask(|reply| Request::Create(task, reply)).await
    }

    /// Starts an init or a registered exec. Answers its number.
    ///
    /// # Errors
    /// [`SandboxErrorKind::FailedPrecondition`] if it was started before, or for an exec if init does not run;
    /// [`SandboxErrorKind::NotFound`]; any kind if the program cannot be run, and the process is then stopped.
    pub async fn start(&self, process: ProcessId) -> Result<Pid, SandboxError> {
        self.ask(|reply| Request::Start(process, reply)).await
    }

    /// Registers a further process.
    ///
    /// # Errors
    /// [`SandboxErrorKind::AlreadyExists`], [`SandboxErrorKind::NotFound`] for the container.
    pub async fn exec(&self, task: ExecTask) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Exec(task, reply)).await
    }

    /// The state of an init or exec. Never waits for guest or VMM.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`].
    pub async fn state(&self, process: ProcessId) -> Result<ProcessState, SandboxError> {
        self.ask(|reply| Request::State(process, reply)).await
    }

    /// Waits until a process has ended, also one that is not started yet; answers at once after the end, until it is
    /// deleted.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`].
    pub async fn wait(&self, process: ProcessId) -> Result<Exit, SandboxError> {
        self.ask(|reply| Request::Wait(process, reply)).await
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`] if the process is unknown or has ended; [`SandboxErrorKind::FailedPrecondition`]
    /// for an exec that was not started; [`SandboxErrorKind::InvalidArgument`] for a number that is no signal.
    pub async fn kill(
        &self,
        process: ProcessId,
        signal: u32,
        scope: KillScope,
    ) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Kill(process, signal, scope, reply))
            .await
    }

    /// Removes a process that has ended, or that never started. Waits for the last of its output, at most 10 s. May be
    /// repeated.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`], [`SandboxErrorKind::FailedPrecondition`] while it runs.
    pub async fn delete(&self, process: ProcessId) -> Result<Deleted, SandboxError> {
        self.ask(|reply| Request::Delete(process, reply)).await
    }

    /// Sets the size of a process's terminal, before or after its start. Does nothing without a terminal.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`].
    pub async fn resize_pty(
        &self,
        process: ProcessId,
        size: TerminalSize,
    ) -> Result<(), SandboxError> {
        self.ask(|reply| Request::ResizePty(process, size, reply))
            .await
    }

    /// Lets go of the shim's own hold on a process's stdin: once the client's end is closed too and what it wrote is
    /// passed on, the process reads the end of the file.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`].
    pub async fn close_stdin(&self, process: ProcessId) -> Result<(), SandboxError> {
        self.ask(|reply| Request::CloseStdin(process, reply)).await
    }

    /// The processes of a container; at least one while its task lives.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`].
    pub async fn pids(&self, container: ContainerId) -> Result<Vec<ProcessInfo>, SandboxError> {
        self.ask(|reply| Request::Pids(container, reply)).await
    }

    /// Freezes a container; done once nothing in it runs. Signals still arrive: `SIGKILL` ends it at once, others when it
    /// goes on.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`]; [`SandboxErrorKind::FailedPrecondition`] unless it runs, for one that is paused
    /// already, and for the sandbox container; any kind if it cannot be frozen, and it goes on then.
    pub async fn pause(&self, container: ContainerId) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Pause(container, reply)).await
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`]; [`SandboxErrorKind::FailedPrecondition`] for one that is not paused.
    pub async fn resume(&self, container: ContainerId) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Resume(container, reply)).await
    }

    /// Sets limits of a container that has not ended: the OCI runtime spec's `LinuxResources` as JSON. What is absent
    /// stays as it is, and so do device rules. All of it is applied, or nothing. The VM grows or shrinks with the limits; of
    /// the sandbox container, which stands for the pod, CPU quota and memory limit count, for the size alone.
    ///
    /// # Errors
    /// [`SandboxErrorKind::InvalidArgument`] with the name of a field that cannot be applied;
    /// [`SandboxErrorKind::ResourceExhausted`] with the VM's size for a limit beyond what it can become, or if the guest
    /// does not take what it is given;
    /// [`SandboxErrorKind::NotFound`], [`SandboxErrorKind::FailedPrecondition`] after its end.
    pub async fn update(
        &self,
        container: ContainerId,
        resources_json: Vec<u8>,
    ) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Update(container, resources_json, reply))
            .await
    }

    /// Holds the pod's traffic to these limits from now on.
    ///
    /// # Errors
    /// Any kind if there is no VM, or its VMM does not answer.
    pub async fn set_limits(&self, limits: Limits) -> Result<(), SandboxError> {
        self.ask(|reply| Request::SetLimits(limits, reply)).await
    }

    /// What a container uses and may use, within a second: if the guest does not say so in time, what it said last.
    ///
    /// # Errors
    /// [`SandboxErrorKind::NotFound`]; any kind if the guest does not answer and never has.
    pub async fn stats(&self, container: ContainerId) -> Result<TaskStats, SandboxError> {
        self.ask(|reply| Request::Stats(container, reply)).await
    }

    /// Waits until there is no VM, or answers at once if none was started.
    ///
    /// # Errors
    /// [`SandboxErrorKind::Unavailable`] after the sandbox's end.
    pub async fn vm_ended(&self) -> Result<(), SandboxError> {
        self.ask(Request::VmEnded).await
    }

    /// Ends the sandbox if no task is left; [`Self::ended`] then answers soon.
    ///
    /// # Errors
    /// [`SandboxErrorKind::FailedPrecondition`] while there are tasks.
    pub async fn shutdown(&self) -> Result<(), SandboxError> {
        self.ask(Request::Shutdown).await
    }

    /// Ends the sandbox whatever it is doing: the VM is killed, every live task's exit is reported, and everything on the
    /// host is let go of. Answers when that is done. May be repeated.
    pub async fn terminate(&self) {
        // A failed send means that the owner is gone already.
        let _gone = self.inputs.send(Input::Request(Request::Terminate));
        self.ended().await;
    }

    /// Answers once the sandbox has ended and nothing of it is left on the host.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the owner was dropped, which is an end too.
        let _gone = ended.wait_for(|ended| *ended).await;
    }

    /// State, streams, pending calls and the VM, as JSON for people.
    ///
    /// # Errors
    /// [`SandboxErrorKind::Unavailable`] after the end.
    pub async fn dump(&self) -> Result<serde_json::Value, SandboxError> {
        self.ask(Request::Dump).await
    }

    /// What the guest has printed on its console from byte number `from` on, as far as it is kept and fits into one
    /// answer; without `from` the last 4 KiB. The guest has written it, so it is not to be believed. Of a VM that has
    /// ended there are the last 4 KiB only, and they are numbered anew.
    ///
    /// # Errors
    /// [`SandboxErrorKind::FailedPrecondition`] before the VM is there; what the VM's end was, if there never was one;
    /// [`SandboxErrorKind::DeadlineExceeded`] if the VMM does not answer; [`SandboxErrorKind::Unavailable`] after the end.
    pub async fn console(&self, from: Option<u64>) -> Result<Console, SandboxError> {
        self.ask(|reply| Request::Console(from, reply)).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        let gone = || SandboxError::new(SandboxErrorKind::Unavailable, "the sandbox has ended");
        self.inputs
            .send(Input::Request(request(reply)))
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}
