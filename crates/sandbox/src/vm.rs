// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The VM's life, from the plan to its end, in one task.
//!
//! ```text
//! plan ─> launch ─> Launched ─> boot (the agent dials) ─> configure ─> Ready ─> events, until the VM ends ─> Failed
//!   └──────┴──────────────────────┴─────────────────────────┴─ failed or told to end: VM killed ────────────^
//! ```

use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use agent_client::{
    AgentClient, AgentError, CallDeadlines, EventReader, ForwardedPorts, StreamConnector,
};
use agent_proto::{CONTROL_PORT, api};
use async_trait::async_trait;
use hypervisor::{Console, RunningVm, VmExit};
use ids::{SandboxId, VsockPort};
use pod_spec::{PodSize, VmSize};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::convert;
use crate::disks::Disks;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::host::PodPlan;
use crate::host_folders::HostFolders;
use crate::input::Input;
use crate::live::LiveVolumes;
use crate::owner::Shared;
use crate::phase::{Of, phase};
use crate::sizing::{self, Sizing};

/// How long after the VM's end the last events may still come out of the connection.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// How long after its SIGKILL a VMM may still be there before that is worth an error in the log.
const KILL_WARNING: Duration = Duration::from_secs(10);

/// The most lines of the console that go into the error of a start, and into the log.
const CONSOLE_LINES: usize = 24;

/// The most lines of the console that go into every answer after the end of a VM that ran: a kernel's last words are few.
const CONSOLE_LINES_OF_AN_END: usize = 4;

/// Where the VM is.
#[derive(Clone)]
pub(crate) enum VmState {
    /// Being planned or launched.
    Starting,
    /// The vCPUs run.
    Launched(Arc<dyn RunningVm>),
    /// The agent answers.
    Ready(Arc<Guest>),
    /// Never came up, or has ended.
    Failed(Failure),
}

/// Why there is no VM, for everybody who asks.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    kind: SandboxErrorKind,
    report: String,
    /// The end of the guest's console, if there was a VM.
    console: Option<Arc<str>>,
}

/// A VM whose agent answers.
pub(crate) struct Guest {
    pub(crate) vm: Arc<dyn RunningVm>,
    pub(crate) agent: Arc<AgentClient>,
    pub(crate) disks: Disks,
    pub(crate) sizing: Sizing,
    pub(crate) live: LiveVolumes,
    pub(crate) folders: HostFolders,
    pub(crate) forwarded: Arc<ForwardedPorts>,
}

impl Failure {
    pub(crate) fn to_error(&self) -> SandboxError {
        SandboxError::new(self.kind, self.report.clone())
    }

    pub(crate) fn report(&self) -> &str {
        &self.report
    }

    /// The end of the guest's console, from byte `from` of it on; `None` if there was no VM.
    pub(crate) fn console(&self, from: Option<u64>) -> Option<Console> {
        let kept = self.console.as_ref()?;
        let from = usize::try_from(from.unwrap_or(0)).unwrap_or(usize::MAX);
        let from = from.min(kept.len());
        let count = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
        Some(Console {
            from: count(from),
            next: count(kept.len()),
            text: kept.get(from..).unwrap_or_default().to_owned(),
        })
    }
}

impl From<&SandboxError> for Failure {
    fn from(error: &SandboxError) -> Self {
        Self {
            kind: error.kind(),
            report: error.report(),
            console: None,
        }
    }
}

#[async_trait]
impl StreamConnector for Guest {
    async fn connect(&self, port: VsockPort) -> std::io::Result<UnixStream> {
        self.vm.connect(port).await.map_err(std::io::Error::other)
    }
}

/// Waits until the vCPUs run.
pub(crate) async fn launched(
    mut state: watch::Receiver<VmState>,
) -> Result<Arc<dyn RunningVm>, SandboxError> {
    let state = state
        .wait_for(|state| !matches!(state, VmState::Starting))
        .await;
    match state.as_deref() {
        Ok(VmState::Launched(vm)) => Ok(Arc::clone(vm)),
        Ok(VmState::Ready(guest)) => Ok(Arc::clone(&guest.vm)),
        Ok(VmState::Failed(failure)) => Err(failure.to_error()),
        Ok(VmState::Starting) | Err(_) => Err(ended()),
    }
}

