// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers and their processes: what there is, and what its end means. Pure; [`crate::Agent`] does the rest.
//!
//! ```text
//! container: creating --created()--> created --take_gate()--> started --ended()--> ended --begin_removal()--> removing
//!                \--abandon()--> (forgotten)       \-----------ended()--------------^        forget() --> (forgotten)
//! exec:      starting --started()--> live --ended()--> (forgotten)
//!                \--abandon()--> (forgotten)
//! ```
//! Invariants: a process's exit is given out once; not before [`ProcessTable::started`] for an exec; and a container's
//! init's not before those of its execs (containerd's runtime-v2: init's exit is the container's last).

mod changes;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use agent_proto::ProcessKey;
use ids::{ContainerId, ExecId, Generation};
use oci_spec::runtime::Spec;
use tokio::sync::watch;

use crate::Error;

/// A process's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Whose.
    pub key: ProcessKey,
    /// The exit code, or 128 plus the signal.
    pub status: u32,
    /// When, in ns since the epoch.
    pub at_unix_ns: u64,
}

/// What the end of a process means.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Consequences {
    /// To be told, in this order.
    pub exits: Vec<Exit>,
    /// A container whose init has ended while others of it run.
    pub end_rest: Option<ContainerId>,
}

/// The agent's ends of a process's streams, as far as requests are about them.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// The terminal's controlling end.
    pub terminal: Option<Arc<OwnedFd>>,
    /// After how many bytes standard input is to be closed.
    pub close_stdin: Option<watch::Sender<Option<u64>>>,
}

/// What an exec needs of its container.
#[derive(Debug)]
pub struct ExecBase {
    /// The container's spec.
    pub spec: Arc<Spec>,
    /// The pidfd of its init.
    pub init: Arc<OwnedFd>,
    /// Ends when the container is removed.
    pub removed: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    process: Option<(u32, Arc<OwnedFd>)>,
    io: ProcessIo,
    starting: bool,
    exit: Option<Exit>,
}

#[derive(Debug)]
enum Phase<G> {
    Creating,
    Created(G),
    Started,
    Ended,
    Removing,
}

#[derive(Debug)]
struct Container<G> {
    spec: Arc<Spec>,
    phase: Phase<G>,
    init: Entry,
    execs: BTreeMap<ExecId, Entry>,
    removed: watch::Sender<bool>,
    oom_kills: u64,
    /// Its cgroup is being changed.
    changing: bool,
    frozen: bool,
}

/// All containers and processes that the host has asked for. `G` lets a created init run.
#[derive(Debug)]
pub struct ProcessTable<G> {
    containers: BTreeMap<ContainerId, Container<G>>,
    by_pid: HashMap<u32, ProcessKey>,
}

impl<G> Default for ProcessTable<G> {
    fn default() -> Self {
        Self {
            containers: BTreeMap::new(),
            by_pid: HashMap::new(),
        }
    }
}

impl Entry {
    fn new(generation: Generation) -> Self {
        Self {
            generation,
            process: None,
            io: ProcessIo::default(),
            starting: true,
            exit: None,
        }
    }
}

fn unknown(container: &ContainerId) -> Error {
    Error::NotFound {
        what: "container",
        id: container.to_string(),
    }
}

fn wrong(container: &ContainerId, state: &'static str) -> Error {
    Error::WrongState {
        what: "container",
        id: container.to_string(),
        state,
    }
}

impl<G> ProcessTable<G> {
    /// Takes the name of a container that is about to be made; the receiver ends when it is removed.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`].
    pub fn reserve_container(
        &mut self,
        key: &ProcessKey,
        spec: Arc<Spec>,
    ) -> Result<watch::Receiver<bool>, Error> {
        if self.containers.contains_key(&key.container) {
            return Err(Error::AlreadyExists {
                what: "container",
                id: key.container.to_string(),
            });
        }
        let (removed, receiver) = watch::channel(false);
        let container = Container {
            spec,
            phase: Phase::Creating,
            init: Entry::new(key.generation),
            execs: BTreeMap::new(),
            removed,
            oom_kills: 0,
            changing: false,
            frozen: false,
        };
        self.containers.insert(key.container.clone(), container);
        Ok(receiver)
    }

