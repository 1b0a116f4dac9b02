// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent: requests become calls of the [`System`], ends of processes become events.
//!
//! Everything here runs on one event loop. What may block is done on other threads, and no lock is held meanwhile: a slow
//! mount delays neither a signal nor an event. The table's lock is only ever held for a look or a change.

mod changes;

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use agent_proto::{ProcessKey, StreamKind};
use ids::ContainerId;
use oci_process::Streams;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::watch;

use crate::Error;
use crate::clock::Clock;
use crate::error::Context as _;
use crate::events::Events;
use crate::forward::ForwardedPorts;
use crate::pid_namespace::PidNamespace;
use crate::plan::{ContainerPlan, ExecPlan, SandboxPlan, StdioPlan};
use crate::stdio::{Connections, Stream, pump_input, pump_output};
use crate::system::{Gate, Job, Launched, System};
use crate::table::{Consequences, ExecBase, ProcessIo, ProcessTable};

pub(crate) type Table = ProcessTable<Box<dyn Gate>>;

/// A container's or exec's process in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its pid.
    pub pid: u32,
    /// The exec that it is, if it is one.
    pub exec: Option<String>,
}

/// The agent. The program that owns it also tells it of reaped processes, of memory events and of new connections.
pub struct Agent<S> {
    system: Arc<S>,
    table: Mutex<Table>,
    events: Arc<Events>,
    connections: Arc<Connections>,
    forwarded: Arc<ForwardedPorts>,
    configured: Mutex<bool>,
    clock: Mutex<Clock>,
}

/// The agent's ends of a process's pipes.
#[derive(Default)]
struct HostEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

impl<S: System> Agent<S> {
    /// An agent with nothing in it.
    pub fn new(system: Arc<S>) -> Arc<Self> {
        Arc::new(Self {
            system,
            table: Mutex::default(),
            events: Arc::default(),
            connections: Arc::default(),
            forwarded: Arc::default(),
            configured: Mutex::default(),
            clock: Mutex::default(),
        })
    }

    /// Where new stdio connections go.
    pub fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    /// Where new connections to the pod's loopback go.
    pub fn forwarded(&self) -> &Arc<ForwardedPorts> {
        &self.forwarded
    }

