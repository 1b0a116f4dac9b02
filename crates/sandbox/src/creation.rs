// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Making a container, from its plan on the host to its init that waits in the guest. Runs beside the owner and ends
//! with an input; what it has done when it fails is undone.

use std::sync::Arc;

use agent_client::{AgentError, HostStdio};
use agent_proto::{ProcessKey, api};
use hypervisor::Disk;
use ids::{ContainerId, DiskSerial, Generation};
use pod_storage::{BlockVolume, EmptyDirVolume, WrittenBack};
use task_state::{Pid, ProcessId, Role};
use tokio::sync::watch;

use crate::convert;
use crate::disks::Sharing;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::host::{ContainerKind, ContainerPlan, GuestContainer, GuestDisk, GuestRootfs};
use crate::input::Made;
use crate::owner::Shared;
use crate::phase::{Of, phase};
use crate::record::ProcessIo;
use crate::request::{CreateTask, KillScope};
use crate::vm::{self, Guest};
use crate::work::{guest_pid, remove_container, signal_request};

/// A container to make.
pub(crate) struct Creation {
    pub(crate) shared: Arc<Shared>,
    pub(crate) task: Arc<CreateTask>,
    pub(crate) generation: Generation,
    pub(crate) io: Arc<ProcessIo>,
    pub(crate) abort: watch::Receiver<bool>,
    /// The VM's size counts its limits.
    pub(crate) admitted: bool,
}

impl Creation {
    /// Makes the container, or leaves nothing of it. Told to abort, it gives up at once until the guest has been asked
    /// for the container; after that, the guest decides.
    pub(crate) async fn run(mut self) -> Result<Made, SandboxError> {
        let mut shares = Vec::new();
        let mut abort = self.abort.clone();
        let prepared = tokio::select! {
            biased;
            _ = abort.wait_for(|abort| *abort) => Err(aborted(&self.task.container)),
            prepared = self.prepare(&mut shares) => prepared,
        };
        let result = match prepared {
            Ok(Prepared::Sandbox(made)) => return Ok(made),
            Ok(Prepared::Guest(ready)) => self.make(*ready, &shares).await,
            Err(error) => Err(error),
        };
        if result.is_err()
            && (self.admitted || !shares.is_empty())
            && let Ok(guest) = vm::ready(self.shared.vm.subscribe()).await
        {
            guest.sizing.forget(self.task.container.clone());
            for serial in shares {
                guest.disks.detach(serial).await;
            }
        }
        result
    }

    fn of(&self) -> Of<'_> {
        Of::Container(&self.shared.id, &self.task.container)
    }

    /// Everything up to the guest. `shares` are the disks to give back if it is left.
    async fn prepare(&mut self, shares: &mut Vec<DiskSerial>) -> Result<Prepared, SandboxError> {
        let plan = phase(self.of(), "prepare", self.plan()).await?;
        let ContainerPlan { kind, guard } = plan.0;
        let container = match kind {
            ContainerKind::Sandbox => {
                let vm = vm::launched(self.shared.vm.subscribe()).await?;
                return Ok(Prepared::Sandbox(Made {
                    role: Role::Sandbox,
                    pid: Pid::of_host_process(vm.processes().vmm),
                    disks: Vec::new(),
                    written_back: Vec::new(),
                    guard,
                }));
            }
            ContainerKind::Guest(container) => *container,
        };
        if let Some(adjustment) = container.oom_score_adj {
            self.shared.oom_score.lower(adjustment);
        }
        let guest = vm::ready(self.shared.vm.subscribe()).await?;
        if let Some(limits) = container.limits {
            self.admitted = true;
            let id = self.task.container.clone();
            guest.sizing.admit(id, limits).await?;
        }
        let (request, host, written_back) = phase(self.of(), "attach", async {
            let GuestContainer {
                spec_json,
                oom_score_adj: _,
                limits: _,
                rootfs,
                copied_mounts,
                written_back,
                live,
                volumes,
                sub_paths,
                host_folders,
                block_devices,
            } = container;
            for volume in live {
                guest.live.put(volume).await?;
            }
            let host_folders = if host_folders.is_empty() {
                None
            } else {
                Some(guest.folders.share(host_folders).await?)
            };
            let block_devices = attach_block_devices(&guest, block_devices, shares).await?;
            let rootfs = attach_rootfs(&guest, rootfs, shares).await?;
            // Last: those of volumes are given back only if one of them cannot be had. Then they are the pod's.
            let own = shares.len();
            let volumes = attach_volumes(&guest, volumes, shares).await?;
            shares.truncate(own);
            let host = plan.1;
            let request = api::CreateContainerRequest {
                container_id: self.task.container.to_string(),
                generation: self.generation.0,
                spec_json,
                rootfs: Some(rootfs),
                stdio: Some(host.wanted(self.io.size())).into(),
                copied_mounts,
                volumes,
                sub_paths,
                host_folders: host_folders.into(),
                block_devices,
                ..Default::default()
            };
            Ok((request, host, written_back))
        })
        .await?;
        Ok(Prepared::Guest(Box::new(Ready {
            guest,
            request,
            host,
            written_back,
            guard,
        })))
    }

    async fn plan(&self) -> Result<(ContainerPlan, HostStdio), SandboxError> {
        let shared = Arc::clone(&self.shared);
        let (task, io) = (Arc::clone(&self.task), Arc::clone(&self.io));
        vm::blocking(move || {
            let host = io
                .open(&task.stdio)
                .map_err(|error| convert::stdio("open the container's stdio", error))?;
            Ok((shared.host.plan_container(&task)?, host))
        })
        .await?
    }

    async fn make(&self, ready: Ready, shares: &[DiskSerial]) -> Result<Made, SandboxError> {
        let Ready {
            guest,
            request,
            host,
            written_back,
            guard,
        } = ready;
        let container = &self.task.container;
        let what = || format!("create container {container}");
        let pid = phase(self.of(), "create", async {
            let created = guest.agent.create_container(&request).await;
            let late = matches!(created, Err(AgentError::Timeout { .. }));
            match created {
                Ok(pid) => Ok(pid),
                Err(error) => {
                    if late {
                        discard(&guest, container, self.generation).await;
                    }
                    Err(convert::agent_start(what(), error))
                }
            }
        })
        .await?;
        let key = ProcessKey {
            container: container.clone(),
            exec: None,
            generation: self.generation,
        };
        let connected = host.connect(&key, &*guest, &guest.agent).await;
        let made = connected
            .map_err(|error| convert::stdio(what(), error))
            .and_then(|()| guest_pid(pid));
        match made {
            Ok(pid) => Ok(Made {
                role: Role::Guest,
                pid,
                disks: shares.to_vec(),
                written_back,
                guard,
            }),
            Err(error) => {
                discard(&guest, container, self.generation).await;
                Err(error)
            }
        }
    }
}

