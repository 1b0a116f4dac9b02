// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Keeps the guest's copies of ConfigMaps, Secrets, projected and downward API volumes current.
//!
//! One task per pod puts a volume into the guest before the first container that mounts it is made, hears by inotify when
//! the kubelet has changed it, and puts it again. It does one thing at a time: a volume is never put twice at once. It
//! ends when the last [`LiveVolumes`] is dropped, which is when the VM has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_client::{AgentClient, AgentError};
use ids::SandboxId;
use pod_spec::LiveVolume;
use pod_storage::{LiveTree, MAX_LIVE_VOLUMES, StorageError, Watch};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::vm;

/// How long to wait before a volume that could not be brought up to date is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How often that is done before the next change, of whichever volume, is waited for.
const ATTEMPTS: u32 = 12;

/// Puts volumes into the guest. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LiveVolumes {
    wishes: mpsc::UnboundedSender<Wish>,
    shown: Arc<Mutex<Shown>>,
}

/// Each volume, and whether the guest has it as it is on the host, for people.
type Shown = BTreeMap<String, &'static str>;

/// A volume to put, and who waits for it.
type Wish = (LiveVolume, oneshot::Sender<Result<(), SandboxError>>);

struct Task {
    sandbox: SandboxId,
    agent: Arc<AgentClient>,
    watch: Option<Watch>,
    volumes: BTreeMap<String, Known>,
    /// Volumes that have changed and are not in the guest yet.
    dirty: BTreeSet<String>,
    /// When these are tried, and for which time.
    next: Option<(Instant, u32)>,
    shown: Arc<Mutex<Shown>>,
}

struct Known {
    volume: LiveVolume,
    /// Of what the guest has.
    digest: [u8; 32],
}

impl LiveVolumes {
    pub(crate) fn new(sandbox: SandboxId, agent: Arc<AgentClient>) -> Self {
        let (wishes, received) = mpsc::unbounded_channel();
        let shown = Arc::<Mutex<Shown>>::default();
        let task = Task {
            sandbox,
            agent,
            watch: None,
            volumes: BTreeMap::new(),
            dirty: BTreeSet::new(),
            next: None,
            shown: Arc::clone(&shown),
        };
        tokio::spawn(task.run(received));
        Self { wishes, shown }
    }

