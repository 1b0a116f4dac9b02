// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What became of the work, and what the guest tells. The guest is not trusted: whatever it says, and in whatever order,
//! containerd sees one start before one exit for each process.

use ids::{ContainerId, Generation};

use crate::container::{Oom, Process, State};
use crate::denied::Denied;
use crate::message::{Answer, Effect, Event, Role};
use crate::process::{Exit, Pid, ProcessId};
use crate::table::Step;

impl<E> Step<'_, E> {
    pub(crate) fn created(
        &mut self,
        container: &ContainerId,
        generation: Generation,
        result: Result<(Role, Pid), E>,
    ) {
        let id = ProcessId::init(container.clone());
        let vm_gone = self.table.vm_gone;
        let Some(entry) = self.table.containers.get_mut(container) else {
            return;
        };
        let State::Creating {
            ticket,
            interrupted,
            ended,
        } = entry.init.state
        else {
            return;
        };
        if entry.init.generation != generation {
            return;
        }
        let (role, pid) = match result {
            Ok(made) => made,
            Err(error) => return self.creation_failed(&id, ticket, error),
        };
        entry.role = role;
        entry.init.pid = pid;
        entry.init.state = State::Created;
        self.publish(Event::Created(container.clone(), pid));
        self.answer(ticket, Answer::Pid(pid));
        self.publish_held_oom(container);
        match ended {
            Some(exit) => self.stop(&id, exit),
            None if vm_gone => self.stop(&id, Exit::killed(self.now)),
            None if interrupted && role == Role::Sandbox => {
                self.stop(&id, Exit::killed(self.now));
            }
            None if interrupted => self.kill_all(&id, generation),
            None => {}
        }
    }

    fn creation_failed(&mut self, id: &ProcessId, ticket: crate::Ticket, error: E) {
        let Some(entry) = self.table.containers.remove(&id.container) else {
            return;
        };
        self.answer(ticket, Answer::Failed(error));
        for waiting in entry.init.waits.into_iter().chain(entry.init.deletes) {
            let not_found = Denied::NotFound(id.clone());
            self.answer(waiting, Answer::Denied(not_found));
        }
    }

    pub(crate) fn started(
        &mut self,
        id: &ProcessId,
        generation: Generation,
        result: Result<Option<Pid>, E>,
    ) {
        let Some(process) = self.current(id, generation) else {
            return;
        };
        let State::Starting { ticket, ended } = process.state else {
            return;
        };
        match result {
            Ok(pid) => {
                process.state = State::Running;
                process.pid = pid.unwrap_or(process.pid);
                self.runs(id, ticket);
                if let Some(exit) = ended {
                    self.ends(id, exit);
                } else {
                    self.init_is_gone_too(id);
                }
            }
            Err(error) => self.start_failed(id, ticket, ended, error),
        }
        self.release_init(&id.container);
        self.release_pause(&id.container);
    }

    /// Reports a start, and sends on what had waited for it.
    fn runs(&mut self, id: &ProcessId, ticket: crate::Ticket) {
        let Some(process) = self.table.process_mut(id) else {
            return;
        };
        let (pid, generation) = (process.pid, process.generation);
        let kills = std::mem::take(&mut process.kills);
        let container = id.container.clone();
        self.publish(match &id.exec {
            None => Event::Started(container, pid),
            Some(exec) => Event::ExecStarted(container, exec.clone(), pid),
        });
        if id.exec.is_none() {
            self.publish_held_oom(&id.container);
        }
        self.answer(ticket, Answer::Pid(pid));
        for kill in kills {
            self.effects.push(Effect::Signal {
                process: id.clone(),
                generation,
                signal: kill.signal,
                scope: kill.scope,
                ticket: Some(kill.ticket),
            });
        }
    }

    fn start_failed(
        &mut self,
        id: &ProcessId,
        ticket: crate::Ticket,
        ended: Option<Exit>,
        error: E,
    ) {
        let role = self.table.containers.get(&id.container).map(|c| c.role);
        let Some(process) = self.table.process_mut(id) else {
            return;
        };
        let generation = process.generation;
        if id.exec.is_some() {
            // containerd was never told of a start, so it is told of no exit. Should the guest have started it after
            // all, it must not stay.
            let exit = ended.unwrap_or(Exit::never_started(self.now));
            self.settle(id, exit);
            self.answer(ticket, Answer::Failed(error));
            self.kill_exec(id, generation);
            return;
        }
        match ended {
            Some(exit) => {
                self.stop(id, exit);
                self.answer(ticket, Answer::Failed(error));
            }
            None if role == Some(Role::Sandbox) => {
                self.stop(id, Exit::never_started(self.now));
                self.answer(ticket, Answer::Failed(error));
            }
            None => {
                // The answer waits for the end, because containerd may delete the task as soon as it has it.
                process.state = State::Failing { ticket, error };
                self.kill_all(id, generation);
            }
        }
    }

    fn kill_exec(&mut self, exec: &ProcessId, generation: Generation) {
        self.effects.push(Effect::Signal {
            process: exec.clone(),
            generation,
            signal: crate::table::SIGKILL,
            scope: crate::KillScope::Process,
            ticket: None,
        });
    }

    pub(crate) fn exited(&mut self, id: &ProcessId, generation: Generation, exit: Exit) {
        let Some(process) = self.current(id, generation) else {
            return;
        };
        match &mut process.state {
            State::Creating { ended, .. } | State::Starting { ended, .. } => {
                ended.get_or_insert(exit);
            }
            State::Created
            | State::Running
            | State::Pausing { .. }
            | State::Paused
            | State::Resuming { .. }
            | State::Failing { .. } => self.ends(id, exit),
            State::Registered | State::Held(_) | State::Stopped(_) | State::Removing(_) => {}
        }
    }

    /// A process whose making containerd knows of has ended. With an init, everything in its container has.
    fn ends(&mut self, id: &ProcessId, exit: Exit) {
        if id.exec.is_some() {
            self.stop(id, exit);
            return;
        }
        for exec in self.exec_ids(&id.container) {
            let exec = ProcessId::exec(id.container.clone(), exec);
            let state = self.table.process(&exec).map(|process| &process.state);
            if matches!(state, Some(State::Running)) {
                self.stop(&exec, Exit::killed(exit.at));
            }
        }
        let Some(process) = self.table.process_mut(id) else {
            return;
        };
        match std::mem::replace(&mut process.state, State::Held(exit)) {
            State::Failing { ticket, error } => {
                self.stop(id, exit);
                self.answer(ticket, Answer::Failed(error));
            }
            State::Pausing { ticket, .. } | State::Resuming { ticket } => {
                self.release_init(&id.container);
                let ended = Denied::InitNotRunning(id.container.clone());
                self.answer(ticket, Answer::Denied(ended));
            }
            _ => self.release_init(&id.container),
        }
    }

    /// An exec's start was confirmed after its init had ended: it is gone as well.
    fn init_is_gone_too(&mut self, id: &ProcessId) {
        let init = self.table.containers.get(&id.container).map(|c| &c.init);
        if id.exec.is_some()
            && let Some(State::Held(exit)) = init.map(|init| &init.state)
        {
            let exit = Exit::killed(exit.at);
            self.stop(id, exit);
        }
    }

    pub(crate) fn removed(&mut self, id: ProcessId, generation: Generation) {
        let Some(process) = self.current(&id, generation) else {
            return;
        };
        if !matches!(process.state, State::Removing(_)) {
            return;
        }
        if let Some(exec) = &id.exec {
            let entry = self.table.containers.get_mut(&id.container);
            if let Some(process) = entry.and_then(|entry| entry.execs.remove(exec)) {
                self.forget(id, process);
            }
            return;
        }
        let Some(entry) = self.table.containers.remove(&id.container) else {
            return;
        };
        for (exec, process) in entry.execs {
            self.forget(ProcessId::exec(id.container.clone(), exec), process);
        }
        if let Some(exit) = entry.init.exit() {
            let (container, pid) = (id.container.clone(), entry.init.pid);
            self.publish(Event::Deleted(container, pid, exit));
        }
        self.forget(id, entry.init);
    }

    /// Answers everybody who still waits for a process that is no more.
    fn forget(&mut self, id: ProcessId, process: Process<E>) {
        let exit = process.exit().unwrap_or(Exit::never_started(self.now));
        for ticket in process.waits {
            self.answer(ticket, Answer::Exit(exit));
        }
        for ticket in process.deletes {
            self.answer(ticket, Answer::Deleted(process.pid, exit));
        }
        self.table.bury(id, process.pid, exit);
    }

    pub(crate) fn out_of_memory(&mut self, container: &ContainerId) {
        let Some(entry) = self.table.containers.get_mut(container) else {
            return;
        };
        if entry.oom != Oom::None {
            return;
        }
        match entry.init.state {
            State::Creating { .. } | State::Starting { .. } => entry.oom = Oom::Held,
            State::Created
            | State::Failing { .. }
            | State::Running
            | State::Pausing { .. }
            | State::Paused
            | State::Resuming { .. }
            | State::Held(_) => {
                entry.oom = Oom::Held;
                self.publish_held_oom(container);
            }
            State::Registered | State::Stopped(_) | State::Removing(_) => {}
        }
    }

    /// Every process that lives is reported as killed, once; whoever waits for the guest is answered.
    pub(crate) fn vm_gone(&mut self) {
        self.table.vm_gone = true;
        let containers: Vec<ContainerId> = self.table.containers.keys().cloned().collect();
        for container in containers {
            for exec in self.exec_ids(&container) {
                self.dies(&ProcessId::exec(container.clone(), exec));
            }
            self.dies(&ProcessId::init(container));
        }
    }

    fn dies(&mut self, id: &ProcessId) {
        let killed = Exit::killed(self.now);
        let Some(process) = self.table.process_mut(id) else {
            return;
        };
        let gone = Answer::Denied(Denied::VmGone(id.clone()));
        let state = std::mem::replace(&mut process.state, State::Stopped(killed));
        match state {
            State::Created | State::Running | State::Paused => self.stop(id, killed),
            State::Pausing { ticket, .. } | State::Resuming { ticket } => {
                self.stop(id, killed);
                self.answer(ticket, gone);
            }
            State::Held(exit) => self.stop(id, exit),
            State::Starting { ticket, ended } => {
                let exit = ended.unwrap_or(killed);
                if id.exec.is_some() {
                    self.settle(id, exit);
                } else {
                    self.stop(id, exit);
                }
                self.answer(ticket, gone);
            }
            State::Failing { ticket, error } => {
                self.stop(id, killed);
                self.answer(ticket, Answer::Failed(error));
            }
            // What is being made ends with a failure of its own; what never ran has not ended; the rest has.
            State::Creating { .. } | State::Registered | State::Stopped(_) | State::Removing(_) => {
                process.state = state
            }
        }
    }

    pub(crate) fn current(
        &mut self,
        id: &ProcessId,
        generation: Generation,
    ) -> Option<&mut Process<E>> {
        self.table
            .process_mut(id)
            .filter(|process| process.generation == generation)
    }
}
