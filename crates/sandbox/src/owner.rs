// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The owner task: reads one input at a time, asks the task table, and has done what the table says.
//!
//! The owner never waits. What takes time runs beside it and comes back as an [`Input`], so that `State`, `Kill` and
//! `Wait` are answered promptly whatever the guest does.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use agent_client::AgentEvent;
use hypervisor::Driver;
use ids::{ContainerId, Generation, SandboxId};
use task_state::{Denied, DeniedCode, ProcessId, TaskTable, Ticket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::convert;
use crate::effects::Waiting;
use crate::error::SandboxError;
use crate::event::EventSink;
use crate::handle::SandboxHandle;
use crate::host::Host;
use crate::input::{Input, Made};
use crate::oom_score::OomScore;
use crate::record::{ContainerRecord, ExecRecord};
use crate::stats::Silence;
use crate::vm::{self, Failure, VmState};

/// What a sandbox is made from.
pub struct SandboxOptions {
    /// The pod's id, or the container's that has a VM of its own.
    pub id: SandboxId,
    /// The VMM.
    pub driver: Arc<dyn Driver>,
    /// The node.
    pub host: Arc<dyn Host>,
    /// containerd.
    pub events: Arc<dyn EventSink>,
    /// How long to wait for the guest.
    pub deadlines: Deadlines,
    /// The program of the file server, which is started when a container mounts the host's own directories.
    pub file_server: PathBuf,
    /// When the VM starts.
    pub boot: Boot,
}

/// When a sandbox's VM starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// With the sandbox: what the pod is to be like is known already.
    AtOnce,
    /// At [`SandboxHandle::boot`]; until then no container can be made.
    WhenAsked,
}

/// How long a sandbox waits for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// From the VM's launch until the agent has dialled.
    pub boot: Duration,
    /// For one call to the agent, other than those of `create`.
    pub call: Duration,
    /// For setting the guest up, and for making, starting or removing a container or exec in it. Within the two minutes
    /// that the kubelet gives a runtime, so that the error says what did not answer.
    pub create: Duration,
    /// For the last of a process's output, before it is deleted.
    pub drain: Duration,
    /// For the guest to power off by itself.
    pub shutdown: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(30),
            call: Duration::from_secs(10),
            create: Duration::from_secs(110),
            drain: Duration::from_secs(10),
            shutdown: Duration::from_secs(2),
        }
    }
}

/// What the owner and the work beside it share.
pub(crate) struct Shared {
    pub(crate) id: SandboxId,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) deadlines: Deadlines,
    pub(crate) file_server: PathBuf,
    pub(crate) vm: watch::Sender<VmState>,
    /// What the node's OOM killer is told of the pod.
    pub(crate) oom_score: Arc<OomScore>,
    /// Whether the guest has ceased to say what its containers use.
    pub(crate) silence: Silence,
    /// The sandbox is to end.
    pub(crate) ending: watch::Sender<bool>,
    inputs: mpsc::UnboundedSender<Input>,
}

impl Shared {
    pub(crate) fn send(&self, input: Input) {
        // The owner outlives all work; after it, nobody cares.
        drop(self.inputs.send(input));
    }

    /// Waits until the sandbox is to end.
    pub(crate) async fn ends(&self) {
        // The sender is here, so there is no error.
        drop(self.ending.subscribe().wait_for(|ending| *ending).await);
    }

    /// Waits until there is no VM.
    pub(crate) async fn vm_ended(&self) {
        let mut state = self.vm.subscribe();
        drop(
            state
                .wait_for(|state| matches!(state, VmState::Failed(_)))
                .await,
        );
    }
}

/// Starts a sandbox's owner task, and with it the VM unless that is to wait. Must be called inside a tokio runtime.
///
/// The sandbox lives until [`SandboxHandle::shutdown`] finds it empty or [`SandboxHandle::terminate`] is called, and
/// while it does, everything of it on the host is its own. Dropping the runtime kills the VM.
pub fn spawn(options: SandboxOptions) -> SandboxHandle {
    let (inputs, received) = mpsc::unbounded_channel();
    let (end, ended) = watch::channel(false);
    let shared = Arc::new(Shared {
        id: options.id,
        driver: options.driver,
        host: options.host,
        deadlines: options.deadlines,
        file_server: options.file_server,
        vm: watch::Sender::new(VmState::Starting),
        oom_score: Arc::default(),
        silence: Silence::default(),
        ending: watch::Sender::new(false),
        inputs: inputs.clone(),
    });
    let mut owner = Owner {
        shared,
        events: options.events,
        table: TaskTable::default(),
        containers: BTreeMap::new(),
        execs: BTreeMap::new(),
        held_exits: BTreeMap::new(),
        waiting: HashMap::new(),
        last_ticket: 0,
        work: JoinSet::new(),
        failure: None,
        booted: false,
        closing: false,
    };
    match options.boot {
        Boot::AtOnce => owner.boot(),
        Boot::WhenAsked => {}
    }
    tokio::spawn(async move {
        owner.run(received).await;
        drop(owner);
        end.send_replace(true);
    });
    SandboxHandle::new(inputs, ended)
}