    /// Each volume and how it is, for people.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!(*shown)
    }

    /// Has the volume in the guest as it is on the host, and kept so from here on.
    pub(crate) async fn put(&self, volume: LiveVolume) -> Result<(), SandboxError> {
        let gone = || SandboxError::new(SandboxErrorKind::Unavailable, "the VM has ended");
        let (reply, answer) = oneshot::channel();
        self.wishes.send((volume, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Task {
    async fn run(mut self, mut wishes: mpsc::UnboundedReceiver<Wish>) {
        loop {
            tokio::select! {
                wish = wishes.recv() => {
                    let Some((volume, reply)) = wish else { return };
                    // A caller that has gone away has given up on the answer only.
                    let done = self.ensure(volume).await;
                    self.show();
                    drop(reply.send(done));
                }
                changed = changed(self.watch.as_mut()) => match changed {
                    Ok(names) => {
                        self.dirty.extend(names);
                        self.next = Some((Instant::now(), 1));
                    }
                    Err(error) => {
                        tracing::error!(sandbox_id = self.sandbox.as_str(), %error, "volumes are not kept current any more");
                        self.watch = None;
                    }
                },
                () = due(self.next) => self.update().await,
            }
            self.show();
        }
    }

    fn show(&self) {
        let state = |name: &String| match self.dirty.contains(name) {
            true => "behind",
            false => "current",
        };
        let shown = self.volumes.keys().map(|name| (name.clone(), state(name)));
        let mut place = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        *place = shown.collect();
    }

    async fn ensure(&mut self, volume: LiveVolume) -> Result<(), SandboxError> {
        let name = volume.name.clone();
        if !self.volumes.contains_key(&name) {
            if self.volumes.len() >= MAX_LIVE_VOLUMES {
                let message = format!("more than {MAX_LIVE_VOLUMES} volumes: use fewer");
                let kind = SandboxErrorKind::ResourceExhausted;
                return Err(SandboxError::new(kind, message));
            }
            // Watched before it is read, so that no change is missed.
            self.watch(&volume)
                .map_err(|error| storage(&volume, error))?;
        }
        let tree = read(&volume)
            .await?
            .map_err(|error| storage(&volume, error))?;
        let digest = tree.digest();
        if self
            .volumes
            .get(&name)
            .is_none_or(|known| known.digest != digest)
        {
            let sent = self.send(&name, tree).await;
            sent.map_err(|error| convert::agent(what(&volume), error))?;
        }
        self.volumes.insert(name, Known { volume, digest });
        Ok(())
    }

    fn watch(&mut self, volume: &LiveVolume) -> Result<(), StorageError> {
        let watch = match &mut self.watch {
            Some(watch) => watch,
            none => none.insert(Watch::new()?),
        };
        watch.add(&volume.name, &volume.source)
    }

    /// Brings the changed volumes up to date.
    async fn update(&mut self) {
        let attempt = self.next.take().map_or(1, |(_, attempt)| attempt);
        for name in std::mem::take(&mut self.dirty) {
            match self.update_one(&name).await {
                Ok(()) => {}
                Err(Problem::Gone) => {
                    // The kubelet has torn it down: its pod is about to end.
                    tracing::debug!(
                        sandbox_id = self.sandbox.as_str(),
                        volume = name,
                        "a volume is gone"
                    );
                }
                Err(Problem::Other(problem)) => {
                    tracing::warn!(
                        sandbox_id = self.sandbox.as_str(),
                        volume = name,
                        attempt,
                        problem,
                        "a volume in the guest is not current"
                    );
                    self.dirty.insert(name);
                }
            }
        }
        if attempt < ATTEMPTS && !self.dirty.is_empty() {
            let at = Instant::now().checked_add(RETRY);
            self.next = at.map(|at| (at, attempt.saturating_add(1)));
        }
    }

    async fn update_one(&mut self, name: &str) -> Result<(), Problem> {
        let Some(known) = self.volumes.get(name) else {
            // Its first put is under way or failed, and reads it anew.
            return Ok(());
        };
        let before = known.digest;
        let tree = match read(&known.volume).await {
            Ok(Ok(tree)) if tree.is_written() => tree,
            Ok(Ok(_)) => return Err(Problem::Gone),
            Ok(Err(error)) if error.is_not_found() => return Err(Problem::Gone),
            Ok(Err(error)) => return Err(Problem::Other(storage(&known.volume, error).report())),
            Err(error) => return Err(Problem::Other(error.report())),
        };
        let digest = tree.digest();
        if digest == before {
            return Ok(());
        }
        let sent = self.send(name, tree).await;
        sent.map_err(|error| Problem::Other(error.to_string()))?;
        tracing::debug!(
            sandbox_id = self.sandbox.as_str(),
            volume = name,
            "a volume was brought up to date"
        );
        if let Some(known) = self.volumes.get_mut(name) {
            known.digest = digest;
        }
        Ok(())
    }

    async fn send(&self, name: &str, tree: LiveTree) -> Result<(), AgentError> {
        for message in tree.into_messages(name) {
            self.agent.put_files(&message).await?;
        }
        Ok(())
    }
}

/// Why a volume was not brought up to date.
enum Problem {
    Gone,
    Other(String),
}

/// The volumes that have changed, once there are any.
async fn changed(watch: Option<&mut Watch>) -> Result<Vec<String>, StorageError> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

async fn due(next: Option<(Instant, u32)>) {
    match next {
        Some((at, _)) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn read(volume: &LiveVolume) -> Result<Result<LiveTree, StorageError>, SandboxError> {
    let source = volume.source.clone();
    vm::blocking(move || LiveTree::read(&source)).await
}

fn what(volume: &LiveVolume) -> String {
    format!("put the volume {} into the guest", volume.source.display())
}

fn storage(volume: &LiveVolume, error: StorageError) -> SandboxError {
    SandboxError::new(SandboxErrorKind::InvalidArgument, what(volume)).because(error)
}