    /// Takes the name of an exec that is about to be made.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AlreadyExists`], or [`Error::WrongState`] unless the init runs.
    pub fn reserve_exec(&mut self, key: &ProcessKey) -> Result<ExecBase, Error> {
        let id = &key.container;
        let container = self.containers.get_mut(id).ok_or_else(|| unknown(id))?;
        if !matches!(container.phase, Phase::Started) {
            return Err(wrong(id, "is not running"));
        }
        let Some(exec) = &key.exec else {
            return Err(Error::bad("process.exec_id", "is empty"));
        };
        let Some((_, init)) = &container.init.process else {
            return Err(wrong(id, "is not running"));
        };
        if container.frozen {
            return Err(wrong(id, "is paused"));
        }
        if container.execs.contains_key(exec) {
            return Err(Error::AlreadyExists {
                what: "exec",
                id: exec.to_string(),
            });
        }
        let base = ExecBase {
            spec: container.spec.clone(),
            init: init.clone(),
            removed: container.removed.subscribe(),
        };
        container
            .execs
            .insert(exec.clone(), Entry::new(key.generation));
        Ok(base)
    }

    /// Gives a reserved process its pid, before it can end by itself.
    pub fn register(&mut self, key: &ProcessKey, pid: u32, handle: Arc<OwnedFd>) {
        if let Some(entry) = self.entry_mut(key) {
            entry.process = Some((pid, handle));
            self.by_pid.insert(pid, key.clone());
        }
    }

    /// The container's init waits to be started; if it has ended meanwhile, its exit is given out.
    pub fn created(&mut self, id: &ContainerId, gate: G, io: ProcessIo) -> Consequences {
        let Some(container) = self.containers.get_mut(id) else {
            return Consequences::default();
        };
        container.init.io = io;
        container.init.starting = false;
        container.phase = Phase::Created(gate);
        match container.init.exit.take() {
            Some(exit) => self.init_ended(id, exit),
            None => Consequences::default(),
        }
    }

    /// The exec's program runs; if it has ended meanwhile, its exit is given out.
    pub fn started(&mut self, key: &ProcessKey, io: ProcessIo) -> Consequences {
        let Some(entry) = self.entry_mut(key) else {
            return Consequences::default();
        };
        entry.starting = false;
        entry.io = io;
        match entry.exit.take() {
            Some(exit) => self.exec_ended(exit),
            None => Consequences::default(),
        }
    }

    /// Forgets a process that could not be made; a container with its init.
    pub fn abandon(&mut self, key: &ProcessKey) -> Consequences {
        self.by_pid.retain(|_, known| known != key);
        match &key.exec {
            None => {
                self.forget(&key.container);
                Consequences::default()
            }
            Some(exec) => {
                if let Some(container) = self.containers.get_mut(&key.container) {
                    container.execs.remove(exec);
                }
                self.release_init(&key.container)
            }
        }
    }

    /// What lets the container's init run; given once.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::WrongState`] unless the container is created and not started.
    pub fn take_gate(&mut self, id: &ContainerId) -> Result<G, Error> {
        let container = self.containers.get_mut(id).ok_or_else(|| unknown(id))?;
        match std::mem::replace(&mut container.phase, Phase::Started) {
            Phase::Created(gate) => Ok(gate),
            other => {
                let state = match other {
                    Phase::Creating => "is still being created",
                    Phase::Started => "has been started already",
                    _ => "has ended",
                };
                container.phase = other;
                Err(wrong(id, state))
            }
        }
    }

    /// A process of the agent's has been reaped. One that is not known has no consequences: it was an orphan.
    pub fn ended(&mut self, pid: u32, status: u32, at_unix_ns: u64) -> Consequences {
        let Some(key) = self.by_pid.remove(&pid) else {
            return Consequences::default();
        };
        let exit = Exit {
            key: key.clone(),
            status,
            at_unix_ns,
        };
        let Some(entry) = self.entry_mut(&key) else {
            return Consequences::default();
        };
        if entry.starting {
            entry.exit = Some(exit);
            return Consequences::default();
        }
        match &key.exec {
            None => self.init_ended(&key.container, exit),
            Some(_) => self.exec_ended(exit),
        }
    }

