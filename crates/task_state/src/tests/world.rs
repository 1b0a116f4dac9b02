// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A table with everything around it: containerd's requests, the work in flight, and a checker of the event grammar.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use ids::{ContainerId, ExecId, Generation};

use crate::{
    Answer, Denied, Effect, Event, Exit, Input, KillScope, Pid, ProcessId, Role, TaskTable, Ticket,
};

/// Work that the table has asked for and that is not done yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    Create(ContainerId, Generation),
    Start(ProcessId, Generation),
    Pause(ContainerId, Generation),
    Resume(ContainerId, Generation),
    Remove(ProcessId, Generation),
}

/// What containerd has been told of one task.
#[derive(Debug, Clone, Default)]
struct Told {
    started: bool,
    paused: bool,
    oom: bool,
    exited: bool,
    execs: BTreeMap<ExecId, ToldExec>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToldExec {
    Added,
    Started,
    Exited,
}

#[derive(Debug, Clone, Default)]
pub(super) struct World {
    pub(super) table: TaskTable<&'static str>,
    pub(super) work: Vec<Work>,
    pub(super) open_tickets: BTreeSet<Ticket>,
    last_ticket: u64,
    tasks: BTreeMap<ContainerId, Told>,
    pub(super) exits: Vec<(ProcessId, u32)>,
    pub(super) signals: Vec<(ProcessId, u32)>,
    pub(super) role_is_sandbox: bool,
    pub(super) vm_ended: bool,
}

pub(super) const FAILED: &str = "failed";

pub(super) fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second)
}

pub(super) fn exit(status: u32) -> Exit {
    Exit { status, at: at(1) }
}

pub(super) fn init() -> ProcessId {
    ProcessId::init("c".parse().unwrap())
}

pub(super) fn exec() -> ProcessId {
    ProcessId::exec("c".parse().unwrap(), "e".parse().unwrap())
}

impl World {
    /// Containers turn out to be sandbox containers, or not.
    pub(super) fn with_role(role_is_sandbox: bool) -> Self {
        Self {
            role_is_sandbox,
            ..Self::default()
        }
    }

