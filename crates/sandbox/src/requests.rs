// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What callers ask: decoded here, decided by the task table.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use agent_client::TerminalSize;
use ids::{ContainerId, ExecId};
use pod_spec::ResourceUpdate;
use task_state::{Denied, Effect, Pid, ProcessId, Role, Status, Ticket, View};
use tokio::sync::watch;

use crate::effects::Waiting;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::input::{Reply, Request};
use crate::owner::{Owner, Shared};
use crate::record::{ContainerRecord, ExecRecord};
use crate::request::{CreateTask, ExecTask, ProcessInfo, ProcessState, TaskStats};
use crate::{dump, stats, vm, work};

impl Owner {
    pub(crate) fn request(&mut self, request: Request) {
        match request {
            Request::Boot(reply) => {
                let answer = self.boot_once();
                drop(reply.send(answer));
            }
            Request::Create(task, reply) => self.create(task, reply),
            Request::Exec(task, reply) => {
                let answer = self.add_exec(task);
                // Callers may have gone away, here and below.
                drop(reply.send(answer));
            }
            Request::Start(process, reply) => {
                let ticket = self.ticket(Waiting::Pid(reply));
                self.ask(ticket, task_state::Input::Start(process, ticket));
            }
            Request::Wait(process, reply) => {
                let ticket = self.ticket(Waiting::Exit(reply));
                self.ask(ticket, task_state::Input::Wait(process, ticket));
            }
            Request::Delete(process, reply) => {
                let ticket = self.ticket(Waiting::Deleted(reply));
                self.ask(ticket, task_state::Input::Delete(process, ticket));
            }
            Request::Kill(process, signal, scope, reply) => {
                let ticket = self.ticket(Waiting::Done(reply));
                let kill = task_state::Input::Kill {
                    process,
                    signal,
                    scope,
                    ticket,
                };
                self.ask(ticket, kill);
            }
            Request::State(process, reply) => drop(reply.send(self.state(process))),
            Request::ResizePty(process, size, reply) => self.resize(process, size, reply),
            Request::CloseStdin(process, reply) => drop(reply.send(self.close_stdin(&process))),
            Request::Pids(container, reply) => self.pids(container, reply),
            Request::Pause(container, reply) => {
                let ticket = self.ticket(Waiting::Done(reply));
                self.ask(ticket, task_state::Input::Pause(container, ticket));
            }
            Request::Resume(container, reply) => {
                let ticket = self.ticket(Waiting::Done(reply));
                self.ask(ticket, task_state::Input::Resume(container, ticket));
            }
            Request::Update(container, resources, reply) => {
                self.update(container, &resources, reply);
            }
            Request::SetLimits(limits, reply) => {
                let shared = Arc::clone(&self.shared);
                self.work.spawn(async move {
                    drop(reply.send(work::set_limits(&shared, limits).await));
                });
            }
            Request::Stats(container, reply) => self.stats(container, reply),
            Request::VmEnded(reply) => self.tell_vm_ended(reply),
            Request::Shutdown(reply) => drop(reply.send(self.shutdown())),
            Request::Terminate => {
                self.closing = true;
                self.shared.ending.send_replace(true);
                for record in self.containers.values() {
                    record.abort.send_replace(true);
                }
                self.work.spawn(vm::kill(Arc::clone(&self.shared)));
            }
            Request::Dump(reply) => {
                let own = dump::own(self);
                self.work
                    .spawn(dump::answer(Arc::clone(&self.shared), own, reply));
            }
            Request::Console(from, reply) => {
                self.work
                    .spawn(dump::console(Arc::clone(&self.shared), from, reply));
            }
        }
    }

    /// Asks the table; a denial is the answer.
    fn ask(&mut self, ticket: Ticket, input: task_state::Input<SandboxError>) {
        match self.table.step(SystemTime::now(), input) {
            Ok(effects) => self.apply(effects),
            Err(denied) => self.answer(ticket, task_state::Answer::Denied(denied)),
        }
    }

    fn boot_once(&mut self) -> Result<(), SandboxError> {
        let id = &self.shared.id;
        if self.closing {
            let message = format!("sandbox {id} is ending");
            return Err(SandboxError::new(SandboxErrorKind::Unavailable, message));
        }
        if self.booted {
            let message = format!("sandbox {id} already exists: its VM was started before");
            return Err(SandboxError::new(SandboxErrorKind::AlreadyExists, message));
        }
        self.boot();
        Ok(())
    }

    /// Whether a container can be made now.
    fn takes(&self, container: &ContainerId) -> Result<(), SandboxError> {
        if *self.shared.ending.borrow() && self.failure.is_none() {
            let message = format!("container {container}: the sandbox is ending");
            return Err(SandboxError::new(SandboxErrorKind::Unavailable, message));
        }
        if !self.booted {
            let message = format!("container {container}: its sandbox must be created before it");
            return Err(SandboxError::new(
                SandboxErrorKind::FailedPrecondition,
                message,
            ));
        }
        Ok(())
    }

