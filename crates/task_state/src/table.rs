// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The table itself: what it holds, what it shows, and the helpers that both kinds of inputs share.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use ids::{ContainerId, ExecId, Generation};

use crate::container::{Container, Oom, Process, State};
use crate::denied::Denied;
use crate::message::{Answer, Effect, Event, Input, KillScope, Role, View};
use crate::process::{Exit, Pid, ProcessId};

/// How many deleted processes are remembered, so that a repeated `Delete` gets the same answer: containerd repeats one
/// that it gave up on, and does so soon.
pub const MAX_TOMBSTONES: usize = 64;

/// The linux number of `SIGKILL`.
pub(crate) const SIGKILL: u32 = 9;

/// The tasks of one sandbox. See the crate's documentation.
#[derive(Debug, Clone)]
pub struct TaskTable<E> {
    pub(crate) containers: BTreeMap<ContainerId, Container<E>>,
    pub(crate) tombstones: VecDeque<(ProcessId, Pid, Exit)>,
    pub(crate) last_generation: Generation,
    pub(crate) vm_gone: bool,
}

impl<E> Default for TaskTable<E> {
    fn default() -> Self {
        Self {
            containers: BTreeMap::new(),
            tombstones: VecDeque::new(),
            last_generation: Generation::default(),
            vm_gone: false,
        }
    }
}

impl<E> TaskTable<E> {
    /// Takes one input and says what is to be done, in order. Outcomes of work that no longer concerns anybody give no
    /// effects; only requests are denied. `now` dates exits that the guest did not report.
    ///
    /// # Errors
    /// [`Denied`] if the state of things forbids the request; nothing has changed then.
    pub fn step(&mut self, now: SystemTime, input: Input<E>) -> Result<Vec<Effect<E>>, Denied> {
        let mut step = Step {
            table: self,
            now,
            effects: Vec::new(),
        };
        match input {
            Input::Create(container, ticket) => step.create(container, ticket)?,
            Input::AddExec(container, exec) => step.add_exec(container, exec)?,
            Input::Start(process, ticket) => step.start(process, ticket)?,
            Input::Wait(process, ticket) => step.wait(process, ticket)?,
            Input::Kill {
                process,
                signal,
                scope,
                ticket,
            } => step.kill(process, signal, scope, ticket)?,
            Input::Delete(process, ticket) => step.delete(process, ticket)?,
            Input::Pause(container, ticket) => step.pause(container, ticket)?,
            Input::Resume(container, ticket) => step.resume(container, ticket)?,
            Input::Created {
                container,
                generation,
                result,
            } => step.created(&container, generation, result),
            Input::Started {
                process,
                generation,
                result,
            } => step.started(&process, generation, result),
            Input::Paused {
                container,
                generation,
                result,
            } => step.paused(container, generation, result),
            Input::Resumed {
                container,
                generation,
                result,
            } => step.resumed(container, generation, result),
            Input::Removed {
                process,
                generation,
            } => step.removed(process, generation),
            Input::Exited {
                process,
                generation,
                exit,
            } => step.exited(&process, generation, exit),
            Input::OutOfMemory(container) => step.out_of_memory(&container),
            Input::VmGone => step.vm_gone(),
        }
        Ok(step.effects)
    }

    /// A process, if it is known. What runs in a paused container is paused too, as with runc's shim.
    pub fn view(&self, process: &ProcessId) -> Option<View> {
        let container = self.containers.get(&process.container)?;
        match &process.exec {
            None => Some(container.init.view()),
            Some(exec) => Some(container.exec_view(container.execs.get(exec)?)),
        }
    }

    /// Every process, each container's init before its execs.
    pub fn processes(&self) -> impl Iterator<Item = (ProcessId, View)> {
        self.containers.iter().flat_map(|(container, entry)| {
            let init = (ProcessId::init(container.clone()), entry.init.view());
            let execs = entry.execs.iter().map(|(exec, process)| {
                let id = ProcessId::exec(container.clone(), exec.clone());
                (id, entry.exec_view(process))
            });
            std::iter::once(init).chain(execs)
        })
    }

    /// Whether no task is left.
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    pub(crate) fn process(&self, id: &ProcessId) -> Option<&Process<E>> {
        let container = self.containers.get(&id.container)?;
        match &id.exec {
            None => Some(&container.init),
            Some(exec) => container.execs.get(exec),
        }
    }

