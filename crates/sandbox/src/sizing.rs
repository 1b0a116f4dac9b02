// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The VM's size, which follows its containers' limits.
//!
//! One task does one change at a time: the ledger says what the containers want, the pod's cgroup on the host how much the
//! VM may have at all, the driver and the agent make it so.
//!
//! ```text
//! a container is made     grow, if it needs more than there is
//! limits rise             grow ─> the guest's cgroup
//! limits fall             the guest's cgroup ─> shrink
//! a container is gone     forget its limits; the next change counts without them
//! ```
//! A VM that cannot grow is an error of whoever asked, and leaves the size as it was. One that does not shrink is not: a
//! guest gives memory back when it can, and goes on being asked. Both are told in the log and in dumps.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_client::AgentClient;
use agent_proto::api;
use hypervisor::{Resized, RunningVm, VmTarget};
use ids::{ContainerId, SandboxId};
use pod_spec::{Ledger, Limits, PodSize, ResourceUpdate, VmSize};
use task_state::Role;
use tokio::sync::{mpsc, oneshot};

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::host::Host;
use crate::vm;

/// How long a guest may take to have more memory; a second for gigabytes on hardware, much longer in an emulator.
const GROW_LIMIT: Duration = Duration::from_secs(20);
/// How long an update waits for memory that the guest is to give back. It goes on doing so afterwards.
const SHRINK_LIMIT: Duration = Duration::from_secs(2);

/// Keeps the VM's size. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sizing {
    wishes: mpsc::UnboundedSender<Wish>,
    shown: Arc<Mutex<Shown>>,
}

/// Where the answer to a wish goes.
type Reply = oneshot::Sender<Result<(), SandboxError>>;

enum Wish {
    Admit(ContainerId, Limits, Reply),
    Update(ContainerId, Role, ResourceUpdate, Reply),
    Forget(ContainerId),
}

/// What was asked of the VM last, and what it was then; for people.
#[derive(Clone, Copy)]
struct Shown {
    asked: VmSize,
    achieved: VmSize,
}

/// What a VM is resized with.
pub(crate) struct Parts {
    pub(crate) sandbox: SandboxId,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) vm: Arc<dyn RunningVm>,
    pub(crate) agent: Arc<AgentClient>,
    pub(crate) size: PodSize,
}

struct Task {
    parts: Parts,
    ledger: Ledger,
    /// What the VM is asked to be.
    asked: VmSize,
    shown: Arc<Mutex<Shown>>,
}

fn gone() -> SandboxError {
    SandboxError::new(SandboxErrorKind::Unavailable, "the VM has ended")
}

impl Sizing {
    /// For a VM that has just been started.
    pub(crate) fn new(parts: Parts) -> Self {
        let (wishes, mut received) = mpsc::unbounded_channel();
        let asked = parts.size.started_with;
        let shown = Arc::new(Mutex::new(Shown {
            asked,
            achieved: asked,
        }));
        let mut task = Task {
            ledger: Ledger::new(parts.size),
            parts,
            asked,
            shown: Arc::clone(&shown),
        };
        tokio::spawn(async move {
            while let Some(wish) = received.recv().await {
                // A caller that has gone away has given up on the answer only.
                match wish {
                    Wish::Admit(container, limits, reply) => {
                        drop(reply.send(task.admit(container, limits).await));
                    }
                    Wish::Update(container, role, update, reply) => {
                        drop(reply.send(task.update(&container, role, &update).await));
                    }
                    Wish::Forget(container) => task.ledger.remove(&container),
                }
            }
        });
        Self { wishes, shown }
    }

    /// A container is to be made with these limits. Each call wants one [`Self::forget`], also one that fails.
    pub(crate) async fn admit(&self, id: ContainerId, limits: Limits) -> Result<(), SandboxError> {
        self.ask(|reply| Wish::Admit(id, limits, reply)).await
    }

    /// A container, or the pod for which the sandbox container stands, gets other limits.
    pub(crate) async fn update(
        &self,
        id: ContainerId,
        role: Role,
        update: ResourceUpdate,
    ) -> Result<(), SandboxError> {
        self.ask(|reply| Wish::Update(id, role, update, reply))
            .await
    }

    /// A container is gone.
    pub(crate) fn forget(&self, container: ContainerId) {
        // An error means that the VM is gone too.
        drop(self.wishes.send(Wish::Forget(container)));
    }