/// Waits until the agent answers.
pub(crate) async fn ready(mut state: watch::Receiver<VmState>) -> Result<Arc<Guest>, SandboxError> {
    let state = state
        .wait_for(|state| matches!(state, VmState::Ready(_) | VmState::Failed(_)))
        .await;
    match state.as_deref() {
        Ok(VmState::Ready(guest)) => Ok(Arc::clone(guest)),
        Ok(VmState::Failed(failure)) => Err(failure.to_error()),
        Ok(VmState::Starting | VmState::Launched(_)) | Err(_) => Err(ended()),
    }
}

fn ended() -> SandboxError {
    SandboxError::new(SandboxErrorKind::Unavailable, "the sandbox has ended")
}

/// Runs the VM to its end; the owner learns of it from [`Input::VmGone`].
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut launched = None;
    let failure = match start(&shared, &mut launched).await {
        Ok((guest, loopback)) => {
            shared.vm.send_replace(VmState::Ready(Arc::clone(&guest)));
            let exit = tokio::select! {
                exit = until_the_end(&shared, &guest) => exit,
                never = forward_ports(&guest, loopback) => match never {},
            };
            guest.folders.end().await;
            let tail = guest.vm.console(None).await.text;
            let id = shared.id.as_str();
            let mut report = format!("the sandbox's VM has ended: {exit}");
            if let Some(server) = guest.folders.exit() {
                report.push_str(&format!("; {server}"));
            }
            if *shared.ending.borrow() {
                tracing::info!(sandbox_id = id, %exit, "the VM has ended");
            } else {
                let console = last_lines(&tail, CONSOLE_LINES);
                tracing::error!(sandbox_id = id, %exit, console, "the VM died");
                let last = last_lines(&tail, CONSOLE_LINES_OF_AN_END);
                if !last.is_empty() {
                    report.push_str(&format!("; its console ends with: {last}"));
                }
            }
            Failure {
                kind: SandboxErrorKind::Unavailable,
                report,
                console: Some(tail.into()),
            }
        }
        Err(error) => {
            tracing::error!(
                sandbox_id = shared.id.as_str(),
                error = error.report(),
                "the VM did not come up"
            );
            Failure::from(&error)
        }
    };
    if let Some((vm, _guard)) = launched {
        killed(&shared.id, &*vm).await;
    }
    shared.vm.send_replace(VmState::Failed(failure.clone()));
    shared.send(Input::VmGone(failure));
}

type LaunchedVm = (Arc<dyn RunningVm>, Box<dyn std::any::Any + Send>);

async fn start(
    shared: &Arc<Shared>,
    launched: &mut Option<LaunchedVm>,
) -> Result<(Arc<Guest>, Option<TcpListener>), SandboxError> {
    let of = Of::Sandbox(&shared.id);
    let planner = Arc::clone(shared);
    // The guard is the last to go, whatever fails: values are dropped from the last to the first.
    let PodPlan {
        guard,
        vm: spec,
        overhead,
        configure,
        loopback,
    } = phase(of, "plan", async {
        blocking(move || planner.host.plan_pod()).await?
    })
    .await?;
    if *shared.ending.borrow() {
        return Err(stopped_early());
    }
    let size = PodSize {
        started_with: VmSize {
            vcpus: spec.vcpus,
            memory: spec.memory,
        },
        largest: VmSize {
            vcpus: spec.max_vcpus,
            memory: spec.max_memory,
        },
        overhead,
    };
    let vm = phase(of, "launch", async {
        let launch = shared.driver.launch(spec).await;
        launch.map_err(|error| convert::driver("start the VM", error))
    })
    .await?;
    shared.oom_score.add(vm.processes().vmm);
    *launched = Some((Arc::clone(&vm), guard));
    shared.vm.send_replace(VmState::Launched(Arc::clone(&vm)));
    tokio::select! {
        biased;
        () = shared.ends() => Err(stopped_early()),
        guest = boot(shared, &vm, size, configure) => Ok((guest?, loopback)),
    }
}

