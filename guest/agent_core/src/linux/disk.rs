// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Disks: found by serial number, mounted once for all containers that use them, let go with the last. One whose device
//! file containers have is not mounted.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_proto::layout;
use ids::DiskSerial;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use super::mount::{mount_filesystem, unmount};
use crate::Error;
use crate::block_plan::BlockDevicePlan;
use crate::error::Context as _;
use crate::plan::DiskPlan;

/// How long a disk may take to show up. Its slot is filled before the agent is asked, so that this is a probe's time.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);

const BLOCK: &str = "/sys/block";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// The disks in use.
#[derive(Debug, Default)]
pub(super) struct Disks {
    slots: Mutex<HashMap<DiskSerial, Slot>>,
    changed: Condvar,
}

#[derive(Debug)]
enum Slot {
    /// One thread is taking it or letting it go; others wait.
    Busy,
    Taken(Taken),
}

#[derive(Debug)]
struct Taken {
    users: usize,
    mounted: bool,
    bind_device: Option<String>,
}

impl Disks {
    /// The place where the disk is mounted, read-only, with one more user. Every call wants one of [`Self::release`].
    ///
    /// # Errors
    /// [`Error::NoDisk`], or why it cannot be mounted.
    pub(super) fn acquire(&self, disk: &DiskPlan) -> Result<PathBuf, Error> {
        let place = place(&disk.serial);
        if self.join(&disk.serial) {
            return Ok(place);
        }
        let mounted = mount(disk, &place, true);
        self.settle(
            &disk.serial,
            disk.bind_device.as_deref(),
            mounted.is_ok(),
            true,
        );
        mounted.map(|()| place)
    }

    /// The number of the disk's device file, with one more user. Every call wants one of [`Self::release`].
    ///
    /// # Errors
    /// [`Error::NoDisk`], or why its device cannot be had.
    pub(super) fn acquire_device(&self, device: &BlockDevicePlan) -> Result<(u32, u32), Error> {
        let joined = self.join(&device.serial);
        let found = find(&device.serial, device.bind_device.as_deref())
            .and_then(|path| fs::metadata(&path).step(|| format!("looking at {}", path.display())));
        match (joined, &found) {
            (false, _) => {
                let bind_device = device.bind_device.as_deref();
                self.settle(&device.serial, bind_device, found.is_ok(), false);
            }
            // Its user is none after all.
            (true, Err(_)) => self.release(&device.serial)?,
            (true, Ok(_)) => {}
        }
        found.map(|metadata| (major(metadata.rdev()), minor(metadata.rdev())))
    }

    /// Ends what [`Self::join`] has begun for the first user.
    fn settle(&self, serial: &DiskSerial, bind_device: Option<&str>, done: bool, mounted: bool) {
        if let (false, Some(device)) = (done, bind_device) {
            // What failed before is the error to tell.
            let _ = unbind(device);
        }
        let mut slots = self.lock();
        if done {
            let taken = Taken {
                users: 1,
                mounted,
                bind_device: bind_device.map(str::to_owned),
            };
            slots.insert(serial.clone(), Slot::Taken(taken));
        } else {
            slots.remove(serial);
        }
        drop(slots);
        self.changed.notify_all();
    }

    /// One user less; the last one's leaving unmounts the disk and lets its device go.
    ///
    /// # Errors
    /// [`Error::Step`] if it cannot be unmounted.
    pub(super) fn release(&self, serial: &DiskSerial) -> Result<(), Error> {
        let taken = {
            let mut slots = self.lock();
            match slots.get_mut(serial) {
                Some(Slot::Taken(taken)) if taken.users > 1 => {
                    taken.users = taken.users.saturating_sub(1);
                    return Ok(());
                }
                Some(slot @ Slot::Taken(_)) => match std::mem::replace(slot, Slot::Busy) {
                    Slot::Taken(taken) => taken,
                    Slot::Busy => return Ok(()),
                },
                _ => return Ok(()),
            }
        };
        let unmounted = if taken.mounted {
            let place = place(serial);
            unmount(&place).inspect(|()| {
                let _ = fs::remove_dir(&place);
            })
        } else {
            Ok(())
        };
        let released = unmounted.and_then(|()| taken.bind_device.as_deref().map_or(Ok(()), unbind));
        self.lock().remove(serial);
        self.changed.notify_all();
        released
    }

