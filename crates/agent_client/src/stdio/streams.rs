// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What is known of a process's streams, shared between their pumps and the sandbox.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use agent_proto::StreamKind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::open::{StdioError, open_at};

/// Sees and steers a process's streams, before, while and after they are pumped. Dropping it stops the pumps.
pub struct Streams {
    stdin: Option<Arc<Stdin>>,
    outputs: Vec<Arc<Flow>>,
    pumps: Mutex<Vec<AbortHandle>>,
}

/// The input stream.
pub(super) struct Stdin {
    path: PathBuf,
    begun: watch::Sender<bool>,
    hold: Mutex<Hold>,
    passed: AtomicU64,
    fifo: OnceLock<Weak<OwnedFd>>,
}

/// Our hold on stdin.
#[derive(Default)]
struct Hold {
    writer: Option<OwnedFd>,
    /// CloseIO has come: no writer any more, or none at all.
    released: bool,
}

/// One output stream.
struct Flow {
    kind: StreamKind,
    passed: AtomicU64,
    /// How long the guest says it is, once it has ended there.
    end: watch::Sender<Option<u64>>,
    /// Nothing more will be passed on.
    done: watch::Sender<bool>,
    /// containerd's end, while it is open: a pump closes it with its own end.
    fifo: OnceLock<Weak<OwnedFd>>,
}

impl Streams {
    pub(super) fn new(stdin: Option<PathBuf>, outputs: impl Iterator<Item = StreamKind>) -> Self {
        let flow = |kind| {
            Arc::new(Flow {
                kind,
                passed: AtomicU64::new(0),
                end: watch::Sender::new(None),
                done: watch::Sender::new(false),
                fifo: OnceLock::new(),
            })
        };
        let stdin = stdin.map(|path| {
            Arc::new(Stdin {
                path,
                begun: watch::Sender::new(false),
                hold: Mutex::default(),
                passed: AtomicU64::new(0),
                fifo: OnceLock::new(),
            })
        });
        Self {
            stdin,
            outputs: outputs.map(flow).collect(),
            pumps: Mutex::default(),
        }
    }

    /// Opens stdin's FIFO: the process has been started. Not before, because that is what a writer waits for, and ctr
    /// loses a CloseIO that its user's end of file asks for while the container is still being created.
    pub fn begin_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.begun.send_replace(true);
        }
    }

    /// Lets go of our hold on stdin. It ends once every other writer of its FIFO has closed too.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            *stdin.hold() = Hold {
                writer: None,
                released: true,
            };
        }
    }

    /// The guest has sent all of an output stream: `bytes`.
    pub fn ended(&self, kind: StreamKind, bytes: u64) {
        if let Some(flow) = self.flow(kind) {
            // The first word counts: a second one could only cut off or hang what is under way.
            flow.end.send_if_modified(|end| {
                let first = end.is_none();
                end.get_or_insert(bytes);
                first
            });
        }
    }

    /// Waits until nothing more of the process's output will be passed on, and the FIFOs that have readers are closed. A
    /// reader that does not read makes this wait for ever: bound it.
    pub async fn drained(&self) {
        for flow in &self.outputs {
            // An error would mean that the sender is gone, and it is in `flow`.
            let mut done = flow.done.subscribe();
            let _always = done.wait_for(|done| *done).await;
        }
    }

    /// Stops every pump and closes its ends, whatever is still under way.
    pub fn cancel(&self) {
        self.close_stdin();
        let pumps = std::mem::take(&mut *self.pumps.lock().unwrap_or_else(PoisonError::into_inner));
        for pump in pumps {
            pump.abort();
        }
    }

    /// What is known of each stream, as JSON for people: bytes passed on and announced, what is in containerd's FIFO, and
    /// whom the stream waits for.
    pub fn dump(&self) -> Value {
        let mut streams = serde_json::Map::new();
        if let Some(stdin) = &self.stdin {
            let fifo = Fifo::of(&stdin.fifo);
            let stdin = json!({
                "bytes": stdin.passed(),
                "held": stdin.hold().writer.is_some(),
                "waits_for": match &fifo {
                    None if *stdin.begun.borrow() => "nobody",
                    None => "start",
                    Some(fifo) if fifo.bytes > 0 => "guest",
                    Some(_) => "client",
                },
                "fifo": fifo.map(|fifo| fifo.dump()),
            });
            streams.insert("stdin".to_owned(), stdin);
        }
        for flow in &self.outputs {
            let name = match flow.kind {
                StreamKind::Stdin => "stdin",
                StreamKind::Stdout => "stdout",
                StreamKind::Stderr => "stderr",
            };
            let fifo = Fifo::of(&flow.fifo);
            let done = *flow.done.borrow();
            let output = json!({
                "bytes": flow.passed.load(Ordering::Relaxed),
                "announced": *flow.end.borrow(),
                "done": done,
                "waits_for": match &fifo {
                    _ if done => "nobody",
                    Some(fifo) if !fifo.writable => "client",
                    _ => "guest",
                },
                "fifo": fifo.map(|fifo| fifo.dump()),
            });
            streams.insert(name.to_owned(), output);
        }
        Value::Object(streams)
    }

    pub(super) fn stdin(&self) -> Option<Arc<Stdin>> {
        self.stdin.clone()
    }

    pub(super) fn own(&self, pump: AbortHandle) {
        self.pumps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(pump);
    }

    fn flow(&self, kind: StreamKind) -> Option<&Arc<Flow>> {
        self.outputs.iter().find(|flow| flow.kind == kind)
    }
}

