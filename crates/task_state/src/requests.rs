// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What containerd asks for: allowed, or denied with nothing changed.

use std::collections::BTreeMap;

use ids::{ContainerId, ExecId};

use crate::container::{Container, HeldKill, Oom, Process, State};
use crate::denied::Denied;
use crate::message::{Answer, Effect, Event, KillScope, Role, Ticket};
use crate::process::{Exit, ProcessId};
use crate::signal;
use crate::table::Step;

impl<E> Step<'_, E> {
    pub(crate) fn create(&mut self, container: ContainerId, ticket: Ticket) -> Result<(), Denied> {
        let id = ProcessId::init(container.clone());
        if self.table.containers.contains_key(&container) {
            return Err(Denied::AlreadyExists(id));
        }
        if self.table.vm_gone {
            return Err(Denied::VmGone(id));
        }
        // A new task of this name is not the one that was deleted.
        self.table
            .tombstones
            .retain(|(process, ..)| process.container != container);
        let generation = self.table.new_generation();
        let state = State::Creating {
            ticket,
            interrupted: false,
            ended: None,
        };
        let entry = Container {
            role: Role::Guest,
            init: Process::new(generation, state),
            execs: BTreeMap::new(),
            oom: Oom::None,
        };
        self.table.containers.insert(container.clone(), entry);
        self.effects.push(Effect::Create(container, generation));
        Ok(())
    }

    pub(crate) fn add_exec(&mut self, container: ContainerId, exec: ExecId) -> Result<(), Denied> {
        let id = ProcessId::exec(container.clone(), exec.clone());
        let generation = self.table.new_generation();
        let entry = self
            .table
            .containers
            .get_mut(&container)
            .ok_or_else(|| Denied::NotFound(ProcessId::init(container.clone())))?;
        if entry.execs.contains_key(&exec) {
            return Err(Denied::AlreadyExists(id));
        }
        if entry.init.is_paused() {
            return Err(Denied::Paused(container));
        }
        let lives = matches!(
            entry.init.state,
            State::Created | State::Starting { .. } | State::Running
        );
        if !lives || entry.role == Role::Sandbox {
            return Err(Denied::InitNotRunning(container));
        }
        let process = Process::new(generation, State::Registered);
        entry.execs.insert(exec.clone(), process);
        self.table.tombstones.retain(|(process, ..)| *process != id);
        self.publish(Event::ExecAdded(container, exec));
        Ok(())
    }

    pub(crate) fn start(&mut self, id: ProcessId, ticket: Ticket) -> Result<(), Denied> {
        if id.exec.is_some() {
            let entry = self.table.containers.get(&id.container);
            let runs = entry.is_some_and(|entry| matches!(entry.init.state, State::Running));
            let paused = entry.is_some_and(|entry| entry.init.is_paused());
            if self.table.process(&id).is_some() && !runs {
                return Err(if paused {
                    Denied::Paused(id.container)
                } else {
                    Denied::InitNotRunning(id.container)
                });
            }
        }
        let process = self.table.known(&id)?;
        match process.state {
            State::Creating { .. } => return Err(Denied::NotFound(id)),
            State::Created if !process.deletes.is_empty() => return Err(Denied::Interrupted(id)),
            State::Created | State::Registered => {}
            _ => return Err(Denied::AlreadyStarted(id)),
        }
        process.state = State::Starting {
            ticket,
            ended: None,
        };
        let generation = process.generation;
        self.effects.push(Effect::Start(id, generation));
        Ok(())
    }

    pub(crate) fn wait(&mut self, id: ProcessId, ticket: Ticket) -> Result<(), Denied> {
        let process = self.table.known(&id)?;
        match process.exit() {
            Some(exit) => self.answer(ticket, Answer::Exit(exit)),
            None => process.waits.push(ticket),
        }
        Ok(())
    }

    pub(crate) fn kill(
        &mut self,
        id: ProcessId,
        number: u32,
        scope: KillScope,
        ticket: Ticket,
    ) -> Result<(), Denied> {
        if number > signal::MAX {
            return Err(Denied::InvalidSignal(number));
        }
        let role = self.table.containers.get(&id.container).map(|c| c.role);
        let process = self.table.known(&id)?;
        let generation = process.generation;
        match &mut process.state {
            State::Stopped(_) | State::Removing(_) => return Err(Denied::Finished(id)),
            State::Registered => return Err(Denied::NotStarted(id)),
            // Only asks whether there is somebody, and there is.
            _ if number == 0 => self.answer(ticket, Answer::Done),
            State::Creating { interrupted, .. } => {
                if signal::ends_a_process(number) {
                    *interrupted = true;
                    self.effects
                        .push(Effect::AbortCreate(id.container, generation));
                }
                self.answer(ticket, Answer::Done);
            }
            State::Starting { .. } if id.exec.is_some() => process.kills.push(HeldKill {
                signal: number,
                scope,
                ticket,
            }),
            _ if role == Some(Role::Sandbox) => {
                if signal::ends_a_process(number) {
                    self.stop_sandbox_container(&id, number.saturating_add(128));
                }
                self.answer(ticket, Answer::Done);
            }
            _ => self.effects.push(Effect::Signal {
                process: id,
                generation,
                signal: number,
                scope,
                ticket: Some(ticket),
            }),
        }
        Ok(())
    }

    pub(crate) fn delete(&mut self, id: ProcessId, ticket: Ticket) -> Result<(), Denied> {
        let role = self.table.containers.get(&id.container).map(|c| c.role);
        let Some(process) = self.table.process_mut(&id) else {
            return self.delete_again(id, ticket);
        };
        let generation = process.generation;
        match &mut process.state {
            State::Starting { .. }
            | State::Failing { .. }
            | State::Running
            | State::Pausing { .. }
            | State::Paused
            | State::Resuming { .. }
            | State::Held(_) => return Err(Denied::StillRuns(id)),
            State::Creating { interrupted, .. } => {
                *interrupted = true;
                process.deletes.push(ticket);
                self.effects
                    .push(Effect::AbortCreate(id.container, generation));
            }
            State::Created => {
                process.deletes.push(ticket);
                if role == Some(Role::Sandbox) {
                    self.stop_sandbox_container(&id, Exit::KILLED);
                } else {
                    self.kill_all(&id, generation);
                }
            }
            State::Registered => {
                process.deletes.push(ticket);
                let exit = Exit::never_started(self.now);
                self.settle(&id, exit);
            }
            State::Stopped(exit) => {
                process.state = State::Removing(*exit);
                process.deletes.push(ticket);
                self.effects.push(Effect::Remove(id, generation));
            }
            State::Removing(_) => process.deletes.push(ticket),
        }
        Ok(())
    }

    fn delete_again(&mut self, id: ProcessId, ticket: Ticket) -> Result<(), Denied> {
        let buried = self.table.tombstones.iter().find(|(dead, ..)| *dead == id);
        let Some((_, pid, exit)) = buried else {
            return Err(Denied::NotFound(id));
        };
        let answer = Answer::Deleted(*pid, *exit);
        self.answer(ticket, answer);
        Ok(())
    }

    fn stop_sandbox_container(&mut self, id: &ProcessId, status: u32) {
        let start = match self.table.process(id).map(|process| &process.state) {
            Some(State::Starting { ticket, .. }) => Some(*ticket),
            _ => None,
        };
        let exit = Exit {
            status,
            at: self.now,
        };
        self.stop(id, exit);
        if let Some(ticket) = start {
            let interrupted = Denied::Interrupted(id.clone());
            self.answer(ticket, Answer::Denied(interrupted));
        }
    }
}