    /// Takes part in a disk that is taken; `false`: the caller is the one to take it.
    fn join(&self, serial: &DiskSerial) -> bool {
        let mut slots = self.lock();
        loop {
            match slots.get_mut(serial) {
                None => {
                    slots.insert(serial.clone(), Slot::Busy);
                    return false;
                }
                Some(Slot::Taken(taken)) => {
                    taken.users = taken.users.saturating_add(1);
                    return true;
                }
                Some(Slot::Busy) => {
                    slots = self
                        .changed
                        .wait(slots)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DiskSerial, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(serial: &DiskSerial) -> PathBuf {
    Path::new(layout::RUN_DIR)
        .join("disks")
        .join(serial.as_str())
}

/// Mounts a disk at `place`, which is made.
///
/// # Errors
/// [`Error::NoDisk`], or why it cannot be mounted.
pub(super) fn mount(disk: &DiskPlan, place: &Path, read_only: bool) -> Result<(), Error> {
    let device = find(&disk.serial, disk.bind_device.as_deref())?;
    fs::create_dir_all(place).step(|| format!("making {}", place.display()))?;
    mount_filesystem(disk.fs_type, Some(&device), &disk.options, place, read_only).map_err(
        |error| Error::Step {
            step: format!("mounting the disk {} ({})", disk.serial, disk.fs_type),
            source: std::io::Error::other(error.chain()),
        },
    )
}

/// Lets a device go, so that the host can take the disk away.
///
/// # Errors
/// [`Error::Step`]; a device that is not bound is none.
pub(super) fn unbind(device: &str) -> Result<(), Error> {
    match fs::write(Path::new(DRIVER).join("unbind"), device) {
        Err(error) if is_bound(device) => {
            Err(error).step(|| format!("unbinding the device {device}"))
        }
        _ => Ok(()),
    }
}

/// Makes the kernel look at a slot that was empty when it booted.
///
/// # Errors
/// [`Error::Step`]; a device that is bound is none.
pub(super) fn bind_slot(device: &str) -> Result<(), Error> {
    match fs::write(Path::new(DRIVER).join("bind"), device) {
        Err(error) if !is_bound(device) => {
            Err(error).step(|| format!("binding the device {device}"))
        }
        _ => Ok(()),
    }
}

fn is_bound(device: &str) -> bool {
    Path::new(DRIVER).join(device).exists()
}

/// The device file of a disk, which is bound first and waited for.
fn find(serial: &DiskSerial, bind_device: Option<&str>) -> Result<PathBuf, Error> {
    if bind_device.is_none_or(is_bound)
        && let Some(device) = scan(serial)
    {
        return Ok(device);
    }
    // Listen first: what comes between the look and the wait is then heard.
    let events = listen().step(|| "listening for new devices".to_owned())?;
    if let Some(device) = bind_device {
        bind_slot(device)?;
    }
    let deadline = Instant::now().checked_add(APPEAR_LIMIT);
    loop {
        if let Some(device) = scan(serial) {
            return Ok(device);
        }
        let left = deadline.and_then(|deadline| deadline.checked_duration_since(Instant::now()));
        let Some(left) = left.and_then(|left| Timespec::try_from(left).ok()) else {
            return Err(Error::NoDisk {
                serial: serial.to_string(),
                seconds: APPEAR_LIMIT.as_secs(),
            });
        };
        wait(&events, &left).step(|| "listening for new devices".to_owned())?;
    }
}

/// Looks through the disks that there are.
fn scan(serial: &DiskSerial) -> Option<PathBuf> {
    fs::read_dir(BLOCK).ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        (found.trim_end_matches(['\n', '\0']) == serial.as_str())
            .then(|| Path::new("/dev").join(entry.file_name()))
    })
}

fn listen() -> rustix::io::Result<OwnedFd> {
    let events = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(KOBJECT_UEVENT),
    )?;
    // Group 1: the kernel's own events.
    bind(&events, &SocketAddrNetlink::new(0, 1))?;
    Ok(events)
}

/// Waits for an event of any kind, and takes all that are there.
fn wait(events: impl AsFd, limit: &Timespec) -> rustix::io::Result<()> {
    poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(limit))?;
    let mut buffer = [0_u8; 4096];
    loop {
        match recv(&events, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