enum Prepared {
    Sandbox(Made),
    Guest(Box<Ready>),
}

struct Ready {
    guest: Arc<Guest>,
    request: api::CreateContainerRequest,
    host: HostStdio,
    written_back: Vec<WrittenBack>,
    guard: Box<dyn std::any::Any + Send>,
}

fn aborted(container: &ContainerId) -> SandboxError {
    let message = format!("the creation of container {container} was given up: it was stopped");
    SandboxError::new(SandboxErrorKind::Aborted, message)
}

/// Attaches the disks of emptyDirs.
async fn attach_volumes(
    guest: &Guest,
    volumes: Vec<EmptyDirVolume>,
    shares: &mut Vec<DiskSerial>,
) -> Result<Vec<api::Volume>, SandboxError> {
    let mut attached = Vec::with_capacity(volumes.len());
    for EmptyDirVolume { mut volume, disk } in volumes {
        if let (Some(disk), Some(api::volume::Medium::Disk(for_guest))) =
            (disk, volume.medium.as_mut())
        {
            shares.push(disk.serial.clone());
            let done = guest.disks.attach(disk, Sharing::ThisVm).await;
            let done = done.map_err(|error| {
                let what = format!("attach the disk of the emptyDir {}", volume.name);
                convert::driver(what, error)
            })?;
            for_guest.bind_device = done.bind_device.unwrap_or_default();
        }
        attached.push(volume);
    }
    Ok(attached)
}

async fn attach_block_devices(
    guest: &Guest,
    devices: Vec<BlockVolume>,
    shares: &mut Vec<DiskSerial>,
) -> Result<Vec<api::BlockDevice>, SandboxError> {
    let mut attached = Vec::with_capacity(devices.len());
    for BlockVolume { mut device, disk } in devices {
        device.bind_device = attach_shared(guest, disk, shares).await?;
        attached.push(device);
    }
    Ok(attached)
}

async fn attach_rootfs(
    guest: &Guest,
    rootfs: GuestRootfs,
    shares: &mut Vec<DiskSerial>,
) -> Result<api::create_container_request::Rootfs, SandboxError> {
    use api::create_container_request::Rootfs;
    match rootfs {
        GuestRootfs::Layered(layers) => {
            let mut attached = Vec::with_capacity(layers.len());
            for layer in layers {
                attached.push(attach(guest, layer, shares).await?);
            }
            Ok(Rootfs::Layered(api::LayeredRootfs {
                layers: attached,
                ..Default::default()
            }))
        }
        GuestRootfs::Disk(disk) => Ok(Rootfs::Disk(attach(guest, disk, shares).await?)),
    }
}

async fn attach(
    guest: &Guest,
    disk: GuestDisk,
    shares: &mut Vec<DiskSerial>,
) -> Result<api::Disk, SandboxError> {
    let serial = disk.disk.serial.to_string();
    Ok(api::Disk {
        serial,
        bind_device: attach_shared(guest, disk.disk, shares).await?,
        fs_type: disk.fs_type,
        mount_options: disk.mount_options,
        ..Default::default()
    })
}

/// Attaches a disk for as long as the container, and gives the device for the guest to bind.
async fn attach_shared(
    guest: &Guest,
    disk: Disk,
    shares: &mut Vec<DiskSerial>,
) -> Result<String, SandboxError> {
    let serial = disk.serial.clone();
    // Before the attachment, which goes on when this future is dropped.
    shares.push(serial.clone());
    let attached = guest.disks.attach(disk, Sharing::Anybody).await;
    let attached =
        attached.map_err(|error| convert::driver(format!("attach disk {serial}"), error))?;
    Ok(attached.bind_device.unwrap_or_default())
}

/// Kills a container that nobody has been told of, and removes it.
async fn discard(guest: &Guest, container: &ContainerId, generation: Generation) {
    let init = ProcessId::init(container.clone());
    let kill = signal_request(&init, generation, 9, KillScope::All);
    // It may have ended, or never been there.
    drop(guest.agent.signal(&kill).await);
    remove_container(guest, container).await;
}
