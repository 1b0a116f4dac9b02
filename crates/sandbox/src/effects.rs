// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Has done what the task table says, in its order.

use std::sync::Arc;

use ids::{ContainerId, Generation};
use task_state::{Answer, Effect, Event, Exit, KillScope, Pid, ProcessId, Role, Ticket};

use crate::creation::Creation;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::event::TaskEvent;
use crate::input::{Input, Reply};
use crate::owner::Owner;
use crate::record::ProcessIo;
use crate::request::Deleted;
use crate::work::{self, ExecStart, Removal};

/// Who waits for the answer to a ticket.
pub(crate) enum Waiting {
    Pid(Reply<Pid>),
    Exit(Reply<Exit>),
    Deleted(Reply<Deleted>),
    Done(Reply<()>),
}

impl Waiting {
    /// What it waits for, for people.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Pid(_) => "creation or start",
            Self::Exit(_) => "exit",
            Self::Deleted(_) => "deletion",
            Self::Done(_) => "pause or resumption",
        }
    }

    fn fail(self, error: SandboxError) {
        // The callers may have gone away.
        match self {
            Self::Pid(reply) => drop(reply.send(Err(error))),
            Self::Exit(reply) => drop(reply.send(Err(error))),
            Self::Deleted(reply) => drop(reply.send(Err(error))),
            Self::Done(reply) => drop(reply.send(Err(error))),
        }
    }
}

impl Owner {
    pub(crate) fn apply(&mut self, effects: Vec<Effect<SandboxError>>) {
        for effect in effects {
            match effect {
                Effect::Publish(event) => self.publish(event),
                Effect::Answer(ticket, answer) => self.answer(ticket, answer),
                Effect::Create(container, generation) => self.make(container, generation),
                Effect::AbortCreate(container, _) => {
                    if let Some(record) = self.containers.get(&container) {
                        record.abort.send_replace(true);
                    }
                }
                Effect::Start(process, generation) => self.start(process, generation),
                Effect::Signal {
                    process,
                    generation,
                    signal,
                    scope,
                    ticket,
                } => self.signal(process, generation, (signal, scope), ticket),
                Effect::Pause(container, generation) => {
                    let shared = Arc::clone(&self.shared);
                    self.work.spawn(async move {
                        let result = work::pause(&shared, &container).await;
                        shared.send(Input::Paused(container, generation, result));
                    });
                }
                Effect::Resume(container, generation) => {
                    let shared = Arc::clone(&self.shared);
                    self.work.spawn(async move {
                        let result = work::resume(&shared, &container).await;
                        shared.send(Input::Resumed(container, generation, result));
                    });
                }
                Effect::Remove(process, generation) => self.remove(process, generation),
                Effect::EndVm => self.end_vm(),
            }
        }
    }

    fn publish(&self, event: Event) {
        let event = match event {
            Event::Created(container, pid) => {
                let Some(record) = self.containers.get(&container) else {
                    return;
                };
                TaskEvent::Created {
                    request: Arc::clone(&record.task),
                    pid,
                }
            }
            Event::Started(container, pid) => TaskEvent::Started { container, pid },
            Event::ExecAdded(container, exec) => TaskEvent::ExecAdded { container, exec },
            Event::ExecStarted(container, exec, pid) => TaskEvent::ExecStarted {
                container,
                exec,
                pid,
            },
            Event::OutOfMemory(container) => TaskEvent::OutOfMemory { container },
            Event::Paused(container) => TaskEvent::Paused { container },
            Event::Resumed(container) => TaskEvent::Resumed { container },
            Event::Exited(process, pid, exit) => {
                // Once for each process, whatever the guest tells.
                tracing::info!(
                    sandbox_id = self.shared.id.as_str(),
                    container_id = process.container.as_str(),
                    exec_id = process.exec.as_ref().map(|exec| exec.as_str()),
                    exit_status = exit.status,
                    "exited"
                );
                TaskEvent::Exited { process, pid, exit }
            }
            Event::Deleted(container, pid, exit) => TaskEvent::Deleted {
                container,
                pid,
                exit,
            },
        };
        self.events.publish(event);
    }

