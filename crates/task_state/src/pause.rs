// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pausing and resuming a container, with the rules of containerd's runc shim (its `runningState` and `pausedState`):
//! what does not run cannot be paused, what is not paused cannot be resumed, and a paused container takes no exec.

use ids::{ContainerId, Generation};

use crate::container::{Process, State};
use crate::denied::Denied;
use crate::message::{Answer, Effect, Event, Role, Ticket};
use crate::process::ProcessId;
use crate::table::Step;

impl<E> Step<'_, E> {
    pub(crate) fn pause(&mut self, container: ContainerId, ticket: Ticket) -> Result<(), Denied> {
        let init = self.task(&container)?;
        match init.state {
            State::Running => {
                init.state = State::Pausing {
                    ticket,
                    asked: false,
                };
            }
            _ if init.is_paused() => return Err(Denied::Paused(container)),
            _ => return Err(Denied::InitNotRunning(container)),
        }
        self.release_pause(&container);
        Ok(())
    }

    pub(crate) fn resume(&mut self, container: ContainerId, ticket: Ticket) -> Result<(), Denied> {
        let init = self.task(&container)?;
        if !matches!(init.state, State::Paused) {
            return Err(Denied::NotPaused(container));
        }
        init.state = State::Resuming { ticket };
        let generation = init.generation;
        self.effects.push(Effect::Resume(container, generation));
        Ok(())
    }

    /// Asks for a pause that no exec stands in the way of any more.
    pub(crate) fn release_pause(&mut self, container: &ContainerId) {
        let Some(entry) = self.table.containers.get_mut(container) else {
            return;
        };
        let starts_an_exec = entry.starts_an_exec();
        if let State::Pausing { asked, .. } = &mut entry.init.state
            && !*asked
            && !starts_an_exec
        {
            *asked = true;
            let generation = entry.init.generation;
            self.effects
                .push(Effect::Pause(container.clone(), generation));
        }
    }

    pub(crate) fn paused(
        &mut self,
        container: ContainerId,
        generation: Generation,
        result: Result<(), E>,
    ) {
        let id = ProcessId::init(container.clone());
        let Some(init) = self.current(&id, generation) else {
            return;
        };
        let State::Pausing {
            ticket,
            asked: true,
        } = init.state
        else {
            return;
        };
        match result {
            Ok(()) => {
                init.state = State::Paused;
                self.publish(Event::Paused(container));
                self.answer(ticket, Answer::Done);
            }
            Err(error) => {
                init.state = State::Running;
                self.answer(ticket, Answer::Failed(error));
            }
        }
    }

    pub(crate) fn resumed(
        &mut self,
        container: ContainerId,
        generation: Generation,
        result: Result<(), E>,
    ) {
        let id = ProcessId::init(container.clone());
        let Some(init) = self.current(&id, generation) else {
            return;
        };
        let State::Resuming { ticket } = init.state else {
            return;
        };
        match result {
            Ok(()) => {
                init.state = State::Running;
                self.publish(Event::Resumed(container));
                self.answer(ticket, Answer::Done);
            }
            Err(error) => {
                init.state = State::Paused;
                self.answer(ticket, Answer::Failed(error));
            }
        }
    }

    /// The init of a container that has processes.
    fn task(&mut self, container: &ContainerId) -> Result<&mut Process<E>, Denied> {
        let entry = self.table.containers.get_mut(container);
        let entry = entry.ok_or_else(|| Denied::NotFound(ProcessId::init(container.clone())))?;
        if entry.role == Role::Sandbox {
            return Err(Denied::NoProcess(container.clone()));
        }
        Ok(&mut entry.init)
    }
}
