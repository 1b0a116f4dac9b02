// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a container leaves in the kubelet's files goes back to the host before its exit is told: whoever hears of the
//! exit finds the termination message there (Kubernetes reads it then, and not again).
//!
//! ```text
//! guest: init exited ─ no such files ─────────────────────────────> task table
//!   └─ held ─> read in the guest, write on the host ─> Settled ─────^   (or the VM ends: told at once)
//! ```

use std::sync::Arc;
use std::time::Duration;

use agent_proto::api;
use ids::Generation;
use pod_storage::{Written, WrittenBack};
use task_state::{Exit, ProcessId};
use tokio::time::timeout;

use crate::input::Input;
use crate::owner::{Owner, Shared};
use crate::vm;

/// How long an exit waits for the files of its container, all of them together.
const LIMIT: Duration = Duration::from_secs(3);

impl Owner {
    /// A process has ended. If its container has files that go back to the host, the exit is held until they are there.
    pub(crate) fn exited(&mut self, process: ProcessId, generation: Generation, exit: Exit) {
        let files = self.take_written_back(&process, generation);
        if files.is_empty() {
            self.tell_exit(process, generation, exit);
            return;
        }
        self.held_exits.insert(process.clone(), (generation, exit));
        let shared = Arc::clone(&self.shared);
        self.work.spawn(async move {
            if timeout(LIMIT, write_all(&shared, &process, files))
                .await
                .is_err()
            {
                let container_id = process.container.as_str();
                tracing::warn!(container_id, limit = ?LIMIT, "the files that a container wrote for the kubelet are given up");
            }
            shared.send(Input::Settled(process));
        });
    }

    /// Tells an exit that was held. Only the first time.
    pub(crate) fn settled(&mut self, process: ProcessId) {
        if let Some((generation, exit)) = self.held_exits.remove(&process) {
            self.tell_exit(process, generation, exit);
        }
    }

    /// Tells all exits that are held: nothing more comes out of the guest.
    pub(crate) fn settle_all(&mut self) {
        for (process, (generation, exit)) in std::mem::take(&mut self.held_exits) {
            self.tell_exit(process, generation, exit);
        }
    }

    fn tell_exit(&mut self, process: ProcessId, generation: Generation, exit: Exit) {
        self.feed(task_state::Input::Exited {
            process,
            generation,
            exit,
        });
    }

    fn take_written_back(
        &mut self,
        process: &ProcessId,
        generation: Generation,
    ) -> Vec<WrittenBack> {
        let record = self
            .containers
            .get_mut(&process.container)
            .filter(|record| process.exec.is_none() && record.generation == generation);
        record
            .map(|record| std::mem::take(&mut record.written_back))
            .unwrap_or_default()
    }
}

async fn write_all(shared: &Shared, process: &ProcessId, files: Vec<WrittenBack>) {
    for file in files {
        let path = file.path().display().to_string();
        let problem = match write(shared, process, file).await {
            Ok(Written::Back | Written::Unchanged) => continue,
            Ok(Written::TooLarge) => "it has grown too large".to_owned(),
            Err(problem) => problem,
        };
        let container_id = process.container.as_str();
        tracing::warn!(container_id, path, problem, "a file is not written back");
    }
}

async fn write(shared: &Shared, process: &ProcessId, file: WrittenBack) -> Result<Written, String> {
    let guest = vm::ready(shared.vm.subscribe())
        .await
        .map_err(|error| error.report())?;
    let request = api::ReadCopiedFileRequest {
        container_id: process.container.to_string(),
        index: file.index(),
        max_bytes: file.max_bytes(),
        ..Default::default()
    };
    let end = guest.agent.read_copied_file(&request).await;
    let end = end.map_err(|error| error.to_string())?;
    let written = vm::blocking(move || file.write(&end.data, end.size)).await;
    written
        .map_err(|error| error.report())?
        .map_err(|error| error.to_string())
}
