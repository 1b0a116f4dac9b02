// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A thread that runs the workers of some devices, around one epoll descriptor.
//!
//! It never takes a window's lock, so a vCPU that holds one may wait for it. A worker that says it has more to do
//! goes to the end of a queue, so that none starves the others; one that a limit stops is called again in time.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use virtio_device::{DeviceError, Event, Progress, QueueState, Worker};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Signals, WorkerHost};
use crate::VmmError;
use crate::threads;

/// Events taken from the kernel at a time.
const EVENTS: usize = 32;
/// The token of the descriptor that says that a command has come.
const COMMAND_TOKEN: u64 = 0;

enum Command {
    Start {
        index: u16,
        workers: Vec<Box<dyn Worker>>,
        kicks: Vec<Arc<EventFd>>,
        signals: Arc<Signals>,
    },
    Stop {
        index: u16,
        reply: SyncSender<Vec<(u16, QueueState)>>,
    },
    LookAgain,
    Quit,
}

/// The handle of the thread; dropping it ends the thread.
pub struct IoThread {
    commands: Mutex<Sender<Command>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread under this name; `before` runs on it first, and what it answers is passed on.
    ///
    /// # Errors
    /// The host has no thread or descriptor left, or `before` fails.
    pub fn start(
        name: &str,
        before: impl FnOnce() -> Result<(), VmmError> + Send + 'static,
    ) -> Result<Self, VmmError> {
        let failed = VmmError::host::<io::Error>;
        let wake = Arc::new(
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(failed("create an event"))?,
        );
        let epoll = Epoll::new().map_err(failed("create an epoll"))?;
        let (send, commands) = channel();
        let mut event_loop = Loop {
            epoll,
            commands,
            wake: Arc::clone(&wake),
            workers: BTreeMap::new(),
            watches: BTreeMap::new(),
            again: VecDeque::new(),
            later: Vec::new(),
            next_id: 1,
        };
        event_loop
            .watch_commands()
            .map_err(failed("watch an event"))?;
        let thread = threads::spawn(name, before, move || event_loop.run())?;
        Ok(Self {
            commands: Mutex::new(send),
            wake,
            thread: Some(thread),
        })
    }

    /// Calls whoever waits for a limit, because the limit has changed.
    pub fn look_again(&self) {
        self.send(Command::LookAgain);
    }