    fn create(&mut self, task: CreateTask, reply: Reply<Pid>) {
        let container = task.container.clone();
        let ticket = self.ticket(Waiting::Pid(reply));
        if let Err(error) = self.takes(&container) {
            self.answer(ticket, task_state::Answer::Failed(error));
            return;
        }
        let input = task_state::Input::Create(container.clone(), ticket);
        let effects = match self.table.step(SystemTime::now(), input) {
            Ok(effects) => effects,
            Err(denied) => {
                self.answer(ticket, task_state::Answer::Denied(denied));
                return;
            }
        };
        for effect in &effects {
            if let Effect::Create(_, generation) = effect {
                let record = ContainerRecord {
                    generation: *generation,
                    task: Arc::new(task.clone()),
                    io: Arc::default(),
                    abort: watch::Sender::new(false),
                    role: Role::Guest,
                    disks: Vec::new(),
                    written_back: Vec::new(),
                    guard: None,
                    resized: false,
                    figures: Arc::default(),
                };
                self.containers.insert(container.clone(), record);
            }
        }
        self.apply(effects);
    }

    fn add_exec(&mut self, task: ExecTask) -> Result<(), SandboxError> {
        let process = ProcessId::exec(task.container.clone(), task.exec.clone());
        let json = pod_spec::exec_process(&task.process_json).map_err(|error| {
            SandboxError::new(SandboxErrorKind::InvalidArgument, format!("add {process}"))
                .because(error)
        })?;
        let input = task_state::Input::AddExec(task.container, task.exec);
        let effects = self
            .table
            .step(SystemTime::now(), input)
            .map_err(|denied| self.denied(&denied))?;
        let view = self.known(&process)?;
        let record = ExecRecord {
            generation: view.generation,
            process_json: Arc::new(json),
            stdio: task.stdio,
            io: Arc::default(),
            resized: false,
        };
        self.execs.insert(process, record);
        self.apply(effects);
        Ok(())
    }

    fn state(&self, process: ProcessId) -> Result<ProcessState, SandboxError> {
        let view = self.known(&process)?;
        let container = self.containers.get(&process.container);
        let container = container.ok_or_else(|| self.not_found(&process))?;
        let stdio = match self.execs.get(&process) {
            Some(exec) => exec.stdio.clone(),
            None => container.task.stdio.clone(),
        };
        Ok(ProcessState {
            process,
            bundle: container.task.bundle.clone(),
            pid: view.pid,
            status: view.status,
            stdio,
            exit: view.exit,
        })
    }

