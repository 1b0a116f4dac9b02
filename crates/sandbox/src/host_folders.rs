// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's own directories in a pod: the file server that shares them, and the device by which the guest has them.
//!
//! One task per pod starts the file server for the first container that mounts such a directory, attaches it to the VM,
//! and puts directories into it as further containers need them. It does one thing at a time, and what it has begun it
//! finishes, also for a container that was given up meanwhile: the VM cannot live without a file server that it has.
//! A directory stays as long as the pod; its containers may be made again. The server is gone when the VM's end is told.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_proto::api;
use file_server::{Access, FileServer, FileServerError, Propagation, ServerExit, Share, ShareName};
use hypervisor::{FileSystem, RunningVm};
use pod_spec::{FolderAccess, FolderPropagation, HostFolder};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::owner::Shared;
use crate::vm;

/// By which the guest finds the file system.
const TAG: &str = "coffer-host";

/// How long the host may take to open a directory and mount it: one of a network file system whose server is gone takes for
/// ever, and the VM's end waits for what is under way here.
const ADD_DEADLINE: Duration = Duration::from_secs(20);

/// Shares directories. Cheap to clone.
#[derive(Clone)]
pub(crate) struct HostFolders {
    wishes: mpsc::UnboundedSender<Wish>,
    lost: watch::Receiver<Option<ServerExit>>,
    shown: Arc<Mutex<Shown>>,
}

/// What there is, for people.
#[derive(Default)]
struct Shown {
    /// The process id of the server, while it runs.
    server: Option<u32>,
    /// Each name and what is behind it.
    folders: BTreeMap<String, PathBuf>,
}

enum Wish {
    Share(
        Vec<HostFolder>,
        oneshot::Sender<Result<api::HostFolders, SandboxError>>,
    ),
    End(oneshot::Sender<()>),
}

struct Task {
    shared: Arc<Shared>,
    vm: Arc<dyn RunningVm>,
    running: Option<Running>,
    /// How the server ended, if it did so by itself.
    lost: watch::Sender<Option<ServerExit>>,
    shown: Arc<Mutex<Shown>>,
}

/// A file server that the VM has.
struct Running {
    server: Arc<FileServer>,
    bind_device: String,
}

fn gone() -> SandboxError {
    SandboxError::new(SandboxErrorKind::Unavailable, "the VM has ended")
}

impl HostFolders {
    /// None yet, for `vm`.
    pub(crate) fn new(shared: Arc<Shared>, vm: Arc<dyn RunningVm>) -> Self {
        let (wishes, received) = mpsc::unbounded_channel();
        let (lost, lost_receiver) = watch::channel(None);
        let shown = Arc::<Mutex<Shown>>::default();
        let task = Task {
            shared,
            vm,
            running: None,
            lost,
            shown: Arc::clone(&shown),
        };
        tokio::spawn(task.run(received));
        Self {
            wishes,
            lost: lost_receiver,
            shown,
        }
    }

    /// Shares directories with the pod; those that it has stay as they are. Gives what the guest needs to mount them.
    pub(crate) async fn share(
        &self,
        folders: Vec<HostFolder>,
    ) -> Result<api::HostFolders, SandboxError> {
        let (reply, answer) = oneshot::channel();
        self.wishes
            .send(Wish::Share(folders, reply))
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// How the server ended, if it did so by itself.
    pub(crate) fn exit(&self) -> Option<ServerExit> {
        self.lost.borrow().clone()
    }

    /// Waits until the server has ended by itself, which may be for ever.
    pub(crate) async fn lost(&self) {
        let mut lost = self.lost.clone();
        if lost.wait_for(Option::is_some).await.is_err() {
            // The task has ended, and will not tell.
            std::future::pending::<()>().await;
        }
    }

    /// Ends the server and waits until it is gone. Nothing is shared from here on. Idempotent.
    pub(crate) async fn end(&self) {
        let (reply, answer) = oneshot::channel();
        if self.wishes.send(Wish::End(reply)).is_ok() {
            // An error means that another call was first.
            drop(answer.await);
        }
    }

    /// The server's process and each directory with its name, for people.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!({ "server": shown.server, "folders": shown.folders })
    }
}