    fn init_ended(&mut self, id: &ContainerId, exit: Exit) -> Consequences {
        let Some(container) = self.containers.get_mut(id) else {
            return Consequences::default();
        };
        container.phase = Phase::Ended;
        container.init.exit = Some(exit);
        // The kernel ends what is left in a pid namespace of the container's own.
        let others = oci_process::shared_pid_namespace(&container.spec).is_some();
        let end_rest = (others || !container.execs.is_empty()).then(|| id.clone());
        Consequences {
            end_rest,
            ..self.release_init(id)
        }
    }

    fn exec_ended(&mut self, exit: Exit) -> Consequences {
        let id = exit.key.container.clone();
        if let (Some(container), Some(exec)) = (self.containers.get_mut(&id), &exit.key.exec) {
            container.execs.remove(exec);
        }
        let mut consequences = self.release_init(&id);
        consequences.exits.insert(0, exit);
        consequences
    }

    /// Gives out the init's exit if it has been waiting for the last exec's.
    fn release_init(&mut self, id: &ContainerId) -> Consequences {
        let exit = self
            .containers
            .get_mut(id)
            .filter(|container| {
                container.execs.is_empty() && matches!(container.phase, Phase::Ended)
            })
            .and_then(|container| container.init.exit.take());
        Consequences {
            exits: exit.into_iter().collect(),
            end_rest: None,
        }
    }

    /// The container that a live process belongs to.
    pub fn container_of(&self, pid: u32) -> Option<&ContainerId> {
        self.by_pid.get(&pid).map(|key| &key.container)
    }

    /// The pidfd of a container's init, by its pid.
    ///
    /// # Errors
    /// [`Error::BadRequest`] if no container's init has it.
    pub fn init(&self, pid: u32) -> Result<Arc<OwnedFd>, Error> {
        let known = self.by_pid.get(&pid).filter(|key| key.exec.is_none());
        known.and_then(|key| self.handle(key).ok()).ok_or_else(|| {
            let problem = format!("no container's init has the pid {pid}: it may have ended");
            Error::bad("linux.namespaces[pid].path", problem)
        })
    }

    /// The pidfd of a live process.
    ///
    /// # Errors
    /// [`Error::NotFound`] for one that is not known or has ended; [`Error::WrongState`] for one that is being made.
    pub fn handle(&self, key: &ProcessKey) -> Result<Arc<OwnedFd>, Error> {
        let gone = || Error::NotFound {
            what: "process",
            id: key
                .exec
                .as_ref()
                .map_or_else(|| key.container.to_string(), ToString::to_string),
        };
        let entry = self.entry(key).ok_or_else(gone)?;
        match &entry.process {
            Some((pid, handle)) if self.by_pid.contains_key(pid) => Ok(handle.clone()),
            Some(_) => Err(gone()),
            None => Err(wrong(&key.container, "is still being created")),
        }
    }

