// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The fake guest: its containers and processes, their streams and events.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_proto::{ProcessKey, StreamHeader, StreamKind, api};
use ids::ContainerId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::program::Program;
use crate::script::Script;

/// The first pid that the fake guest gives out.
const FIRST_PID: u32 = 100;

pub(crate) struct Guest {
    pub(crate) script: Script,
    state: Mutex<State>,
    events: watch::Sender<Vec<api::Event>>,
    volumes: watch::Sender<BTreeMap<String, Files>>,
}

/// A volume's files and links by path: contents, or where they lead.
pub type Files = BTreeMap<String, String>;

#[derive(Default)]
struct State {
    processes: BTreeMap<ProcessKey, Process>,
    streams: BTreeMap<(ProcessKey, StreamKind), UnixStream>,
    waiting: BTreeMap<(ProcessKey, StreamKind), oneshot::Sender<UnixStream>>,
    frozen: BTreeSet<ContainerId>,
    updates: BTreeMap<ContainerId, Vec<u8>>,
    /// How often figures were asked for.
    measured: u64,
    pids: u32,
    /// vCPUs that it was told to have up.
    vcpus: u32,
    putting: BTreeMap<String, Files>,
    tasks: Vec<JoinHandle<()>>,
}

struct Process {
    pid: u32,
    program: Program,
    stdio: api::Stdio,
    started: bool,
    ended: bool,
    size: (u32, u32),
    stdin_end: watch::Sender<Option<u64>>,
}