    pub(crate) fn answer(&mut self, ticket: Ticket, answer: Answer<SandboxError>) {
        let Some((waiting, _)) = self.waiting.remove(&ticket) else {
            return;
        };
        match (waiting, answer) {
            (waiting, Answer::Failed(error)) => waiting.fail(error),
            (waiting, Answer::Denied(denied)) => waiting.fail(self.denied(&denied)),
            (Waiting::Pid(reply), Answer::Pid(pid)) => drop(reply.send(Ok(pid))),
            (Waiting::Exit(reply), Answer::Exit(exit)) => drop(reply.send(Ok(exit))),
            (Waiting::Done(reply), Answer::Done) => drop(reply.send(Ok(()))),
            (Waiting::Deleted(reply), Answer::Deleted(pid, exit)) => {
                drop(reply.send(Ok(Deleted { pid, exit })));
            }
            (waiting, _) => waiting.fail(SandboxError::new(
                SandboxErrorKind::Internal,
                "the answer is for another question",
            )),
        }
    }

    fn make(&mut self, container: ContainerId, generation: Generation) {
        let Some(record) = self.containers.get(&container) else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        let creation = Creation {
            shared: Arc::clone(&shared),
            task: Arc::clone(&record.task),
            generation,
            io: Arc::clone(&record.io),
            abort: record.abort.subscribe(),
            admitted: false,
        };
        self.work.spawn(async move {
            let result = creation.run().await;
            shared.send(Input::Created(container, generation, result));
        });
    }

    fn start(&mut self, process: ProcessId, generation: Generation) {
        let shared = Arc::clone(&self.shared);
        if process.exec.is_none() {
            let container = process.container.clone();
            let role = self.role(&container);
            let io = self.io(&process).map(|(_, io)| Arc::clone(io));
            self.work.spawn(async move {
                let result = work::start_init(Arc::clone(&shared), container, role, io).await;
                shared.send(Input::Started(process, generation, result));
            });
            return;
        }
        let Some(record) = self.execs.get(&process) else {
            return;
        };
        let start = ExecStart {
            shared: Arc::clone(&shared),
            process: process.clone(),
            generation,
            process_json: Arc::clone(&record.process_json),
            stdio: record.stdio.clone(),
            io: Arc::clone(&record.io),
        };
        self.work.spawn(async move {
            let result = start.run().await;
            shared.send(Input::Started(process, generation, result));
        });
    }

    fn signal(
        &mut self,
        process: ProcessId,
        generation: Generation,
        (signal, scope): (u32, KillScope),
        ticket: Option<Ticket>,
    ) {
        let reply = ticket.and_then(|ticket| match self.waiting.remove(&ticket) {
            Some((Waiting::Done(reply), _)) => Some(reply),
            _ => None,
        });
        let request = work::signal_request(&process, generation, signal, scope);
        let shared = Arc::clone(&self.shared);
        self.work
            .spawn(work::signal(shared, process, request, reply));
    }

    fn remove(&mut self, process: ProcessId, generation: Generation) {
        let record = self.containers.get(&process.container);
        let disks = match (&process.exec, record) {
            (None, Some(record)) => record.disks.clone(),
            _ => Vec::new(),
        };
        let shared = Arc::clone(&self.shared);
        let removal = Removal {
            shared: Arc::clone(&shared),
            process: process.clone(),
            role: self.role(&process.container),
            io: self.io(&process).map(|(_, io)| Arc::clone(io)),
            disks,
            last: self.containers.len() <= 1,
        };
        self.work.spawn(async move {
            removal.run().await;
            shared.send(Input::Removed(process, generation));
        });
    }

    fn role(&self, container: &ContainerId) -> Role {
        let record = self.containers.get(container);
        record.map_or(Role::Guest, |record| record.role)
    }

    /// A process's streams, and whose they are.
    pub(crate) fn io(&self, process: &ProcessId) -> Option<(Generation, &Arc<ProcessIo>)> {
        match &process.exec {
            None => {
                let record = self.containers.get(&process.container)?;
                Some((record.generation, &record.io))
            }
            Some(_) => {
                let record = self.execs.get(process)?;
                Some((record.generation, &record.io))
            }
        }
    }
}
