// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The real machine: the guest's kernel.

pub mod boot;
mod cgroup;
mod copied;
mod cpuset;
mod device_program;
mod disk;
mod host_folders;
mod huge_pages;
mod mount;
pub mod network;
mod pause;
mod process;
mod put;
pub mod reaper;
mod resources;
mod volume;
mod watch;

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use agent_proto::layout;
use ids::{ContainerId, DiskSerial};
use oci_process::Streams;
use oci_spec::runtime::LinuxResources;
use rustix::process::{Signal, pidfd_send_signal};
use rustix::time::{ClockId, Timespec};

pub use process::HELPER_ARGUMENT;
pub use watch::MemoryWatch;

use crate::Error;
use crate::error::Context as _;
use crate::plan::{ContainerPlan, DiskPlan, RootfsPlan, SandboxPlan};
use crate::system::{FileEnd, Files, Job, Launched, System};
use crate::volume_plan::PutPlan;

/// The guest.
#[derive(Debug)]
pub struct Linux {
    disks: disk::Disks,
    /// What each container has taken of the disks.
    taken: Mutex<HashMap<ContainerId, Taken>>,
    volumes: volume::Volumes,
    host_folders: host_folders::HostFolders,
    puts: put::Puts,
    pause: pause::Pause,
    memory: MemoryWatch,
}

#[derive(Debug, Default)]
struct Taken {
    shared: Vec<DiskSerial>,
    own_device: Option<String>,
    huge_pages: Vec<huge_pages::Reserved>,
}

impl Linux {
    /// The machine, whose containers' memory events go to `memory`.
    pub fn new(memory: MemoryWatch) -> Self {
        Self {
            disks: disk::Disks::default(),
            taken: Mutex::default(),
            volumes: volume::Volumes::default(),
            host_folders: host_folders::HostFolders::default(),
            puts: put::Puts::default(),
            pause: pause::Pause::default(),
            memory,
        }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mount_rootfs(&self, id: &ContainerId, rootfs: &RootfsPlan) -> Result<(), Error> {
        let place = PathBuf::from(layout::rootfs(id));
        fs::create_dir_all(&place).step(|| format!("making {}", place.display()))?;
        let layers = match rootfs {
            RootfsPlan::Disk(disk) => {
                let read_only =
                    disk.fs_type == "erofs" || disk.options.iter().any(|option| option == "ro");
                self.taken()
                    .entry(id.clone())
                    .or_default()
                    .own_device
                    .clone_from(&disk.bind_device);
                return disk::mount(disk, &place, read_only);
            }
            RootfsPlan::Layered(layers) => layers,
        };
        let lower = layers
            .iter()
            .map(|layer| self.take_layer(id, layer))
            .collect::<Result<Vec<_>, _>>()?;
        let writable = writable_layer(id);
        let (upper, work) = (writable.join("upper"), writable.join("work"));
        for directory in [&upper, &work] {
            fs::create_dir_all(directory).step(|| format!("making {}", directory.display()))?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
                .step(|| format!("making {}", directory.display()))?;
        }
        mount::mount_overlay(
            &lower,
            &upper.to_string_lossy(),
            &work.to_string_lossy(),
            &place,
        )
    }

    fn reserve_huge_pages(
        &self,
        id: &ContainerId,
        resources: Option<&LinuxResources>,
    ) -> Result<(), Error> {
        let limits = resources.and_then(|resources| resources.hugepage_limits().as_deref());
        let mut reserved = Vec::new();
        let result = huge_pages::reserve(limits.unwrap_or_default(), &mut reserved);
        if !reserved.is_empty() {
            self.taken().entry(id.clone()).or_default().huge_pages = reserved;
        }
        result
    }

    fn take_layer(&self, id: &ContainerId, layer: &DiskPlan) -> Result<String, Error> {
        let place = self.disks.acquire(layer)?;
        self.taken()
            .entry(id.clone())
            .or_default()
            .shared
            .push(layer.serial.clone());
        Ok(place.to_string_lossy().into_owned())
    }
}

fn writable_layer(id: &ContainerId) -> PathBuf {
    Path::new(layout::SCRATCH_DIR)
        .join("containers")
        .join(id.as_str())
}

impl Files for Linux {
    fn put(&self, plan: &PutPlan) -> Result<(), Error> {
        self.puts.put(plan)
    }