/// A FIFO as it is now.
struct Fifo {
    /// What nobody has read yet.
    bytes: u64,
    capacity: usize,
    writable: bool,
}

impl Fifo {
    /// `None` if it is not open, or no FIFO.
    fn of(fifo: &OnceLock<Weak<OwnedFd>>) -> Option<Self> {
        let fifo = fifo.get()?.upgrade()?;
        let mut ready = [PollFd::new(&*fifo, PollFlags::OUT)];
        poll(&mut ready, Some(&Timespec::default())).ok()?;
        let [ready] = ready.map(|fd| fd.revents().contains(PollFlags::OUT));
        Some(Self {
            bytes: rustix::io::ioctl_fionread(&*fifo).ok()?,
            capacity: rustix::pipe::fcntl_getpipe_size(&*fifo).ok()?,
            writable: ready,
        })
    }

    fn dump(&self) -> Value {
        json!({ "bytes": self.bytes, "capacity": self.capacity })
    }
}

impl Stdin {
    /// Remembers containerd's end for dumps.
    pub(super) fn show(&self, fifo: &Arc<OwnedFd>) {
        // Opened once.
        let _first = self.fifo.set(Arc::downgrade(fifo));
    }

    /// The reading end of the FIFO, once the process has been started. Our writer is opened with it, so that stdin does
    /// not end with the first client that detaches.
    pub(super) async fn opened(&self) -> Result<OwnedFd, StdioError> {
        let mut begun = self.begun.subscribe();
        // An error would mean that the sender is gone, and it is in `self`.
        let _always = begun.wait_for(|begun| *begun).await;
        let read = open_at(&self.path, OFlags::RDONLY)?;
        // Also where CloseIO came first: a FIFO tells its reader of an end only after it had a writer.
        let writer = open_at(&self.path, OFlags::WRONLY)?;
        let mut hold = self.hold();
        if !hold.released {
            hold.writer = Some(writer);
        }
        Ok(read)
    }

    pub(super) fn count(&self, moved: usize) {
        let moved = u64::try_from(moved).unwrap_or(u64::MAX);
        self.passed.fetch_add(moved, Ordering::Relaxed);
    }

    pub(super) fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    fn hold(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A pump's side of a stream: counts, and says when it is over, however the pump ends. It does not keep the [`Streams`]
/// alive, whose drop ends the pump.
pub(super) struct FlowGuard {
    flow: Arc<Flow>,
    end: watch::Receiver<Option<u64>>,
}

impl FlowGuard {
    /// `kind` must be one of the outputs that `streams` was made with; any other is a stream of no length.
    pub(super) fn new(streams: &Streams, kind: StreamKind) -> Self {
        let flow = streams.flow(kind).map_or_else(
            || {
                Arc::new(Flow {
                    kind,
                    passed: AtomicU64::new(0),
                    end: watch::Sender::new(Some(0)),
                    done: watch::Sender::new(false),
                    fifo: OnceLock::new(),
                })
            },
            Arc::clone,
        );
        let end = flow.end.subscribe();
        Self { flow, end }
    }

    pub(super) fn kind(&self) -> StreamKind {
        self.flow.kind
    }

    /// Remembers containerd's end for dumps.
    pub(super) fn show(&self, fifo: &Arc<OwnedFd>) {
        // A flow has one pump.
        let _first = self.flow.fifo.set(Arc::downgrade(fifo));
    }

    pub(super) fn count(&self, moved: usize) {
        let moved = u64::try_from(moved).unwrap_or(u64::MAX);
        self.flow.passed.fetch_add(moved, Ordering::Relaxed);
    }

    /// Whether all that the guest announced was passed on.
    pub(super) fn is_complete(&mut self) -> bool {
        let passed = self.flow.passed.load(Ordering::Relaxed);
        self.end
            .borrow_and_update()
            .is_some_and(|end| passed >= end)
    }

    /// Waits until the guest announces the stream's length, if it has not yet.
    pub(super) async fn announced(&mut self) {
        if self.end.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.flow.done.send_replace(true);
    }
}