    fn send(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread lives as long as this handle.
        let _ = commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl WorkerHost for IoThread {
    fn start(
        &self,
        index: u16,
        workers: Vec<Box<dyn Worker>>,
        kicks: Vec<Arc<EventFd>>,
        signals: Arc<Signals>,
    ) {
        self.send(Command::Start {
            index,
            workers,
            kicks,
            signals,
        });
    }

    fn stop(&self, index: u16) -> Vec<(u16, QueueState)> {
        let (reply, positions) = sync_channel(1);
        self.send(Command::Stop { index, reply });
        positions.recv().unwrap_or_default()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A worker and what belongs to it.
struct Job {
    device: u16,
    worker: Box<dyn Worker>,
    kicks: Vec<Arc<EventFd>>,
    signals: Arc<Signals>,
    /// Tokens of its watches.
    tokens: Vec<u64>,
    failed: bool,
}

/// What a token stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Watch {
    worker: u64,
    event: Event,
}

struct Loop {
    epoll: Epoll,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    workers: BTreeMap<u64, Job>,
    watches: BTreeMap<u64, Watch>,
    /// What is to be done without a further event.
    again: VecDeque<Watch>,
    /// What is to be done without a further event, from a moment on; each watch is there once at most.
    later: Vec<(Instant, Watch)>,
    /// For workers and tokens; never used twice.
    next_id: u64,
}

impl Loop {
    fn watch_commands(&self) -> io::Result<()> {
        add(&self.epoll, self.wake.as_raw_fd(), COMMAND_TOKEN)
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            // Fails only when interrupted.
            let count = self.epoll.wait(self.timeout(), &mut events).unwrap_or(0);
            for event in events.iter().take(count) {
                match event.data() {
                    COMMAND_TOKEN => {
                        let _ = self.wake.read();
                        if self.obey_commands().is_break() {
                            return;
                        }
                    }
                    token => self.on_event(token),
                }
            }
            self.take_up_what_is_due();
            for _ in 0..self.again.len() {
                if let Some(watch) = self.again.pop_front() {
                    self.handle(watch);
                }
            }
        }
    }

    /// How long nothing need be done without an event, in epoll's milliseconds, rounded up.
    fn timeout(&self) -> i32 {
        if !self.again.is_empty() {
            return 0;
        }
        let Some(first) = self.later.iter().map(|(due, _)| *due).min() else {
            return -1;
        };
        let wait = first.saturating_duration_since(Instant::now());
        i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    fn take_up_what_is_due(&mut self) {
        if self.later.is_empty() {
            return;
        }
        let now = Instant::now();
        let due = self.later.extract_if(.., |(due, _)| *due <= now);
        self.again.extend(due.map(|(_, watch)| watch));
    }

    fn obey_commands(&mut self) -> std::ops::ControlFlow<()> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start {
                    index,
                    workers,
                    kicks,
                    signals,
                } => {
                    for worker in workers {
                        self.add(index, worker, kicks.clone(), Arc::clone(&signals));
                    }
                }
                Command::Stop { index, reply } => {
                    let _ = reply.send(self.remove(index));
                }
                Command::LookAgain => {
                    self.again
                        .extend(self.later.drain(..).map(|(_, watch)| watch));
                }
                Command::Quit => return std::ops::ControlFlow::Break(()),
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    fn add(
        &mut self,
        device: u16,
        mut worker: Box<dyn Worker>,
        kicks: Vec<Arc<EventFd>>,
        signals: Arc<Signals>,
    ) {
        let id = self.new_id();
        let started = worker.start();
        let mut job = Job {
            device,
            worker,
            kicks,
            signals,
            tokens: Vec::new(),
            failed: started.is_err(),
        };
        if let Err(error) = started {
            job.signals.fail(&error);
            self.workers.insert(id, job);
            return;
        }
        for queue in job.worker.queues().to_vec() {
            let kick = job
                .kicks
                .get(usize::from(queue))
                .map(|kick| kick.as_raw_fd());
            if let Some(fd) = kick {
                self.watch(id, &mut job, Event::Queue(queue), fd);
            }
            // A kick may have come before.
            let event = Event::Queue(queue);
            self.again.push_back(Watch { worker: id, event });
        }
        for (source, fd) in source_descriptors(&*job.worker) {
            self.watch(id, &mut job, Event::Source(source), fd);
        }
        self.workers.insert(id, job);
    }

    fn watch(&mut self, worker: u64, job: &mut Job, event: Event, fd: RawFd) {
        let token = self.new_id();
        match add(&self.epoll, fd, token) {
            Ok(()) => {
                self.watches.insert(token, Watch { worker, event });
                job.tokens.push(token);
            }
            Err(error) => job.signals.fail(&error),
        }
    }

    /// Pauses and drops the workers of a device.
    fn remove(&mut self, device: u16) -> Vec<(u16, QueueState)> {
        let ids: Vec<u64> = self
            .workers
            .iter()
            .filter(|(_, job)| job.device == device)
            .map(|(id, _)| *id)
            .collect();
        let mut positions = Vec::new();
        for id in ids {
            if let Some(mut job) = self.workers.remove(&id) {
                self.unwatch(&mut job);
                positions.extend(job.worker.pause());
            }
            self.again.retain(|watch| watch.worker != id);
            self.later.retain(|(_, watch)| watch.worker != id);
        }
        positions
    }

    fn unwatch(&mut self, job: &mut Job) {
        let sources = source_descriptors(&*job.worker);
        for token in job.tokens.drain(..) {
            let fd = match self.watches.remove(&token).map(|watch| watch.event) {
                Some(Event::Queue(queue)) => {
                    let kick = job.kicks.get(usize::from(queue));
                    kick.map(|kick| kick.as_raw_fd())
                }
                Some(Event::Source(source)) => sources
                    .iter()
                    .find(|(found, _)| *found == source)
                    .map(|(_, fd)| *fd),
                None => None,
            };
            if let Some(fd) = fd {
                let event = EpollEvent::default();
                let _ = self.epoll.ctl(ControlOperation::Delete, fd, event);
            }
        }
    }

    fn on_event(&mut self, token: u64) {
        let Some(watch) = self.watches.get(&token).copied() else {
            return; // removed by an earlier event of the same batch
        };
        if let (Event::Queue(queue), Some(job)) = (watch.event, self.workers.get(&watch.worker))
            && let Some(kick) = job.kicks.get(usize::from(queue))
        {
            let _ = kick.read();
        }
        self.handle(watch);
    }

    fn handle(&mut self, watch: Watch) {
        let Some(job) = self.workers.get_mut(&watch.worker) else {
            return;
        };
        if job.failed {
            return;
        }
        match job.worker.handle(watch.event) {
            Ok(Progress::Idle) => {}
            Ok(Progress::More) => self.again.push_back(watch),
            Ok(Progress::Later(wait)) => {
                self.later.retain(|(_, other)| *other != watch);
                // A wait that no clock can tell is as good as none.
                if let Some(due) = Instant::now().checked_add(wait) {
                    self.later.push((due, watch));
                }
            }
            Err(error) => self.fail(watch.worker, &error),
        }
    }

    /// The device waits for its driver to reset it; until then nothing wakes this thread for it.
    fn fail(&mut self, id: u64, error: &DeviceError) {
        if let Some(mut job) = self.workers.remove(&id) {
            self.unwatch(&mut job);
            job.failed = true;
            job.signals.fail(error);
            self.workers.insert(id, job);
        }
    }
}

fn add(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(
        ControlOperation::Add,
        fd,
        EpollEvent::new(EventSet::IN, token),
    )
}

/// The worker's own descriptors, each with its token; they live as long as the worker.
fn source_descriptors(worker: &dyn Worker) -> Vec<(u32, RawFd)> {
    let sources = worker.sources();
    sources
        .iter()
        .map(|(token, fd)| (*token, fd.as_raw_fd()))
        .collect()
}