    fn read_copied(
        &self,
        container: &ContainerId,
        index: u32,
        max: usize,
    ) -> Result<FileEnd, Error> {
        copied::read_end(Path::new(&layout::copied_mount(container, index)), max)
    }
}

impl System for Linux {
    fn configure(&self, plan: &SandboxPlan) -> Result<(), Error> {
        if let Some(name) = &plan.hostname {
            rustix::system::sethostname(name.as_bytes())
                .step(|| format!("setting the hostname {name}"))?;
        }
        if plan.wall_clock_ns != 0 {
            self.set_clock(plan.wall_clock_ns)?;
        }
        if plan.shm_bytes != 0 {
            boot::resize_shm(plan.shm_bytes)?;
        }
        // Before the sysctls, some of which are a card's.
        network::configure(&plan.network)?;
        for (key, value) in &plan.sysctls {
            oci_process::write_sysctl(key, value)?;
        }
        let scratch = Path::new(layout::SCRATCH_DIR);
        match &plan.scratch {
            Some(disk) => disk::mount(disk, scratch, false)?,
            // The folder is on the agent's tmpfs already.
            None => fs::create_dir_all(scratch).step(|| format!("making {}", scratch.display()))?,
        }
        for folder in ["containers", "volumes"] {
            let folder = scratch.join(folder);
            fs::create_dir_all(&folder).step(|| format!("making {}", folder.display()))?;
        }
        Ok(())
    }

    fn make_container(&self, plan: &ContainerPlan) -> Result<(), Error> {
        let id = &plan.key.container;
        self.mount_rootfs(id, &plan.rootfs)?;
        for (index, entries) in &plan.copied {
            copied::write(Path::new(&layout::copied_mount(id, *index)), entries)?;
        }
        for volume in &plan.volumes {
            self.volumes.make(volume, &volume.place())?;
        }
        for part in &plan.sub_paths {
            volume::mount_part(part, Path::new(&layout::sub_path(id, part.index)))?;
        }
        if let Some(folders) = &plan.host_folders {
            self.host_folders.make(folders)?;
        }
        let resources = plan
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        self.reserve_huge_pages(id, resources)?;
        cgroup::make(id, resources)?;
        let directory = cgroup::directory(id);
        let cgroup =
            fs::File::open(&directory).step(|| format!("opening {}", directory.display()))?;
        let rules = resources
            .and_then(|resources| resources.devices().as_deref())
            .unwrap_or_default();
        device_program::attach(&cgroup, rules)?;
        self.memory.add(id, &directory);
        Ok(())
    }

    fn launch(&self, job: Job<'_>, streams: Streams) -> Result<Box<dyn Launched>, Error> {
        process::launch(job, streams, &self.pause)
    }

    fn signal(&self, process: &OwnedFd, signal: u32) -> Result<(), Error> {
        let signal = to_signal(signal)?;
        match pidfd_send_signal(process, signal) {
            Err(rustix::io::Errno::SRCH) => Err(Error::NotFound {
                what: "process",
                id: "that has ended".to_owned(),
            }),
            other => other.step(|| "sending a signal".to_owned()),
        }
    }

    fn signal_all(&self, container: &ContainerId, signal: u32) -> Result<(), Error> {
        if signal == libc::SIGKILL.unsigned_abs() {
            return cgroup::kill(container);
        }
        let signal = to_signal(signal)?;
        for pid in cgroup::processes(container)? {
            let Some(pid) = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
            else {
                continue;
            };
            match rustix::process::kill_process(pid, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                other => other.step(|| format!("sending a signal to a process of {container}"))?,
            }
        }
        Ok(())
    }

    fn processes(&self, container: &ContainerId) -> Result<Vec<u32>, Error> {
        cgroup::processes(container)
    }

    fn oom_kills(&self, container: &ContainerId) -> u64 {
        cgroup::oom_kills(container)
    }

    fn remove_container(&self, id: &ContainerId) -> Result<(), Error> {
        cgroup::remove(id)?;
        mount::unmount(Path::new(&layout::rootfs(id)))?;
        volume::unmount_parts(Path::new(&layout::sub_paths_dir(id)))?;
        for directory in [writable_layer(id), PathBuf::from(layout::container_dir(id))] {
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.step(|| format!("removing {}", directory.display()))?,
            }
        }
        let taken = self.taken().remove(id).unwrap_or_default();
        huge_pages::release(&taken.huge_pages)?;
        taken.own_device.as_deref().map_or(Ok(()), disk::unbind)?;
        taken
            .shared
            .iter()
            .map(|serial| self.disks.release(serial))
            .fold(Ok(()), Result::and)
    }

    fn set_clock(&self, wall_clock_ns: u64) -> Result<(), Error> {
        let time = Timespec::try_from(std::time::Duration::from_nanos(wall_clock_ns));
        let time = time.map_err(|_| Error::Internal("setting a clock beyond its end"))?;
        rustix::time::clock_settime(ClockId::Realtime, time).step(|| "setting the clock".to_owned())
    }

    fn power_off(&self) {
        boot::power_off();
    }
}

fn to_signal(number: u32) -> Result<Signal, Error> {
    let raw = i32::try_from(number).unwrap_or(0);
    match Signal::from_named_raw(raw) {
        Some(signal) => Ok(signal),
        None if (32..=64).contains(&raw) => {
            #[expect(
                unsafe_code,
                reason = "rustix has no checked constructor for realtime signals"
            )]
            // SAFETY: 32 to 64 are the kernel's realtime signals, valid to send.
            Ok(unsafe { Signal::from_raw_unchecked(raw) })
        }
        None => Err(Error::bad(
            "signal",
            format!("is {number}, 1 to 64 are signals"),
        )),
    }
}