impl Guest {
    pub(crate) fn new(script: Script) -> Arc<Self> {
        Arc::new(Self {
            script,
            state: Mutex::default(),
            events: watch::Sender::new(Vec::new()),
            volumes: watch::Sender::new(BTreeMap::new()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a process that is not running yet. `None` if there is one of that name.
    pub(crate) fn add(&self, key: &ProcessKey, program: Program, stdio: api::Stdio) -> Option<u32> {
        let mut state = self.lock();
        let taken = |other: &ProcessKey| other.container == key.container && other.exec == key.exec;
        let clash = state
            .processes
            .iter()
            .any(|(other, process)| taken(other) && !process.ended);
        if clash {
            return None;
        }
        state.pids = state.pids.saturating_add(1);
        let pid = FIRST_PID.saturating_add(state.pids);
        let process = Process {
            pid,
            program,
            size: (stdio.columns, stdio.rows),
            stdio,
            started: false,
            ended: false,
            stdin_end: watch::Sender::new(None),
        };
        state.processes.insert(key.clone(), process);
        Some(pid)
    }

    pub(crate) fn init_of(&self, container: &ContainerId) -> Option<ProcessKey> {
        let state = self.lock();
        let mut keys = state.processes.keys();
        keys.find(|key| key.container == *container && key.exec.is_none())
            .cloned()
    }

    /// vCPUs that are up.
    pub(crate) fn vcpus(&self) -> u32 {
        self.lock().vcpus.max(1)
    }

    /// Brings vCPUs up or takes them down.
    pub(crate) fn set_vcpus(&self, vcpus: u32) {
        self.lock().vcpus = vcpus;
    }

    /// Takes a part of a volume, and with the last one the volume.
    pub(crate) fn put(&self, request: api::PutFilesRequest) {
        use api::copied_file::Content;
        let mut state = self.lock();
        if request.part == 0 {
            state.putting.remove(&request.volume);
        }
        let files = state.putting.entry(request.volume.clone()).or_default();
        for entry in request.entries {
            let text = match entry.content {
                Some(Content::Data(data)) => String::from_utf8_lossy(&data).into_owned(),
                Some(Content::Symlink(target)) => format!("-> {target}"),
                _ => continue,
            };
            files.entry(entry.path).or_default().push_str(&text);
        }
        if request.last
            && let Some(files) = state.putting.remove(&request.volume)
        {
            self.volumes
                .send_modify(|volumes| drop(volumes.insert(request.volume, files)));
        }
    }

    /// Waits until a volume is as wanted.
    pub(crate) async fn volume(&self, name: &str, wanted: impl Fn(&Files) -> bool) -> Files {
        let mut volumes = self.volumes.subscribe();
        let found = volumes.wait_for(|volumes| volumes.get(name).is_some_and(&wanted));
        // The sender is here, so there is no error.
        match found.await {
            Ok(volumes) => volumes.get(name).cloned().unwrap_or_default(),
            Err(_) => Files::default(),
        }
    }

    /// What an init has left in its copied files.
    pub(crate) fn left(&self, init: &ProcessKey) -> String {
        let state = self.lock();
        match state.processes.get(init).map(|process| &process.program) {
            Some(Program::Leave(text)) => text.clone(),
            _ => String::new(),
        }
    }

    pub(crate) fn lives(&self, key: &ProcessKey) -> bool {
        let state = self.lock();
        state
            .processes
            .get(key)
            .is_some_and(|process| !process.ended)
    }

    pub(crate) fn runs(&self, key: &ProcessKey) -> bool {
        let state = self.lock();
        let process = state.processes.get(key);
        process.is_some_and(|process| process.started && !process.ended)
    }

    /// Lets a process run.
    pub(crate) fn start(self: &Arc<Self>, key: &ProcessKey) {
        let (program, stdio, stdin_end) = {
            let mut state = self.lock();
            let Some(process) = state.processes.get_mut(key) else {
                return;
            };
            process.started = true;
            let end = process.stdin_end.subscribe();
            (process.program.clone(), process.stdio.clone(), end)
        };
        if program == Program::OutOfMemory {
            self.tell(api::event::Event::OutOfMemory(api::OutOfMemory {
                container_id: key.container.to_string(),
                ..Default::default()
            }));
        }
        // The exit is told before the output is passed on, as a real agent may do.
        if let Some(status) = program.ends_at_once() {
            self.end(key, status);
        }
        let guest = Arc::clone(self);
        let key = key.clone();
        let task = tokio::spawn(async move { guest.run(key, program, stdio, stdin_end).await });
        self.lock().tasks.push(task);
    }

    async fn run(
        &self,
        key: ProcessKey,
        program: Program,
        stdio: api::Stdio,
        stdin_end: watch::Receiver<Option<u64>>,
    ) {
        let text = |program: &Program| match program {
            Program::Print(text, times) => text.repeat(*times),
            Program::Complain(text) => text.clone(),
            _ => String::new(),
        };
        let to_stderr = matches!(program, Program::Complain(_));
        if program == Program::Cat && stdio.stdin && stdio.stdout {
            let passed = self.cat(&key, stdin_end).await;
            self.end(&key, 0);
            self.stream_ended(&key, StreamKind::Stdout, passed);
            return;
        }
        if matches!(program, Program::Sleep | Program::Cat) {
            return;
        }
        for (kind, wanted, empty) in [
            (StreamKind::Stdout, stdio.stdout, to_stderr),
            (StreamKind::Stderr, stdio.stderr, !to_stderr),
        ] {
            if !wanted {
                continue;
            }
            let Some(mut socket) = self.stream(&key, kind).await else {
                return;
            };
            let text = if empty { String::new() } else { text(&program) };
            if socket.write_all(text.as_bytes()).await.is_err() {
                return;
            }
            if program == Program::Linger && kind == StreamKind::Stdout {
                std::future::pending::<()>().await;
            }
            self.stream_ended(&key, kind, u64::try_from(text.len()).unwrap_or(u64::MAX));
            // The connection stays open: nobody may depend on its end.
            self.lock().streams.insert((key.clone(), kind), socket);
        }
    }

    /// Echoes stdin until as much was passed on as `CloseStdin` says.
    async fn cat(&self, key: &ProcessKey, mut end: watch::Receiver<Option<u64>>) -> u64 {
        let input = self.stream(key, StreamKind::Stdin).await;
        let output = self.stream(key, StreamKind::Stdout).await;
        let (Some(mut input), Some(mut output)) = (input, output) else {
            return 0;
        };
        let mut passed = 0;
        let mut buffer = vec![0; 4096];
        while !end.borrow_and_update().is_some_and(|end| passed >= end) {
            let len = tokio::select! {
                len = input.read(&mut buffer) => len.unwrap_or(0),
                changed = end.changed() => {
                    if changed.is_err() { break; }
                    continue;
                }
            };
            let bytes = buffer.get(..len).unwrap_or_default();
            if bytes.is_empty() || output.write_all(bytes).await.is_err() {
                break;
            }
            passed = passed.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        }
        self.lock()
            .streams
            .insert((key.clone(), StreamKind::Stdout), output);
        passed
    }

    pub(crate) fn close_stdin(&self, key: &ProcessKey, bytes: u64) -> bool {
        let state = self.lock();
        let Some(process) = state.processes.get(key) else {
            return false;
        };
        process.stdin_end.send_replace(Some(bytes));
        true
    }

    pub(crate) fn resize(&self, key: &ProcessKey, size: (u32, u32)) -> bool {
        let mut state = self.lock();
        let Some(process) = state.processes.get_mut(key) else {
            return false;
        };
        process.size = size;
        true
    }

    /// The size that a process's terminal has, by container and exec.
    pub(crate) fn size(&self, container: &str, exec: &str) -> Option<(u32, u32)> {
        let state = self.lock();
        let mut processes = state.processes.iter();
        processes
            .find(|(key, _)| {
                key.container.as_str() == container
                    && key.exec.as_ref().map_or("", |exec| exec.as_str()) == exec
            })
            .map(|(_, process)| process.size)
    }

    /// A process ends: its execs first, if it is an init. Only the first time.
    pub(crate) fn end(&self, key: &ProcessKey, status: u32) {
        let mut ending = Vec::new();
        {
            let mut state = self.lock();
            for (other, process) in &mut state.processes {
                let hers = other.container == key.container && key.exec.is_none();
                if (other == key || hers) && !process.ended && (process.started || other == key) {
                    process.ended = true;
                    ending.push(other.clone());
                }
            }
        }
        ending.sort_by_key(|other| other == key);
        for other in ending {
            let status = if other == *key { status } else { 137 };
            self.tell(api::event::Event::Exited(api::Exited {
                process: Some(process_ref(&other)).into(),
                exit_status: status,
                at_unix_ns: 0,
                ..Default::default()
            }));
        }
    }

    pub(crate) fn is_frozen(&self, container: &ContainerId) -> bool {
        self.lock().frozen.contains(container)
    }

    pub(crate) fn set_frozen(&self, container: ContainerId, frozen: bool) {
        let mut state = self.lock();
        if frozen {
            state.frozen.insert(container);
        } else {
            state.frozen.remove(&container);
        }
    }

    pub(crate) fn update(&self, container: ContainerId, resources_json: Vec<u8>) {
        self.lock().updates.insert(container, resources_json);
    }

    /// The resources that a container was last given, as JSON.
    pub(crate) fn resources(&self, container: &str) -> Option<Vec<u8>> {
        let state = self.lock();
        let mut updates = state.updates.iter();
        updates
            .find(|(id, _)| id.as_str() == container)
            .map(|(_, json)| json.clone())
    }

    /// Figures that grow with every call, and the number of live processes.
    pub(crate) fn stats(&self, container: &ContainerId) -> api::ContainerStats {
        let processes = self.list(container).len();
        let mut state = self.lock();
        state.measured = state.measured.saturating_add(1);
        api::ContainerStats {
            cpu: Some(api::CpuStats {
                usage_usec: state.measured.saturating_mul(1000),
                ..Default::default()
            })
            .into(),
            pids: Some(api::PidsStats {
                current: u64::try_from(processes).unwrap_or(u64::MAX),
                limit: u64::MAX,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    pub(crate) fn remove(&self, container: &ContainerId) {
        let mut state = self.lock();
        state.frozen.remove(container);
        state.updates.remove(container);
        state.processes.retain(|key, _| key.container != *container);
        state
            .streams
            .retain(|(key, _), _| key.container != *container);
    }

    pub(crate) fn list(&self, container: &ContainerId) -> Vec<api::Process> {
        let state = self.lock();
        let live = state.processes.iter().filter(|(key, process)| {
            key.container == *container && (process.started || key.exec.is_none()) && !process.ended
        });
        live.map(|(key, process)| api::Process {
            guest_pid: process.pid,
            exec_id: process_ref(key).exec_id,
            ..Default::default()
        })
        .collect()
    }

    /// Reads a stream's header and hands the connection to its process.
    pub(crate) async fn accept_stream(&self, mut socket: UnixStream) {
        let mut bytes = Vec::new();
        let header = loop {
            match StreamHeader::decode(&bytes) {
                Ok((header, _)) => break header,
                Err(agent_proto::HeaderError::Incomplete) => {}
                Err(_) => return,
            }
            match socket.read_u8().await {
                Ok(byte) => bytes.push(byte),
                Err(_) => return,
            }
        };
        let name = (header.process, header.kind);
        let mut state = self.lock();
        match state.waiting.remove(&name) {
            Some(waiting) => drop(waiting.send(socket)),
            None => drop(state.streams.insert(name, socket)),
        }
    }

    async fn stream(&self, key: &ProcessKey, kind: StreamKind) -> Option<UnixStream> {
        let arrives = {
            let mut state = self.lock();
            let name = (key.clone(), kind);
            if let Some(socket) = state.streams.remove(&name) {
                return Some(socket);
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.insert(name, sender);
            receiver
        };
        arrives.await.ok()
    }

    fn stream_ended(&self, key: &ProcessKey, kind: StreamKind, bytes: u64) {
        let kind = match kind {
            StreamKind::Stdin => api::StreamKind::STDIN,
            StreamKind::Stdout => api::StreamKind::STDOUT,
            StreamKind::Stderr => api::StreamKind::STDERR,
        };
        self.tell(api::event::Event::StreamEnded(api::StreamEnded {
            process: Some(process_ref(key)).into(),
            kind: kind.into(),
            bytes,
            ..Default::default()
        }));
    }

    /// Adds an event, whatever it says.
    pub(crate) fn tell(&self, event: api::event::Event) {
        self.events.send_modify(|events| {
            let sequence = u64::try_from(events.len()).unwrap_or(u64::MAX);
            events.push(api::Event {
                sequence: sequence.saturating_add(1),
                event: Some(event),
                ..Default::default()
            });
        });
    }

    /// The events after number `after`, once there are any.
    pub(crate) async fn events_after(&self, after: u64) -> Vec<api::Event> {
        let after = usize::try_from(after).unwrap_or(usize::MAX);
        let mut events = self.events.subscribe();
        let waited = tokio::time::timeout(
            agent_proto::NEXT_EVENTS_WAIT,
            events.wait_for(|events| events.len() > after),
        );
        match waited.await {
            Ok(Ok(events)) => events.iter().skip(after).cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Everything in the guest stops, and its connections break.
    pub(crate) fn power_off(&self) {
        let mut state = self.lock();
        for task in state.tasks.drain(..) {
            task.abort();
        }
        *state = State::default();
    }
}

pub(crate) fn process_ref(key: &ProcessKey) -> api::ProcessRef {
    api::ProcessRef {
        container_id: key.container.to_string(),
        exec_id: key
            .exec
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        generation: key.generation.0,
        ..Default::default()
    }
}