impl Task {
    async fn run(mut self, mut wishes: mpsc::UnboundedReceiver<Wish>) {
        loop {
            tokio::select! {
                // First what has happened: what ends a server also ends its VM, which has the server ended.
                biased;
                exit = ended(self.running.as_ref()) => {
                    tracing::error!(sandbox_id = self.shared.id.as_str(), %exit, "the file server is lost");
                    self.running = None;
                    self.shown().server = None;
                    self.lost.send_replace(Some(exit));
                }
                wish = wishes.recv() => match wish {
                    // A caller that has gone away has given up on the answer only.
                    Some(Wish::Share(folders, reply)) => drop(reply.send(self.share(folders).await)),
                    Some(Wish::End(reply)) => {
                        if let Some(running) = self.running.take() {
                            running.server.kill().await;
                            self.shown().server = None;
                        }
                        let _gone = reply.send(());
                        return;
                    }
                    None => return,
                },
            }
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn share(&mut self, folders: Vec<HostFolder>) -> Result<api::HostFolders, SandboxError> {
        if let Some(exit) = &*self.lost.borrow() {
            let kind = SandboxErrorKind::Unavailable;
            return Err(SandboxError::new(kind, exit.to_string()));
        }
        if self.running.is_none() {
            let running = start(&self.shared, &*self.vm).await?;
            self.shown().server = Some(running.server.pid());
            self.running = Some(running);
        }
        let running = self.running.as_ref().ok_or_else(gone)?;
        let mut names = Vec::with_capacity(folders.len());
        let mut writable_mounts = Vec::new();
        for folder in folders {
            names.push(folder.name.clone());
            // A name that the guest cannot be told stays read-only.
            let writable = folder.writable.iter().filter_map(|path| path.to_str());
            writable_mounts.extend(writable.map(|path| format!("{}/{path}", folder.name)));
            if self.shown().folders.contains_key(&folder.name) {
                continue;
            }
            let server = Arc::clone(&running.server);
            let (name, source) = (folder.name.clone(), folder.source.clone());
            let adding = vm::blocking(move || add(&server, &folder));
            let added = timeout(ADD_DEADLINE, adding).await.map_err(|_| {
                let what = format!(
                    "share {} with the pod: the host does not open it within {ADD_DEADLINE:?}; is it on a server that is gone?",
                    source.display()
                );
                SandboxError::new(SandboxErrorKind::DeadlineExceeded, what)
            })??;
            added.map_err(|error| {
                let what = format!("share {} with the pod", source.display());
                SandboxError::new(kind(&error), what).because(error)
            })?;
            self.shown().folders.insert(name, source);
        }
        Ok(api::HostFolders {
            tag: TAG.to_owned(),
            bind_device: running.bind_device.clone(),
            names,
            writable_mounts,
            ..Default::default()
        })
    }
}

/// Starts the file server and attaches it. On failure there is none.
async fn start(shared: &Shared, vm: &dyn RunningVm) -> Result<Running, SandboxError> {
    let spawned = FileServer::spawn(&shared.file_server, &[]).await;
    let (server, connection) = spawned.map_err(|error| {
        let what = "start the file server for the pod's host directories (file_server.path in the node's config)";
        SandboxError::new(kind(&error), what).because(error)
    })?;
    shared.oom_score.add(server.pid());
    let file_system = FileSystem {
        tag: TAG.to_owned(),
        connection,
    };
    let attached = vm.attach_file_system(file_system).await;
    let attached =
        attached.map_err(|error| convert::driver("attach the pod's host directories", error))?;
    Ok(Running {
        server: Arc::new(server),
        bind_device: attached.bind_device.unwrap_or_default(),
    })
}

/// Blocks for some system calls.
fn add(server: &FileServer, folder: &HostFolder) -> Result<(), FileServerError> {
    let access = match folder.access {
        FolderAccess::ReadWrite => Access::ReadWrite,
        FolderAccess::ReadOnly => Access::ReadOnly,
        FolderAccess::RecursiveReadOnly => Access::RecursiveReadOnly,
    };
    let propagation = match folder.propagation {
        FolderPropagation::Private => Propagation::Private,
        FolderPropagation::FromHost => Propagation::FromHost,
    };
    let name = ShareName::new(&folder.name)?;
    server.add(&Share::open(name, &folder.source, access, propagation)?)
}

fn kind(error: &FileServerError) -> SandboxErrorKind {
    match error {
        FileServerError::Start { .. } | FileServerError::NotReady { .. } => {
            SandboxErrorKind::FailedPrecondition
        }
        FileServerError::TooMany => SandboxErrorKind::ResourceExhausted,
        FileServerError::Kind { .. } | FileServerError::Mount { .. } => {
            SandboxErrorKind::InvalidArgument
        }
        FileServerError::Name { .. } | FileServerError::Exists { .. } => SandboxErrorKind::Internal,
    }
}

async fn ended(running: Option<&Running>) -> ServerExit {
    match running {
        Some(running) => running.server.wait().await,
        None => std::future::pending().await,
    }
}