    async fn ask(&self, wish: impl FnOnce(Reply) -> Wish) -> Result<(), SandboxError> {
        let (reply, answer) = oneshot::channel();
        self.wishes.send(wish(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The size that was asked for and the one that there is, for people.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let Shown { asked, achieved } = *lock(&self.shown);
        let size = |size: VmSize| serde_json::json!({ "vcpus": size.vcpus.get(), "memory_mib": size.memory.0 });
        serde_json::json!({ "asked": size(asked), "achieved": size(achieved) })
    }
}

fn lock(shown: &Mutex<Shown>) -> MutexGuard<'_, Shown> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The larger of each.
fn union(one: VmSize, other: VmSize) -> VmSize {
    VmSize {
        vcpus: one.vcpus.max(other.vcpus),
        memory: one.memory.max(other.memory),
    }
}

impl Task {
    async fn admit(&mut self, container: ContainerId, limits: Limits) -> Result<(), SandboxError> {
        self.ledger.add(container.clone(), limits);
        let wanted = union(self.asked, self.ledger.wanted());
        if wanted == self.asked {
            return Ok(());
        }
        let wanted = union(self.asked, self.allowed(wanted).await?);
        // A pod whose limits add up to more than its VM can have is no error: runc does not refuse it either.
        self.grow(wanted, &format!("create container {container}"))
            .await
    }

    async fn update(
        &mut self,
        container: &ContainerId,
        role: Role,
        update: &ResourceUpdate,
    ) -> Result<(), SandboxError> {
        let what = format!("update container {container}");
        let mut ledger = self.ledger.clone();
        match role {
            Role::Sandbox => ledger.update_pod(&update.limit_changes()),
            Role::Guest => ledger.update(container, &update.limit_changes()),
        }
        let wanted = self.allowed(ledger.wanted()).await?;
        let before = self.asked;
        let enough = union(before, wanted);
        if role == Role::Guest {
            update.check_fits(enough).map_err(|error| {
                SandboxError::new(SandboxErrorKind::ResourceExhausted, what.as_str()).because(error)
            })?;
        }
        self.grow(enough, &what).await?;
        let done = match role {
            // Nothing in the guest is the pod's own; the kubelet's cgroup on the host is.
            Role::Sandbox => Ok(()),
            Role::Guest => self.apply(container, update, &what).await,
        };
        let size = match &done {
            Ok(()) => {
                self.ledger = ledger;
                wanted
            }
            Err(_) => before,
        };
        self.shrink(size).await;
        done
    }

    /// Sets a container's limits in the guest.
    async fn apply(
        &self,
        container: &ContainerId,
        update: &ResourceUpdate,
        what: &str,
    ) -> Result<(), SandboxError> {
        let request = api::UpdateContainerRequest {
            container_id: container.to_string(),
            resources_json: update.guest_json().to_vec(),
            ..Default::default()
        };
        let updated = self.parts.agent.update_container(&request).await;
        updated.map_err(|error| convert::agent(what, error))
    }

    /// As much of `wanted` as the pod's cgroup on the host has room for.
    async fn allowed(&self, wanted: VmSize) -> Result<VmSize, SandboxError> {
        let host = Arc::clone(&self.parts.host);
        let limit = vm::blocking(move || host.memory_limit()).await??;
        Ok(VmSize {
            memory: limit.map_or(wanted.memory, |limit| wanted.memory.min(limit)),
            ..wanted
        })
    }

    /// Makes the VM larger; if the guest does not take what it is given, the VM is as before.
    async fn grow(&mut self, wanted: VmSize, what: &str) -> Result<(), SandboxError> {
        if wanted == self.asked {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.asked, wanted);
        // Without more memory there is nothing to wait for, and the guest may still owe some.
        let limit = if wanted.memory > before.memory {
            GROW_LIMIT
        } else {
            Duration::ZERO
        };
        let grown = self.resize(wanted, limit).await;
        let error = match grown {
            Ok(achieved) if union(achieved, wanted) == achieved => return Ok(()),
            Ok(achieved) => SandboxError::new(
                SandboxErrorKind::ResourceExhausted,
                format!(
                    "{what}: of {} vCPUs and {} MiB of memory the guest has taken {} and {} within {GROW_LIMIT:?}: try \
                     again, or make the pod anew with larger limits",
                    wanted.vcpus.get(),
                    wanted.memory.0,
                    achieved.vcpus.get(),
                    achieved.memory.0
                ),
            ),
            Err(error) => error,
        };
        self.shrink(before).await;
        Err(error)
    }

    /// Asks the VM to be smaller, and says so where it is not.
    async fn shrink(&mut self, wanted: VmSize) {
        if wanted == self.asked {
            return;
        }
        self.asked = wanted;
        let sandbox_id = self.parts.sandbox.as_str();
        match self.resize(wanted, SHRINK_LIMIT).await {
            Ok(achieved) if achieved == union(achieved, wanted) && achieved != wanted => {
                tracing::warn!(
                    sandbox_id,
                    wanted_vcpus = wanted.vcpus.get(),
                    wanted_mib = wanted.memory.0,
                    vcpus = achieved.vcpus.get(),
                    mib = achieved.memory.0,
                    "the guest has not given back all that it was asked for yet"
                );
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(sandbox_id, error = error.report(), "the VM keeps its size");
            }
        }
    }

    /// Has the VM be of another size, as far as it gets within `limit`.
    async fn resize(&self, wanted: VmSize, limit: Duration) -> Result<VmSize, SandboxError> {
        let VmSize { vcpus, memory } = wanted;
        let target = VmTarget { vcpus, memory };
        let driver = |error| convert::driver("resize the VM", error);
        let vm = &self.parts.vm;
        // vCPUs and the memory's device are there when this is answered; the guest's part comes next.
        let begun = vm.resize(target, Duration::ZERO).await.map_err(driver)?;
        let request = api::ResizeGuestRequest {
            vcpus: u32::from(vcpus.get()),
            memory_device: begun.bind_device.unwrap_or_default(),
            ..Default::default()
        };
        let up = self.parts.agent.resize_guest(&request).await;
        let up = up.map_err(|error| convert::agent("resize the guest", error))?;
        let Resized { memory, .. } = vm.resize(target, limit).await.map_err(driver)?;
        let up = u8::try_from(up).ok().and_then(ids::VcpuCount::new);
        let achieved = VmSize {
            vcpus: up.unwrap_or(vcpus),
            memory,
        };
        *lock(&self.shown) = Shown {
            asked: wanted,
            achieved,
        };
        tracing::info!(
            sandbox_id = self.parts.sandbox.as_str(),
            vcpus = achieved.vcpus.get(),
            mib = achieved.memory.0,
            "the VM has another size"
        );
        Ok(achieved)
    }
}