fn stopped_early() -> SandboxError {
    SandboxError::new(
        SandboxErrorKind::Aborted,
        "the sandbox was stopped before its VM was ready",
    )
}

async fn boot(
    shared: &Arc<Shared>,
    vm: &Arc<dyn RunningVm>,
    size: PodSize,
    mut configure: api::ConfigureSandboxRequest,
) -> Result<Arc<Guest>, SandboxError> {
    let of = Of::Sandbox(&shared.id);
    let agent = phase(of, "boot", async {
        let limit = shared.deadlines.boot;
        match timeout(limit, dialled(shared, vm)).await {
            Ok(Ok(agent)) => Ok(agent),
            Ok(Err(error)) => Err(with_console(vm, error).await),
            Err(_) => {
                let message = format!("the guest was not ready within {limit:?}");
                let error = SandboxError::new(SandboxErrorKind::DeadlineExceeded, message);
                Err(with_console(vm, error).await)
            }
        }
    })
    .await?;
    let hello = agent.hello();
    tracing::info!(
        sandbox_id = shared.id.as_str(),
        kernel = ?hello.kernel_release,
        agent_started_us = hello.agent_started_ns.wrapping_div(1000),
        agent_ready_us = hello.agent_ready_ns.wrapping_div(1000),
        "the guest is up"
    );
    if configure.wall_clock_ns != 0 {
        // The plan was made before the boot.
        configure.wall_clock_ns = agent_client::wall_clock_ns();
    }
    phase(of, "configure", async {
        let configured = agent.configure_sandbox(&configure).await;
        configured.map_err(|error| convert::agent_start("set the guest up for the pod", error))
    })
    .await?;
    let agent = Arc::new(agent);
    Ok(Arc::new(Guest {
        vm: Arc::clone(vm),
        live: LiveVolumes::new(shared.id.clone(), Arc::clone(&agent)),
        sizing: Sizing::new(sizing::Parts {
            sandbox: shared.id.clone(),
            host: Arc::clone(&shared.host),
            vm: Arc::clone(vm),
            agent: Arc::clone(&agent),
            size,
        }),
        agent,
        disks: Disks::new(Arc::clone(vm)),
        folders: HostFolders::new(Arc::clone(shared), Arc::clone(vm)),
        forwarded: Arc::default(),
    }))
}

async fn dialled(shared: &Shared, vm: &Arc<dyn RunningVm>) -> Result<AgentClient, SandboxError> {
    let stream = loop {
        match vm.accept().await {
            Ok((CONTROL_PORT, stream)) => break stream,
            Ok(_) => {}
            Err(error) if error.kind() == hypervisor::DriverErrorKind::Gone => {
                let exit = vm.wait().await;
                let message = format!("the guest ended before it was ready: {exit}");
                return Err(SandboxError::new(SandboxErrorKind::Unavailable, message));
            }
            Err(error) => return Err(convert::driver("wait for the guest's agent", error)),
        }
    };
    let deadlines = CallDeadlines {
        hello: shared.deadlines.boot,
        create: shared.deadlines.create,
        call: shared.deadlines.call,
    };
    AgentClient::handshake(stream, deadlines)
        .await
        .map_err(|error| convert::agent("greet the guest's agent", error))
}

async fn with_console(vm: &Arc<dyn RunningVm>, error: SandboxError) -> SandboxError {
    let tail = vm.console(None).await.text;
    let console = if tail.trim().is_empty() {
        "its console is empty".to_owned()
    } else {
        format!(
            "its console ends with: {}",
            last_lines(&tail, CONSOLE_LINES)
        )
    };
    SandboxError::new(error.kind(), format!("{}; {console}", error.report()))
}

/// The console's last lines, on one line.
fn last_lines(tail: &str, most: usize) -> String {
    let lines: Vec<&str> = tail
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let from = lines.len().saturating_sub(most);
    lines.get(from..).unwrap_or_default().join(" | ")
}

/// Forwards the pod's ports for ever. Its end is a drop, which resets what is open.
async fn forward_ports(guest: &Arc<Guest>, loopback: Option<TcpListener>) -> Infallible {
    if let Some(listener) = loopback {
        let connector: Arc<dyn StreamConnector> = Arc::clone(guest) as _;
        Arc::clone(&guest.forwarded)
            .serve(listener, connector)
            .await;
    }
    std::future::pending().await
}

