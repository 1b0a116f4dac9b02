// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the owner keeps of a process beside its state.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use agent_client::{HostStdio, StdioError, StdioPaths, Streams, TerminalSize};
use ids::{DiskSerial, Generation};
use pod_storage::WrittenBack;
use task_state::Role;
use tokio::sync::watch;

use crate::request::CreateTask;
use crate::stats::Figures;

/// A process's streams and terminal, reached by the owner and by the work that makes the process.
#[derive(Default)]
pub(crate) struct ProcessIo {
    streams: OnceLock<Arc<Streams>>,
    stdin_closed: AtomicBool,
    size: Mutex<TerminalSize>,
}

impl ProcessIo {
    /// Opens containerd's ends. From here on the owner reaches the streams.
    pub(crate) fn open(&self, paths: &StdioPaths) -> Result<HostStdio, StdioError> {
        let host = HostStdio::open(paths)?;
        let streams = self.streams.get_or_init(|| host.streams());
        // Either this sees the wish, or who wishes sees the streams.
        if self.stdin_closed.load(Ordering::SeqCst) {
            streams.close_stdin();
        }
        Ok(host)
    }

    pub(crate) fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::SeqCst);
        if let Some(streams) = self.streams.get() {
            streams.close_stdin();
        }
    }

    pub(crate) fn streams(&self) -> Option<&Arc<Streams>> {
        self.streams.get()
    }

    pub(crate) fn size(&self) -> TerminalSize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_size(&self, size: TerminalSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        if let Some(streams) = self.streams.get() {
            streams.cancel();
        }
    }
}

/// A container's record.
pub(crate) struct ContainerRecord {
    pub(crate) generation: Generation,
    pub(crate) task: Arc<CreateTask>,
    pub(crate) io: Arc<ProcessIo>,
    /// Gives up on the creation.
    pub(crate) abort: watch::Sender<bool>,
    pub(crate) role: Role,
    pub(crate) disks: Vec<DiskSerial>,
    /// Files that the host gets back when the container has ended.
    pub(crate) written_back: Vec<WrittenBack>,
    /// Undoes on drop what was made on the host.
    pub(crate) guard: Option<Box<dyn Any + Send>>,
    pub(crate) resized: bool,
    pub(crate) figures: Arc<Figures>,
}

/// An exec's record.
pub(crate) struct ExecRecord {
    pub(crate) generation: Generation,
    /// The OCI process for the guest, as JSON.
    pub(crate) process_json: Arc<Vec<u8>>,
    pub(crate) stdio: StdioPaths,
    pub(crate) io: Arc<ProcessIo>,
    /// The terminal's size was set while the process was being started.
    pub(crate) resized: bool,
}