pub(crate) struct Owner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) events: Arc<dyn EventSink>,
    pub(crate) table: TaskTable<SandboxError>,
    pub(crate) containers: BTreeMap<ContainerId, ContainerRecord>,
    pub(crate) execs: BTreeMap<ProcessId, ExecRecord>,
    /// Exits that wait for files to be written back.
    pub(crate) held_exits: BTreeMap<ProcessId, (Generation, task_state::Exit)>,
    /// Requests whose answers come later, and since when.
    pub(crate) waiting: HashMap<Ticket, (Waiting, Instant)>,
    last_ticket: u64,
    /// Everything that runs beside the owner, the VM's task included.
    pub(crate) work: JoinSet<()>,
    /// Why there is no VM, once there is none.
    pub(crate) failure: Option<Failure>,
    /// The VM has been started, whatever became of it.
    pub(crate) booted: bool,
    /// No task is left, or none matters any more: the end comes with the end of the work.
    pub(crate) closing: bool,
}

impl Owner {
    async fn run(&mut self, mut inputs: mpsc::UnboundedReceiver<Input>) {
        loop {
            tokio::select! {
                biased;
                input = inputs.recv() => {
                    // The owner holds a sender of its own, so there is always an input to come.
                    if let Some(input) = input {
                        self.take(input);
                    }
                }
                Some(_) = self.work.join_next() => {}
            }
            if self.closing && self.work.is_empty() && inputs.is_empty() {
                break;
            }
        }
        // To the last: what is being sent while the receiver is dropped would stay in the channel, and its caller wait, for as
        // long as anybody can send.
        inputs.close();
        while let Some(late) = inputs.recv().await {
            drop(late);
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Request(request) => self.request(request),
            Input::Created(container, generation, result) => {
                let result = result.map(|made| {
                    let Made {
                        role,
                        pid,
                        disks,
                        written_back,
                        guard,
                    } = made;
                    if let Some(record) = self.containers.get_mut(&container) {
                        record.role = role;
                        record.disks = disks;
                        record.written_back = written_back;
                        record.guard = Some(guard);
                    }
                    (role, pid)
                });
                self.feed(task_state::Input::Created {
                    container: container.clone(),
                    generation,
                    result,
                });
                self.apply_late_size(&ProcessId::init(container));
                self.forget();
            }
            Input::Started(process, generation, result) => {
                self.feed(task_state::Input::Started {
                    process: process.clone(),
                    generation,
                    result,
                });
                self.apply_late_size(&process);
            }
            Input::Paused(container, generation, result) => {
                self.feed(task_state::Input::Paused {
                    container,
                    generation,
                    result,
                });
            }
            Input::Resumed(container, generation, result) => {
                self.feed(task_state::Input::Resumed {
                    container,
                    generation,
                    result,
                });
            }
            Input::Removed(process, generation) => {
                self.feed(task_state::Input::Removed {
                    process,
                    generation,
                });
                self.forget();
                if self.table.is_empty() {
                    self.end_vm();
                }
            }
            Input::Guest(events, taken) => {
                for event in events {
                    self.guest_tells(event);
                }
                // The reader has gone if the VM has.
                let _gone = taken.send(());
            }
            Input::Settled(process) => self.settled(process),
            Input::VmGone(failure) => {
                self.failure = Some(failure);
                self.settle_all();
                self.feed(task_state::Input::VmGone);
            }
        }
    }

    fn guest_tells(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Exited {
                process,
                status,
                at,
            } => {
                let id = ProcessId {
                    container: process.container,
                    exec: process.exec,
                };
                self.exited(id, process.generation, task_state::Exit { status, at });
            }
            AgentEvent::StreamEnded {
                process,
                kind,
                bytes,
            } => {
                let id = ProcessId {
                    container: process.container,
                    exec: process.exec,
                };
                if let Some((generation, io)) = self.io(&id)
                    && generation == process.generation
                    && let Some(streams) = io.streams()
                {
                    streams.ended(kind, bytes);
                }
            }
            AgentEvent::OutOfMemory(container) => {
                self.feed(task_state::Input::OutOfMemory(container));
            }
        }
    }

    /// Tells the table what it cannot deny.
    pub(crate) fn feed(&mut self, input: task_state::Input<SandboxError>) {
        match self.table.step(SystemTime::now(), input) {
            Ok(effects) => self.apply(effects),
            Err(denied) => tracing::error!(%denied, "an outcome was denied"),
        }
    }

    pub(crate) fn ticket(&mut self, waiting: Waiting) -> Ticket {
        self.last_ticket = self.last_ticket.wrapping_add(1);
        let ticket = Ticket(self.last_ticket);
        self.waiting.insert(ticket, (waiting, Instant::now()));
        ticket
    }

    /// A refusal in containerd's words; without a VM, with the reason for that.
    pub(crate) fn denied(&self, denied: &Denied) -> SandboxError {
        match (&self.failure, denied.code()) {
            (Some(failure), DeniedCode::Unavailable) => {
                convert::denied(denied).because(failure.report())
            }
            _ => convert::denied(denied),
        }
    }

    /// Starts the VM. Called once.
    pub(crate) fn boot(&mut self) {
        self.booted = true;
        self.work.spawn(vm::run(Arc::clone(&self.shared)));
    }

    /// Ends the VM, once.
    pub(crate) fn end_vm(&mut self) {
        if !self.shared.ending.send_replace(true) {
            self.work.spawn(vm::end(Arc::clone(&self.shared)));
        }
    }

    /// Drops the records of what the table no longer knows.
    fn forget(&mut self) {
        let table = &self.table;
        self.containers.retain(|container, record| {
            let view = table.view(&ProcessId::init(container.clone()));
            view.is_some_and(|view| view.generation == record.generation)
        });
        self.execs.retain(|process, record| {
            let view = table.view(process);
            view.is_some_and(|view| view.generation == record.generation)
        });
    }
}