/// Passes on events until the VM has ended or its agent is of no use any more, which ends the VM.
async fn until_the_end(shared: &Shared, guest: &Guest) -> VmExit {
    let mut events = std::pin::pin!(pass_on_events(shared, guest));
    tokio::select! {
        exit = guest.vm.wait() => {
            // What the guest had told before it ended is still in the connection.
            drop(timeout(LAST_EVENTS, events).await);
            exit
        }
        () = guest.folders.lost() => {
            // The VMM sees it too, and says so. A guest does not recover from it.
            match timeout(shared.deadlines.shutdown, guest.vm.wait()).await {
                Ok(exit) => exit,
                Err(_) => killed(&shared.id, &*guest.vm).await,
            }
        }
        error = &mut events => {
            // A connection that breaks is mostly the first sign of the VM's end, which says more.
            if matches!(error, AgentError::Disconnected { .. })
                && let Ok(exit) = timeout(shared.deadlines.shutdown, guest.vm.wait()).await
            {
                return exit;
            }
            tracing::error!(sandbox_id = shared.id.as_str(), %error, "the guest agent is lost: its VM is killed");
            killed(&shared.id, &*guest.vm).await
        }
    }
}

async fn pass_on_events(shared: &Shared, guest: &Guest) -> AgentError {
    let mut reader = EventReader::new(Arc::clone(&guest.agent));
    loop {
        match reader.next().await {
            Ok(events) => {
                // One batch at a time: a guest cannot fill the owner's queue.
                let (taken, done) = oneshot::channel();
                shared.send(Input::Guest(events, taken));
                drop(done.await);
            }
            // The question can be asked again: a guest that is starved of CPU time is not dead.
            Err(error @ AgentError::Timeout { .. }) => {
                tracing::warn!(sandbox_id = shared.id.as_str(), %error, "the guest is silent");
            }
            Err(error) => return error,
        }
    }
}

/// Ends the VM: the guest is asked first where it can answer, and given a moment.
pub(crate) async fn end(shared: Arc<Shared>) {
    shared.ending.send_replace(true);
    let guest = match &*shared.vm.borrow() {
        VmState::Ready(guest) => Arc::clone(guest),
        // Before that, the VM's own task hears of the end; after it, there is nothing to do.
        _ => return,
    };
    let polite = async {
        if let Err(error) = guest.agent.shutdown().await {
            tracing::warn!(sandbox_id = shared.id.as_str(), %error, "the guest did not power off");
            return;
        }
        guest.vm.wait().await;
    };
    drop(timeout(shared.deadlines.shutdown, polite).await);
    killed(&shared.id, &*guest.vm).await;
}

/// Ends the VM without asking.
pub(crate) async fn kill(shared: Arc<Shared>) {
    shared.ending.send_replace(true);
    let vm = match &*shared.vm.borrow() {
        VmState::Launched(vm) => Arc::clone(vm),
        VmState::Ready(guest) => Arc::clone(&guest.vm),
        VmState::Starting | VmState::Failed(_) => return,
    };
    killed(&shared.id, &*vm).await;
}

/// Kills the VM and waits for its end, however long that takes: what it holds is not free before. A VMM that is stuck in
/// the kernel is told of.
async fn killed(sandbox: &SandboxId, vm: &dyn RunningVm) -> VmExit {
    let mut kill = std::pin::pin!(vm.kill());
    match timeout(KILL_WARNING, &mut kill).await {
        Ok(exit) => exit,
        Err(_) => {
            tracing::error!(
                sandbox_id = sandbox.as_str(),
                vmm_pid = vm.processes().vmm,
                after = ?KILL_WARNING,
                "the VMM was killed and does not end: the host's kernel holds it, see /proc/PID/stack; the pod waits for it"
            );
            kill.await
        }
    }
}

/// Runs what blocks on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SandboxError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        SandboxError::new(SandboxErrorKind::Internal, "prepare on the host").because(error)
    })
}