    pub(crate) fn process_mut(&mut self, id: &ProcessId) -> Option<&mut Process<E>> {
        let container = self.containers.get_mut(&id.container)?;
        match &id.exec {
            None => Some(&mut container.init),
            Some(exec) => container.execs.get_mut(exec),
        }
    }

    pub(crate) fn known(&mut self, id: &ProcessId) -> Result<&mut Process<E>, Denied> {
        self.process_mut(id)
            .ok_or_else(|| Denied::NotFound(id.clone()))
    }

    pub(crate) fn new_generation(&mut self) -> Generation {
        self.last_generation = self.last_generation.next();
        self.last_generation
    }

    pub(crate) fn bury(&mut self, process: ProcessId, pid: Pid, exit: Exit) {
        if self.tombstones.len() >= MAX_TOMBSTONES {
            self.tombstones.pop_front();
        }
        self.tombstones.push_back((process, pid, exit));
    }
}

/// One input being worked on.
pub(crate) struct Step<'a, E> {
    pub(crate) table: &'a mut TaskTable<E>,
    pub(crate) now: SystemTime,
    pub(crate) effects: Vec<Effect<E>>,
}

impl<E> Step<'_, E> {
    pub(crate) fn publish(&mut self, event: Event) {
        self.effects.push(Effect::Publish(event));
    }

    pub(crate) fn answer(&mut self, ticket: crate::Ticket, answer: Answer<E>) {
        self.effects.push(Effect::Answer(ticket, answer));
    }

    pub(crate) fn kill_all(&mut self, process: &ProcessId, generation: Generation) {
        self.effects.push(Effect::Signal {
            process: process.clone(),
            generation,
            signal: SIGKILL,
            scope: KillScope::All,
            ticket: None,
        });
    }

    /// Reports an OOM kill that was held until the task could be spoken of.
    pub(crate) fn publish_held_oom(&mut self, container: &ContainerId) {
        if let Some(entry) = self.table.containers.get_mut(container)
            && entry.oom == Oom::Held
        {
            entry.oom = Oom::Told;
            self.publish(Event::OutOfMemory(container.clone()));
        }
    }

    /// Reports that a process has ended, answers who waits for that, and goes on with a `Delete` that did. The only place
    /// where [`Event::Exited`] is made; the state that it leaves behind rules out a second one.
    pub(crate) fn stop(&mut self, id: &ProcessId, exit: Exit) {
        if id.exec.is_none() {
            self.publish_held_oom(&id.container);
        }
        let Some(pid) = self.table.process(id).map(|process| process.pid) else {
            return;
        };
        self.publish(Event::Exited(id.clone(), pid, exit));
        self.settle(id, exit);
        let is_sandbox = self
            .table
            .containers
            .get(&id.container)
            .is_some_and(|container| container.role == Role::Sandbox);
        if is_sandbox {
            self.effects.push(Effect::EndVm);
        }
    }

    /// The process is stopped, without a word to containerd.
    pub(crate) fn settle(&mut self, id: &ProcessId, exit: Exit) {
        let Some(process) = self.table.process_mut(id) else {
            return;
        };
        let generation = process.generation;
        let waits = std::mem::take(&mut process.waits);
        let kills = std::mem::take(&mut process.kills);
        let remove = !process.deletes.is_empty();
        process.state = if remove {
            State::Removing(exit)
        } else {
            State::Stopped(exit)
        };
        for ticket in waits {
            self.answer(ticket, Answer::Exit(exit));
        }
        for kill in kills {
            let finished = Denied::Finished(id.clone());
            self.answer(kill.ticket, Answer::Denied(finished));
        }
        if remove {
            self.effects.push(Effect::Remove(id.clone(), generation));
        }
    }

    /// An init that has ended is reported as soon as no exec of it is being started any more: an exec's start must be
    /// told, then its exit, then init's.
    pub(crate) fn release_init(&mut self, container: &ContainerId) {
        let Some(entry) = self.table.containers.get(container) else {
            return;
        };
        if let State::Held(exit) = entry.init.state
            && !entry.starts_an_exec()
        {
            self.stop(&ProcessId::init(container.clone()), exit);
        }
    }

    /// The execs of a container, by id.
    pub(crate) fn exec_ids(&self, container: &ContainerId) -> Vec<ExecId> {
        self.table
            .containers
            .get(container)
            .map(|entry| entry.execs.keys().cloned().collect())
            .unwrap_or_default()
    }
}