    /// Whether the container is there.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn check_known(&self, id: &ContainerId) -> Result<(), Error> {
        self.containers
            .get(id)
            .map(|_| ())
            .ok_or_else(|| unknown(id))
    }

    /// The streams of a process, `None` once it has been forgotten.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown container.
    pub fn io(&self, key: &ProcessKey) -> Result<Option<&ProcessIo>, Error> {
        self.check_known(&key.container)?;
        Ok(self.entry(key).map(|entry| &entry.io))
    }

    /// The exec that a pid belongs to, `None` for the init and for processes that nobody asked for.
    pub fn exec_of(&self, pid: u32) -> Option<&ExecId> {
        self.by_pid.get(&pid).and_then(|key| key.exec.as_ref())
    }

    /// Whether `kills` is more than was known of the container's OOM kills; it is known from now on.
    pub fn oom_kills_grew(&mut self, id: &ContainerId, kills: u64) -> bool {
        self.containers.get_mut(id).is_some_and(|container| {
            let grew = kills > container.oom_kills;
            container.oom_kills = container.oom_kills.max(kills);
            grew
        })
    }

    /// Stops the container's streams, before it is removed; `false` for one that is not known.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the init has ended and its exit been given out.
    pub fn begin_removal(&mut self, id: &ContainerId) -> Result<bool, Error> {
        let Some(container) = self.containers.get_mut(id) else {
            return Ok(false);
        };
        match container.phase {
            Phase::Ended if container.init.exit.is_none() => {
                container.phase = Phase::Removing;
                container.removed.send_replace(true);
                Ok(true)
            }
            Phase::Removing => Err(wrong(id, "is being removed")),
            _ => Err(wrong(id, "is running")),
        }
    }

    /// The removal failed and may be tried again.
    pub fn removal_failed(&mut self, id: &ContainerId) {
        if let Some(container) = self.containers.get_mut(id) {
            container.phase = Phase::Ended;
        }
    }

    /// Forgets the container.
    pub fn forget(&mut self, id: &ContainerId) {
        self.by_pid.retain(|_, key| key.container != *id);
        self.containers.remove(id);
    }

    /// What there is, for people.
    pub fn dump(&self) -> serde_json::Value {
        self.containers
            .iter()
            .map(|(id, container)| {
                let phase = match container.phase {
                    Phase::Creating => "creating",
                    Phase::Created(_) => "created",
                    Phase::Started => "started",
                    Phase::Ended => "ended",
                    Phase::Removing => "removing",
                };
                let pid = |entry: &Entry| entry.process.as_ref().map(|(pid, _)| *pid);
                let execs: serde_json::Map<_, _> = container
                    .execs
                    .iter()
                    .map(|(exec, entry)| (exec.to_string(), pid(entry).into()))
                    .collect();
                let value = serde_json::json!({
                    "phase": phase,
                    "init": pid(&container.init),
                    "execs": execs,
                    "oom_kills": container.oom_kills,
                    "frozen": container.frozen,
                });
                (id.to_string(), value)
            })
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// The entry of exactly this process: one of another generation is another process.
    fn entry(&self, key: &ProcessKey) -> Option<&Entry> {
        let container = self.containers.get(&key.container)?;
        match &key.exec {
            None => Some(&container.init),
            Some(exec) => container.execs.get(exec),
        }
        .filter(|entry| entry.generation == key.generation)
    }

    fn entry_mut(&mut self, key: &ProcessKey) -> Option<&mut Entry> {
        let container = self.containers.get_mut(&key.container)?;
        match &key.exec {
            None => Some(&mut container.init),
            Some(exec) => container.execs.get_mut(exec),
        }
        .filter(|entry| entry.generation == key.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(exec: Option<&str>) -> ProcessKey {
        ProcessKey {
            container: "c".parse().unwrap(),
            exec: exec.map(|exec| exec.parse().unwrap()),
            generation: Generation(1),
        }
    }

    fn handle() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn running() -> ProcessTable<()> {
        let mut table = ProcessTable::default();
        table
            .reserve_container(&key(None), Arc::new(Spec::default()))
            .unwrap();
        table.register(&key(None), 10, handle());
        assert_eq!(
            table.created(&key(None).container, (), ProcessIo::default()),
            Consequences::default()
        );
        table.take_gate(&key(None).container).unwrap();
        table
    }

    fn exec(table: &mut ProcessTable<()>, name: &str, pid: u32) {
        table.reserve_exec(&key(Some(name))).unwrap();
        table.register(&key(Some(name)), pid, handle());
    }

    fn exits(consequences: &Consequences) -> Vec<(Option<&str>, u32)> {
        let of = |exit: &'_ Exit| (exit.key.exec.clone(), exit.status);
        consequences
            .exits
            .iter()
            .map(|exit| (exit.key.exec.as_ref().map(ExecId::as_str), of(exit).1))
            .collect()
    }

    #[test]
    fn rest_of_a_container_that_shares_its_pid_namespace_is_ended_before_its_exit_is_told() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.1.0","linux":{"namespaces":[{"type":"pid","path":"/x"}]}}"#,
        )
        .unwrap();
        let mut table = ProcessTable::<()>::default();
        table.reserve_container(&key(None), Arc::new(spec)).unwrap();
        table.register(&key(None), 10, handle());
        table.created(&key(None).container, (), ProcessIo::default());
        let ended = table.ended(10, 3, 0);
        assert_eq!(exits(&ended), [(None, 3)]);
        assert_eq!(ended.end_rest, Some(key(None).container));
    }

    #[test]
    fn init_is_found_by_its_pid_while_it_lives_and_an_exec_is_not() {
        let mut table = running();
        exec(&mut table, "a", 11);
        table.init(10).unwrap();
        for pid in [11, 12] {
            let error = table.init(pid).unwrap_err().to_string();
            assert!(error.contains(&pid.to_string()), "{error}");
        }
        table.ended(10, 0, 0);
        table.init(10).unwrap_err();
    }

    #[test]
    fn init_that_ends_last_is_told_last() {
        let mut table = running();
        exec(&mut table, "a", 11);
        exec(&mut table, "b", 12);
        table.started(&key(Some("a")), ProcessIo::default());
        table.started(&key(Some("b")), ProcessIo::default());
        let ended = table.ended(10, 0, 1);
        assert_eq!((exits(&ended).len(), ended.end_rest.is_some()), (0, true));
        assert_eq!(exits(&table.ended(11, 137, 2)), [(Some("a"), 137)]);
        assert_eq!(
            exits(&table.ended(12, 137, 2)),
            [(Some("b"), 137), (None, 0)]
        );
        assert!(table.begin_removal(&key(None).container).unwrap());
    }

    #[test]
    fn exec_that_ends_before_its_start_is_told_after_it() {
        let mut table = running();
        exec(&mut table, "a", 11);
        assert_eq!(exits(&table.ended(11, 3, 1)), []);
        assert_eq!(
            exits(&table.started(&key(Some("a")), ProcessIo::default())),
            [(Some("a"), 3)]
        );
        table.handle(&key(Some("a"))).unwrap_err();
    }

    #[test]
    fn exec_that_could_not_start_is_never_told_and_frees_the_init() {
        let mut table = running();
        exec(&mut table, "a", 11);
        table.ended(10, 9, 1);
        table.ended(11, 127, 1);
        assert_eq!(exits(&table.abandon(&key(Some("a")))), [(None, 9)]);
    }

    #[test]
    fn names_are_taken_once() {
        let mut table = running();
        assert!(matches!(
            table.reserve_container(&key(None), Arc::new(Spec::default())),
            Err(Error::AlreadyExists { .. })
        ));
        exec(&mut table, "a", 11);
        assert!(matches!(
            table.reserve_exec(&key(Some("a"))),
            Err(Error::AlreadyExists { .. })
        ));
    }

    #[test]
    fn gate_is_given_once() {
        let mut table = running();
        let error = table.take_gate(&key(None).container).unwrap_err();
        assert_eq!(error.to_string(), "container c has been started already");
        table.ended(10, 0, 1);
        assert_eq!(
            table
                .take_gate(&key(None).container)
                .unwrap_err()
                .to_string(),
            "container c has ended"
        );
    }

    #[test]
    fn exec_needs_a_running_init() {
        let mut table = running();
        table.ended(10, 0, 1);
        assert!(matches!(
            table.reserve_exec(&key(Some("a"))),
            Err(Error::WrongState { .. })
        ));
    }

    #[test]
    fn another_generation_is_another_process() {
        let mut table = running();
        exec(&mut table, "a", 11);
        let other = ProcessKey {
            generation: Generation(2),
            ..key(Some("a"))
        };
        assert!(matches!(table.handle(&other), Err(Error::NotFound { .. })));
        table.handle(&key(Some("a"))).unwrap();
    }

    #[test]
    fn running_container_is_not_removed_and_an_unknown_one_is_no_error() {
        let mut table = running();
        assert!(matches!(
            table.begin_removal(&key(None).container),
            Err(Error::WrongState { .. })
        ));
        assert!(!table.begin_removal(&"other".parse().unwrap()).unwrap());
    }

    #[test]
    fn init_that_ends_while_created_is_told() {
        let mut table: ProcessTable<()> = ProcessTable::default();
        table
            .reserve_container(&key(None), Arc::new(Spec::default()))
            .unwrap();
        table.register(&key(None), 10, handle());
        assert_eq!(exits(&table.ended(10, 137, 1)), []);
        assert_eq!(
            exits(&table.created(&key(None).container, (), ProcessIo::default())),
            [(None, 137)]
        );
    }

    #[test]
    fn orphan_has_no_consequences() {
        assert_eq!(running().ended(999, 0, 1), Consequences::default());
    }

    #[test]
    fn oom_kills_are_told_when_they_grow() {
        let mut table = running();
        let id = key(None).container;
        assert!(!table.oom_kills_grew(&id, 0));
        assert!(table.oom_kills_grew(&id, 2));
        assert!(!table.oom_kills_grew(&id, 2));
    }
}