    /// What has happened.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The machine below.
    pub fn system(&self) -> &S {
        &self.system
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&S) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let system = self.system.clone();
        tokio::task::spawn_blocking(move || work(&system))
            .await
            .unwrap_or(Err(Error::Internal("working for a request")))
    }

    /// Makes what the pod's containers share. Once.
    ///
    /// # Errors
    /// [`Error::WrongState`] the second time; those of [`System::configure`].
    pub async fn configure(&self, plan: SandboxPlan) -> Result<(), Error> {
        let before = std::mem::replace(
            &mut *self
                .configured
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
            true,
        );
        if before {
            return Err(Error::WrongState {
                what: "the",
                id: "sandbox".to_owned(),
                state: "has been configured already",
            });
        }
        self.blocking(move |system| system.configure(&plan)).await
    }

    /// Has the guest's clock follow the host's, which is at `host_ns` since the epoch; 0 if that is not known.
    pub(crate) fn follow_clock(&self, host_ns: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let guest_ns = u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX);
        if host_ns == 0 {
            return;
        }
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(time) = clock.correction(host_ns, guest_ns) else {
            return;
        };
        drop(clock);
        match self.system.set_clock(time) {
            Ok(()) => crate::log::info(&format!("clock set from {guest_ns} to {time} ns")),
            Err(error) => crate::log::warn(&format!("setting the clock: {}", error.chain())),
        }
    }

    /// Makes a container and its init, which waits. Gives its pid. On failure nothing of it is left.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or what could not be made.
    pub async fn create_container(self: &Arc<Self>, plan: ContainerPlan) -> Result<u32, Error> {
        let removed = self
            .table()
            .reserve_container(&plan.key, plan.spec.clone())?;
        let key = plan.key.clone();
        let made = self.make_container(plan, removed).await;
        if made.is_err() {
            let id = key.container.clone();
            let cleaned = self
                .blocking(move |system| system.remove_container(&id))
                .await;
            if let Err(error) = cleaned {
                crate::log::warn(&format!(
                    "container {}: cleaning up: {}",
                    key.container,
                    error.chain()
                ));
            }
            let consequences = self.table().abandon(&key);
            self.apply(consequences);
        }
        made
    }

    async fn make_container(
        &self,
        plan: ContainerPlan,
        removed: watch::Receiver<bool>,
    ) -> Result<u32, Error> {
        let plan = Arc::new(plan);
        let for_system = plan.clone();
        self.blocking(move |system| system.make_container(&for_system))
            .await?;
        let (streams, mut ends) = pipes(plan.stdio)?;
        let for_launch = plan.clone();
        let pids = self.find_pids(plan.pids)?;
        let launched = self
            .blocking(move |system| {
                let job = Job::Init {
                    container: &for_launch.key.container,
                    spec: &for_launch.spec,
                    pids: match &pids {
                        PidNamespace::Own => PidNamespace::Own,
                        PidNamespace::Pod => PidNamespace::Pod,
                        PidNamespace::Of(init) => PidNamespace::Of(init),
                    },
                };
                system.launch(job, streams)
            })
            .await?;
        let (pid, gate) = self.make_ready(&plan.key, launched, &mut ends).await?;
        let io = self.connect(&plan.key, plan.stdio, ends, &removed)?;
        let consequences = self.table().created(&plan.key.container, gate, io);
        self.apply(consequences);
        Ok(pid)
    }

    fn find_pids(&self, asked: PidNamespace<u32>) -> Result<PidNamespace<Arc<OwnedFd>>, Error> {
        Ok(match asked {
            PidNamespace::Own => PidNamespace::Own,
            PidNamespace::Pod => PidNamespace::Pod,
            PidNamespace::Of(pid) => PidNamespace::Of(self.table().init(pid)?),
        })
    }

    async fn make_ready(
        &self,
        key: &ProcessKey,
        launched: Box<dyn Launched>,
        ends: &mut HostEnds,
    ) -> Result<(u32, Box<dyn Gate>), Error> {
        let pid = launched.pid();
        let handle = launched.handle();
        self.table().register(key, pid, handle.clone());
        let ready = self.blocking(move |_| launched.ready()).await;
        match ready {
            Ok((gate, terminal)) => {
                ends.terminal = terminal;
                Ok((pid, gate))
            }
            Err(error) => {
                // It is ending by itself; if not, it must. That it is gone already is fine.
                let _ = self.system.signal(&handle, libc::SIGKILL.unsigned_abs());
                Err(error)
            }
        }
    }

    /// Lets a container's init run.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`] unless created, or why the program cannot run; its exit is then an event.
    pub async fn start_container(&self, id: &ContainerId) -> Result<(), Error> {
        let gate = self.table().take_gate(id)?;
        self.blocking(move |_| gate.start()).await
    }

    /// Makes and starts a further process. Gives its pid.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AlreadyExists`], [`Error::WrongState`] unless the init runs, or why it cannot run;
    /// there is no event for it then.
    pub async fn start_exec(self: &Arc<Self>, plan: ExecPlan) -> Result<u32, Error> {
        let base = self.table().reserve_exec(&plan.key)?;
        let key = plan.key.clone();
        match self.make_exec(plan, base).await {
            Ok((pid, io)) => {
                let consequences = self.table().started(&key, io);
                self.apply(consequences);
                Ok(pid)
            }
            Err(error) => {
                let consequences = self.table().abandon(&key);
                self.apply(consequences);
                Err(error)
            }
        }
    }

    async fn make_exec(&self, plan: ExecPlan, base: ExecBase) -> Result<(u32, ProcessIo), Error> {
        let (streams, mut ends) = pipes(plan.stdio)?;
        let ExecBase {
            spec,
            init,
            removed,
        } = base;
        let (container, process) = (plan.key.container.clone(), plan.process);
        let launched = self
            .blocking(move |system| {
                let job = Job::Exec {
                    container: &container,
                    spec: &spec,
                    init: &init,
                    process: &process,
                };
                system.launch(job, streams)
            })
            .await?;
        let (pid, gate) = self.make_ready(&plan.key, launched, &mut ends).await?;
        self.blocking(move |_| gate.start()).await?;
        let io = self.connect(&plan.key, plan.stdio, ends, &removed)?;
        Ok((pid, io))
    }

    /// Sends a signal to a process, or to all of its container.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it has ended, [`Error::BadRequest`] for no signal's number.
    pub async fn signal(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        if !(1..=64).contains(&signal) {
            return Err(Error::bad(
                "signal",
                format!("is {signal}, 1 to 64 are signals"),
            ));
        }
        if !all {
            let handle = self.table().handle(key)?;
            return self.system.signal(&handle, signal);
        }
        self.table().check_known(&key.container)?;
        let id = key.container.clone();
        self.blocking(move |system| system.signal_all(&id, signal))
            .await
    }

    /// Sets the size of a process's terminal; without one, or after its end, nothing is done.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown container.
    pub fn resize(&self, key: &ProcessKey, columns: u32, rows: u32) -> Result<(), Error> {
        let terminal = self.table().io(key)?.and_then(|io| io.terminal.clone());
        match terminal {
            Some(terminal) => set_size(&terminal, columns, rows),
            None => Ok(()),
        }
    }

    /// Closes a process's standard input once `bytes` bytes have passed; after its end nothing is done.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown container.
    pub fn close_stdin(&self, key: &ProcessKey, bytes: u64) -> Result<(), Error> {
        if let Some(close) = self.table().io(key)?.and_then(|io| io.close_stdin.as_ref()) {
            close.send_replace(Some(bytes));
        }
        Ok(())
    }

    /// The live processes of a container.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn processes(&self, id: &ContainerId) -> Result<Vec<ProcessInfo>, Error> {
        self.table().check_known(id)?;
        let container = id.clone();
        let pids = self
            .blocking(move |system| system.processes(&container))
            .await?;
        let table = self.table();
        Ok(pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid,
                exec: table.exec_of(pid).map(ToString::to_string),
            })
            .collect())
    }

    /// Takes an ended container away; an unknown one is no error.
    ///
    /// # Errors
    /// [`Error::WrongState`] while its init runs, or what could not be taken away; it may then be tried again.
    pub async fn remove_container(&self, id: &ContainerId) -> Result<(), Error> {
        if !self.table().begin_removal(id)? {
            return Ok(());
        }
        let container = id.clone();
        let removed = self
            .blocking(move |system| system.remove_container(&container))
            .await;
        let mut table = self.table();
        match &removed {
            Ok(()) => table.forget(id),
            Err(_) => table.removal_failed(id),
        }
        removed
    }

    /// A child of the agent has been reaped: `status` is its exit code, or 128 plus the signal.
    pub fn reaped(&self, pid: u32, status: u32) {
        let container = self.table().container_of(pid).cloned();
        if let Some(container) = container {
            // The event goes before the exit, so that the host knows why.
            self.check_memory(&container);
        }
        let consequences = self.table().ended(pid, status, now_ns());
        self.apply(consequences);
    }

    /// Something about a container's memory may have happened.
    pub fn check_memory(&self, container: &ContainerId) {
        let kills = self.system.oom_kills(container);
        let grew = self.table().oom_kills_grew(container, kills);
        if grew {
            self.events.out_of_memory(container);
        }
    }

    /// What there is, as JSON for people.
    pub fn dump(&self) -> String {
        let (unread, last) = self.events.state();
        let (connections, processes) = self.connections.state();
        serde_json::json!({
            "containers": self.table().dump(),
            "events": {"unacknowledged": unread, "last": last},
            "unclaimed_connections": connections,
            "awaited_connections": processes,
            "streams": self.connections.dump(),
            "forwarded_connections": self.forwarded.open(),
        })
        .to_string()
    }

    fn apply(&self, consequences: Consequences) {
        let Consequences { exits, end_rest } = consequences;
        let events = self.events.clone();
        let tell = move || {
            for exit in exits {
                events.exited(&exit.key, exit.status, exit.at_unix_ns);
            }
        };
        let Some(container) = end_rest else {
            return tell();
        };
        let system = self.system.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = system.signal_all(&container, libc::SIGKILL.unsigned_abs()) {
                crate::log::warn(&format!(
                    "container {container}: ending the rest: {}",
                    error.chain()
                ));
            }
            // Afterwards: from the exit on the host may remove the container, and make another of its name.
            tell();
        });
    }

    /// Puts the agent's ends of a process's streams on the event loop.
    fn connect(
        &self,
        key: &ProcessKey,
        plan: StdioPlan,
        ends: HostEnds,
        removed: &watch::Receiver<bool>,
    ) -> Result<ProcessIo, Error> {
        let mut io = ProcessIo::default();
        let mut input = ends.stdin;
        let mut outputs = vec![
            (StreamKind::Stdout, ends.stdout, plan.stdout),
            (StreamKind::Stderr, ends.stderr, plan.stderr),
        ];
        if let Some(terminal) = ends.terminal {
            let step = || "doubling a terminal".to_owned();
            if plan.columns != 0 || plan.rows != 0 {
                set_size(&terminal, plan.columns.into(), plan.rows.into())?;
            }
            if plan.stdin {
                input = Some(terminal.as_fd().try_clone_to_owned().step(step)?);
            }
            // Somebody has to read it, or its processes stall.
            let output = terminal.as_fd().try_clone_to_owned().step(step)?;
            outputs = vec![(StreamKind::Stdout, Some(output), plan.stdout)];
            io.terminal = Some(Arc::new(terminal));
        }
        let watched = |descriptor| Stream::new(descriptor).step(|| "watching a stream".to_owned());
        if let Some(descriptor) = input {
            let (close, close_after) = watch::channel(None);
            io.close_stdin = Some(close);
            self.spawn_input(
                key.clone(),
                watched(descriptor)?,
                close_after,
                removed.clone(),
            );
        }
        for (kind, descriptor, wanted) in outputs {
            if let Some(descriptor) = descriptor {
                self.spawn_output(
                    (key.clone(), kind),
                    watched(descriptor)?,
                    wanted,
                    removed.clone(),
                );
            }
        }
        Ok(io)
    }

    fn spawn_input(
        &self,
        key: ProcessKey,
        mut sink: Stream,
        mut close_after: watch::Receiver<Option<u64>>,
        mut removed: watch::Receiver<bool>,
    ) {
        let claimed = self.connections.claim(&key, StreamKind::Stdin);
        let passed = self.connections.counter(&key, StreamKind::Stdin);
        let connections = self.connections.clone();
        tokio::spawn(async move {
            let work = async {
                let mut waiting = close_after.clone();
                let source = tokio::select! {
                    claimed = claimed => claimed.ok(),
                    // Nothing to wait for: the input is closed before a byte of it.
                    closed = waiting.wait_for(|bytes| *bytes == Some(0)) => closed.ok().and(None),
                };
                if let Some(mut source) = source {
                    pump_input(&mut source, &mut sink, &mut close_after, &passed).await;
                }
            };
            tokio::select! {
                () = work => {}
                _ = removed.wait_for(|removed| *removed) => {}
            }
            connections.release(&key, StreamKind::Stdin);
        });
    }

    fn spawn_output(
        &self,
        (key, kind): (ProcessKey, StreamKind),
        mut source: Stream,
        wanted: bool,
        mut removed: watch::Receiver<bool>,
    ) {
        let claimed = wanted.then(|| self.connections.claim(&key, kind));
        let sent = self.connections.counter(&key, kind);
        let connections = self.connections.clone();
        let events = self.events.clone();
        tokio::spawn(async move {
            let work = async {
                let Some(claimed) = claimed else {
                    crate::stdio::discard(&mut source).await;
                    return;
                };
                if let Ok(mut sink) = claimed.await {
                    pump_output(&mut source, &mut sink, &sent).await;
                    events.stream_ended(&key, kind, sent.load(Ordering::Relaxed));
                    // The host may have gone first.
                    let _ = sink.finish();
                }
            };
            tokio::select! {
                () = work => {}
                _ = removed.wait_for(|removed| *removed) => {}
            }
            connections.release(&key, kind);
        });
    }
}

fn set_size(terminal: &OwnedFd, columns: u32, rows: u32) -> Result<(), Error> {
    let size = Winsize {
        ws_col: u16::try_from(columns).unwrap_or(u16::MAX),
        ws_row: u16::try_from(rows).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).step(|| format!("setting a terminal's size to {columns}x{rows}"))
}

/// The pipes of a process: its ends, and the agent's.
fn pipes(plan: StdioPlan) -> Result<(Streams, HostEnds), Error> {
    let mut streams = Streams {
        terminal: plan.terminal,
        ..Streams::default()
    };
    let mut ends = HostEnds::default();
    if plan.terminal {
        return Ok((streams, ends));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).step(|| "making a pipe".to_owned());
    if plan.stdin {
        let (reader, writer) = pipe()?;
        (streams.stdin, ends.stdin) = (Some(reader), Some(writer));
    }
    if plan.stdout {
        let (reader, writer) = pipe()?;
        (ends.stdout, streams.stdout) = (Some(reader), Some(writer));
    }
    if plan.stderr {
        let (reader, writer) = pipe()?;
        (ends.stderr, streams.stderr) = (Some(reader), Some(writer));
    }
    Ok((streams, ends))
}

fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}