    pub(super) fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        self.open_tickets.insert(ticket);
        ticket
    }

    /// A request with a ticket.
    pub(super) fn ask(
        &mut self,
        request: impl FnOnce(Ticket) -> Input<&'static str>,
    ) -> Result<Ticket, Denied> {
        let ticket = self.ticket();
        let result = self.feed(request(ticket));
        if result.is_err() {
            assert!(self.open_tickets.remove(&ticket), "denied and answered");
        }
        result.map(|_| ticket)
    }

    pub(super) fn create(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Create(id.container.clone(), ticket))
    }

    pub(super) fn start(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Start(id.clone(), ticket))
    }

    pub(super) fn wait(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Wait(id.clone(), ticket))
    }

    pub(super) fn delete(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Delete(id.clone(), ticket))
    }

    pub(super) fn kill(&mut self, id: &ProcessId, signal: u32) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Kill {
            process: id.clone(),
            signal,
            scope: KillScope::Process,
            ticket,
        })
    }

    pub(super) fn pause(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Pause(id.container.clone(), ticket))
    }

    pub(super) fn resume(&mut self, id: &ProcessId) -> Result<Ticket, Denied> {
        self.ask(|ticket| Input::Resume(id.container.clone(), ticket))
    }

    pub(super) fn add_exec(&mut self, id: &ProcessId) -> Result<(), Denied> {
        let exec = id.exec.clone().unwrap();
        self.feed(Input::AddExec(id.container.clone(), exec))
            .map(|_| ())
    }

    /// The process has ended in the guest.
    pub(super) fn ends(&mut self, id: &ProcessId, status: u32) {
        let Some(view) = self.table.view(id) else {
            return;
        };
        self.feed(Input::Exited {
            process: id.clone(),
            generation: view.generation,
            exit: exit(status),
        })
        .unwrap();
    }

    /// The work at `index` is done.
    pub(super) fn finish(&mut self, index: usize, succeeds: bool) {
        let result = self.work.remove(index);
        let input = match result {
            Work::Create(container, generation) => Input::Created {
                container,
                generation,
                result: if succeeds {
                    let role = if self.role_is_sandbox {
                        Role::Sandbox
                    } else {
                        Role::Guest
                    };
                    Ok((role, Pid::of_host_process(7)))
                } else {
                    Err(FAILED)
                },
            },
            Work::Start(process, generation) => Input::Started {
                result: if succeeds {
                    Ok(process.exec.is_some().then(|| Pid::of_host_process(8)))
                } else {
                    Err(FAILED)
                },
                process,
                generation,
            },
            Work::Pause(container, generation) => Input::Paused {
                container,
                generation,
                result: if succeeds { Ok(()) } else { Err(FAILED) },
            },
            Work::Resume(container, generation) => Input::Resumed {
                container,
                generation,
                result: if succeeds { Ok(()) } else { Err(FAILED) },
            },
            Work::Remove(process, generation) => Input::Removed {
                process,
                generation,
            },
        };
        self.feed(input).unwrap();
    }

    /// All work succeeds, in order.
    pub(super) fn finish_all(&mut self) {
        while !self.work.is_empty() {
            self.finish(0, true);
        }
    }

    pub(super) fn feed(
        &mut self,
        input: Input<&'static str>,
    ) -> Result<Vec<Effect<&'static str>>, Denied> {
        let effects = self.table.step(at(9), input)?;
        for effect in &effects {
            self.carry_out(effect);
        }
        Ok(effects)
    }

    fn carry_out(&mut self, effect: &Effect<&'static str>) {
        match effect.clone() {
            Effect::Publish(event) => self.told(event),
            Effect::Answer(ticket, answer) => self.answered(ticket, &answer),
            Effect::Create(container, generation) => {
                self.work.push(Work::Create(container, generation));
            }
            Effect::Start(process, generation) => {
                let paused = self
                    .tasks
                    .get(&process.container)
                    .is_some_and(|task| task.paused);
                assert!(!paused, "{process} is started in a paused container");
                self.work.push(Work::Start(process, generation));
            }
            Effect::Pause(container, generation) => {
                let starts = |work: &Work| matches!(work, Work::Start(process, _) if process.container == container);
                // What is being started for a container that is gone concerns nobody.
                let view = self
                    .table
                    .processes()
                    .any(|(id, view)| id.container == container && view.phase == "starting");
                assert!(
                    !(view && self.work.iter().any(starts)),
                    "frozen while it starts"
                );
                self.work.push(Work::Pause(container, generation));
            }
            Effect::Resume(container, generation) => {
                self.work.push(Work::Resume(container, generation));
            }
            Effect::Remove(process, generation) => {
                self.work.push(Work::Remove(process, generation));
            }
            Effect::Signal {
                process,
                signal,
                ticket,
                ..
            } => {
                self.signals.push((process, signal));
                if let Some(ticket) = ticket {
                    self.answered(ticket, &Answer::Done);
                }
            }
            Effect::EndVm => self.vm_ended = true,
            Effect::AbortCreate(..) => {}
        }
    }

    fn answered(&mut self, ticket: Ticket, answer: &Answer<&'static str>) {
        assert!(
            self.open_tickets.remove(&ticket),
            "{ticket:?} answered twice, with {answer:?}"
        );
    }

    /// The grammar of containerd docs/runtime-v2.md, "Events".
    fn told(&mut self, event: Event) {
        match event {
            Event::Created(container, _) => {
                let before = self.tasks.insert(container, Told::default());
                assert!(before.is_none(), "created twice");
            }
            Event::Started(container, _) => {
                let task = self.task(&container);
                assert!(!task.started && !task.exited);
                task.started = true;
            }
            Event::ExecAdded(container, exec) => {
                let task = self.task(&container);
                assert!(!task.exited, "exec added after init's exit");
                let before = task.execs.insert(exec, ToldExec::Added);
                assert_ne!(before, Some(ToldExec::Started), "exec added while it runs");
            }
            Event::ExecStarted(container, exec, _) => {
                let task = self.task(&container);
                assert!(task.started && !task.exited && !task.paused);
                let before = task.execs.insert(exec, ToldExec::Started);
                assert_eq!(before, Some(ToldExec::Added));
            }
            Event::OutOfMemory(container) => {
                let task = self.task(&container);
                assert!(!task.oom && !task.exited);
                task.oom = true;
            }
            Event::Paused(container) => {
                let task = self.task(&container);
                assert!(task.started && !task.exited && !task.paused);
                task.paused = true;
            }
            Event::Resumed(container) => {
                let task = self.task(&container);
                assert!(!task.exited && task.paused);
                task.paused = false;
            }
            Event::Exited(process, _, exit) => {
                let task = self.task(&process.container);
                assert!(!task.exited, "an exit after init's");
                match &process.exec {
                    None => {
                        assert!(task.execs.values().all(|exec| *exec != ToldExec::Started));
                        task.exited = true;
                    }
                    Some(exec) => {
                        let before = task.execs.insert(exec.clone(), ToldExec::Exited);
                        assert_eq!(before, Some(ToldExec::Started));
                    }
                }
                self.exits.push((process, exit.status));
            }
            Event::Deleted(container, ..) => {
                let task = self.tasks.remove(&container);
                assert!(task.is_some_and(|task| task.exited));
            }
        }
    }

    fn task(&mut self, container: &ContainerId) -> &mut Told {
        self.tasks
            .get_mut(container)
            .expect("an event of a task that was not created")
    }

    /// The VM dies, containerd cleans up: every ticket must be answered and nothing must be left.
    pub(super) fn wind_up(&mut self) {
        self.feed(Input::VmGone).unwrap();
        while !self.work.is_empty() {
            let succeeds = !matches!(self.work.first(), Some(Work::Create(..)));
            self.finish(0, succeeds);
        }
        let left: Vec<_> = self.table.processes().map(|(id, _)| id).collect();
        for id in left {
            self.delete(&id).expect("everything has ended");
        }
        self.finish_all();
        assert!(self.table.is_empty());
        assert_eq!(self.open_tickets, BTreeSet::new(), "unanswered");
        assert!(self.tasks.is_empty(), "containerd still knows of a task");
    }
}