    fn resize(&mut self, process: ProcessId, size: TerminalSize, reply: Reply<()>) {
        let view = match self.known(&process) {
            Ok(view) => view,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let terminal = match self.execs.get(&process) {
            Some(exec) => exec.stdio.terminal,
            None => self
                .containers
                .get(&process.container)
                .is_some_and(|record| record.task.stdio.terminal),
        };
        if let Some((_, io)) = self.io(&process) {
            io.set_size(size);
        }
        let lives_in_guest = match view.status {
            Status::Stopped => return drop(reply.send(Ok(()))),
            Status::Running | Status::Pausing | Status::Paused => true,
            Status::Created => process.exec.is_none() && view.pid != Pid::NONE,
        };
        if !terminal {
            drop(reply.send(Ok(())));
        } else if lives_in_guest {
            let shared = Arc::clone(&self.shared);
            let generation = view.generation;
            self.work
                .spawn(work::resize(shared, process, generation, size, Some(reply)));
        } else {
            // It goes along with the making; if that is under way already, it follows.
            self.mark_resized(&process, true);
            drop(reply.send(Ok(())));
        }
    }

    /// Sends a size that came while the process was being made. It may have gone along then, and does no harm twice.
    pub(crate) fn apply_late_size(&mut self, process: &ProcessId) {
        let Some(view) = self.table.view(process) else {
            return;
        };
        if view.pid == Pid::NONE || view.status == Status::Stopped {
            return;
        }
        if self.mark_resized(process, false)
            && let Some((generation, io)) = self.io(process)
        {
            let (shared, size) = (Arc::clone(&self.shared), io.size());
            let process = process.clone();
            self.work
                .spawn(work::resize(shared, process, generation, size, None));
        }
    }

    /// Sets whether a size is still to be sent, and says what was set before.
    fn mark_resized(&mut self, process: &ProcessId, value: bool) -> bool {
        let mark = match process.exec {
            None => self
                .containers
                .get_mut(&process.container)
                .map(|record| &mut record.resized),
            Some(_) => self
                .execs
                .get_mut(process)
                .map(|record| &mut record.resized),
        };
        mark.is_some_and(|mark| std::mem::replace(mark, value))
    }

    fn close_stdin(&self, process: &ProcessId) -> Result<(), SandboxError> {
        self.known(process)?;
        if let Some((_, io)) = self.io(process) {
            io.close_stdin();
        }
        Ok(())
    }

    fn pids(&mut self, container: ContainerId, reply: Reply<Vec<ProcessInfo>>) {
        let init = ProcessId::init(container.clone());
        let view = match self.known(&init) {
            Ok(view) => view,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let known: Vec<ProcessInfo> = self
            .table
            .processes()
            .filter(|(id, view)| {
                id.container == container && view.pid != Pid::NONE && view.status != Status::Stopped
            })
            .map(|(id, view)| ProcessInfo {
                pid: view.pid,
                exec: id.exec,
            })
            .collect();
        let role = self.containers.get(&container).map(|record| record.role);
        if role == Some(Role::Sandbox) || view.status == Status::Stopped {
            return drop(reply.send(Ok(known)));
        }
        let shared = Arc::clone(&self.shared);
        self.work.spawn(async move {
            let processes = with_guest_processes(&shared, &container, known).await;
            drop(reply.send(Ok(processes)));
        });
    }

    fn update(&mut self, container: ContainerId, resources: &[u8], reply: Reply<()>) {
        let wanted = self.task(&container).and_then(|(role, view)| {
            if view.status == Status::Stopped {
                return Err(self.denied(&Denied::InitNotRunning(container.clone())));
            }
            let update = ResourceUpdate::parse(resources).map_err(|error| {
                let message = format!("update container {container}");
                SandboxError::new(SandboxErrorKind::InvalidArgument, message).because(error)
            })?;
            Ok((role, update))
        });
        match wanted {
            Ok((role, update)) => {
                let shared = Arc::clone(&self.shared);
                self.work.spawn(async move {
                    let updated = work::update(&shared, &container, role, update).await;
                    drop(reply.send(updated));
                });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    fn stats(&mut self, container: ContainerId, reply: Reply<TaskStats>) {
        match self.task(&container) {
            Ok((role, _)) => {
                let record = self.containers.get(&container);
                let figures = record.map(|record| Arc::clone(&record.figures));
                let figures = figures.filter(|_| role == Role::Guest);
                if let Some(figures) = figures.as_ref().filter(|figures| figures.begin()) {
                    let (shared, figures) = (Arc::clone(&self.shared), Arc::clone(figures));
                    self.work
                        .spawn(stats::ask(shared, container.clone(), figures));
                }
                let shared = Arc::clone(&self.shared);
                self.work
                    .spawn(stats::answer(shared, container, figures, reply));
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// The role and init of a container that has been made.
    fn task(&self, container: &ContainerId) -> Result<(Role, View), SandboxError> {
        let init = ProcessId::init(container.clone());
        let view = self.known(&init)?;
        match self.containers.get(container) {
            Some(record) if view.pid != Pid::NONE => Ok((record.role, view)),
            _ => Err(self.not_found(&init)),
        }
    }

    fn tell_vm_ended(&mut self, reply: Reply<()>) {
        if !self.booted {
            return drop(reply.send(Ok(())));
        }
        let shared = Arc::clone(&self.shared);
        self.work.spawn(async move {
            shared.vm_ended().await;
            drop(reply.send(Ok(())));
        });
    }

    fn shutdown(&mut self) -> Result<(), SandboxError> {
        if !self.table.is_empty() {
            return Err(SandboxError::new(
                SandboxErrorKind::FailedPrecondition,
                "the sandbox still has tasks: delete them first",
            ));
        }
        self.closing = true;
        self.end_vm();
        Ok(())
    }

    fn known(&self, process: &ProcessId) -> Result<View, SandboxError> {
        self.table
            .view(process)
            .ok_or_else(|| self.not_found(process))
    }

    fn not_found(&self, process: &ProcessId) -> SandboxError {
        self.denied(&Denied::NotFound(process.clone()))
    }
}

/// The processes that the table knows, and those that they have started in the guest. A guest that does not answer
/// costs the latter only.
async fn with_guest_processes(
    shared: &Shared,
    container: &ContainerId,
    mut processes: Vec<ProcessInfo>,
) -> Vec<ProcessInfo> {
    let Ok(guest) = vm::ready(shared.vm.subscribe()).await else {
        return processes;
    };
    let listed = guest
        .agent
        .list_processes(&work::container_ref(container))
        .await;
    let mut seen: BTreeSet<Pid> = processes.iter().map(|process| process.pid).collect();
    for process in listed.unwrap_or_default() {
        if let Some(pid) = Pid::of_guest_process(process.guest_pid)
            && seen.insert(pid)
        {
            let exec = process.exec_id.parse::<ExecId>().ok();
            processes.push(ProcessInfo { pid, exec });
        }
    }
    processes
}
