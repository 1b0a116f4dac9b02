// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The disks of a running VM, counted: containers of one image share one disk.
//!
//! One task does one attachment or detachment at a time, so that two containers that need the same image at once get
//! one disk, and nobody holds a mutex while the VMM works. It ends when the last [`Disks`] is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use hypervisor::{AttachedDisk, Disk, DriverError, DriverErrorKind, RunningVm};
use ids::DiskSerial;
use tokio::sync::{mpsc, oneshot};

/// Attaches and detaches. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Disks {
    wishes: mpsc::UnboundedSender<Wish>,
}

enum Wish {
    Attach(
        Disk,
        Sharing,
        oneshot::Sender<Result<AttachedDisk, DriverError>>,
    ),
    Detach(DiskSerial, oneshot::Sender<()>),
}

/// Who may use a disk's file at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Whoever wants to.
    Anybody,
    /// This VM alone: the file is locked until the VM has ended, for the lock is the open file's.
    ThisVm,
}

struct Attached {
    disk: AttachedDisk,
    users: usize,
}

fn gone() -> DriverError {
    DriverError::new(DriverErrorKind::Gone, "the VM has ended")
}

impl Disks {
    pub(crate) fn new(vm: Arc<dyn RunningVm>) -> Self {
        let (wishes, mut received) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut attached = BTreeMap::new();
            while let Some(wish) = received.recv().await {
                // A caller that has gone away has given up on the answer only.
                match wish {
                    Wish::Attach(disk, sharing, reply) => {
                        drop(reply.send(attach(&*vm, &mut attached, disk, sharing).await));
                    }
                    Wish::Detach(serial, reply) => {
                        detach(&*vm, &mut attached, &serial).await;
                        let _gone = reply.send(());
                    }
                }
            }
        });
        Self { wishes }
    }

    /// Attaches a disk, or takes a share in the one that has its serial. Each call wants one [`Self::detach`], also one
    /// that was given up.
    pub(crate) async fn attach(
        &self,
        disk: Disk,
        sharing: Sharing,
    ) -> Result<AttachedDisk, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.wishes
            .send(Wish::Attach(disk, sharing, reply))
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Gives a share back; the last one detaches the disk, which the guest must have let go of.
    pub(crate) async fn detach(&self, serial: DiskSerial) {
        let (reply, answer) = oneshot::channel();
        if self.wishes.send(Wish::Detach(serial, reply)).is_ok() {
            // An error means that the VM is gone, and the disk with it.
            drop(answer.await);
        }
    }
}

async fn attach(
    vm: &dyn RunningVm,
    attached: &mut BTreeMap<DiskSerial, Attached>,
    disk: Disk,
    sharing: Sharing,
) -> Result<AttachedDisk, DriverError> {
    if let Some(shared) = attached.get_mut(&disk.serial) {
        shared.users = shared.users.saturating_add(1);
        return Ok(shared.disk.clone());
    }
    if sharing == Sharing::ThisVm
        && let Err(error) = disk.file.try_lock()
    {
        let message = "its disk is in use by another VM: wait until that has ended";
        let error = std::io::Error::from(error);
        return Err(DriverError::new(DriverErrorKind::Conflict, message).because(error));
    }
    let disk = vm.attach_disk(disk).await?;
    let entry = Attached {
        disk: disk.clone(),
        users: 1,
    };
    attached.insert(disk.serial.clone(), entry);
    Ok(disk)
}

async fn detach(
    vm: &dyn RunningVm,
    attached: &mut BTreeMap<DiskSerial, Attached>,
    serial: &DiskSerial,
) {
    let Some(shared) = attached.get_mut(serial) else {
        return;
    };
    shared.users = shared.users.saturating_sub(1);
    if shared.users > 0 {
        return;
    }
    attached.remove(serial);
    if let Err(error) = vm.detach_disk(serial).await
        && error.kind() != DriverErrorKind::Gone
    {
        tracing::warn!(serial = serial.as_str(), %error, "a disk stays attached until the VM ends");
    }
}
