// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! PID 1's own work: the guest's mounts at the start, and its end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use agent_proto::layout;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::cgroup;
use super::mount::mount_filesystem;
use crate::Error;
use crate::error::Context as _;

/// Where the new root is put together, in the initramfs.
const NEW_ROOT: &str = "/newroot";

/// The part of the guest's memory that each processor may keep on its own list of free pages is one in so many. Left alone
/// that grows to 8 MiB in a small guest, and free page reporting does not see those pages: the host never has them back.
const PER_CPU_FREE_PAGES: (&str, &str) = ("/proc/sys/vm/percpu_pagelist_high_fraction", "1024");

/// What containers may have open if their spec does not say: systemd's default for services (`DefaultLimitNOFILE=`), and so
/// what containerd hands on to containers of runc's. The kernel's own, 4096 at most, is too little for many a database.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

/// File system, place in the new root, options.
const MOUNTS: [(&str, &str, &[&str]); 8] = [
    ("proc", "proc", &[]),
    ("sysfs", "sys", &[]),
    ("devtmpfs", "dev", &[]),
    (
        "devpts",
        "dev/pts",
        &["mode=0620", "ptmxmode=0666", "gid=5"],
    ),
    ("mqueue", "dev/mqueue", &[]),
    ("tmpfs", "run", &["mode=0755"]),
    ("tmpfs", "tmp", &["mode=1777"]),
    ("cgroup2", "sys/fs/cgroup", &["nsdelegate"]),
];

/// Puts the guest's file systems together and moves into them. The initramfs itself cannot be left by `pivot_root(2)`, so
/// containers need a root above it; the agent's program stays reachable through `/proc/self/exe`.
///
/// # Errors
/// [`Error::Step`]; the guest is then of no use.
pub fn set_up() -> Result<(), Error> {
    let root = Path::new(NEW_ROOT);
    let options = |list: &[&str]| {
        list.iter()
            .map(|option| (*option).to_owned())
            .collect::<Vec<_>>()
    };
    make_directory(root)?;
    mount_filesystem("tmpfs", None, &options(&["mode=0755"]), root, false)?;
    for (kind, place, list) in MOUNTS {
        let place = root.join(place);
        make_directory(&place)?;
        mount_filesystem(kind, None, &options(list), &place, false)?;
    }
    let step = || "moving into the new root".to_owned();
    rustix::process::chdir(root).step(step)?;
    rustix::mount::mount_move(".", "/").step(step)?;
    rustix::process::chroot(".").step(step)?;
    rustix::process::chdir("/").step(step)?;
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        symlink(target, Path::new("/dev").join(link)).step(|| format!("making /dev/{link}"))?;
    }
    let (parameter, fraction) = PER_CPU_FREE_PAGES;
    fs::write(parameter, fraction).step(|| format!("writing {parameter}"))?;
    // How many processes there may be is for `pids.max` to say: the kernel's own limit for each user is made of the memory
    // that the guest began with. containerd's unit has none either.
    let no_limit = Rlimit {
        current: None,
        maximum: None,
    };
    for (resource, limit) in [(Resource::Nofile, OPEN_FILES), (Resource::Nproc, no_limit)] {
        setrlimit(resource, limit).step(|| format!("setting {resource:?}"))?;
    }
    set_up_agent()
}

/// The agent's own folders and cgroup, below mounts that are there.
///
/// # Errors
/// [`Error::Step`].
pub fn set_up_agent() -> Result<(), Error> {
    for folder in ["containers", "disks", "scratch", "shm"] {
        make_directory(&Path::new(layout::RUN_DIR).join(folder))?;
    }
    mount_filesystem(
        "tmpfs",
        None,
        &["mode=1777".to_owned()],
        Path::new(layout::SHM_DIR),
        false,
    )?;
    cgroup::enable_controllers(Path::new(cgroup::MOUNT))?;
    make_directory(Path::new(cgroup::PARENT))?;
    cgroup::enable_controllers(Path::new(cgroup::PARENT))?;
    // The last to go: without the agent the VM is of no use. Its children get a value of their own.
    fs::write("/proc/self/oom_score_adj", "-1000")
        .step(|| "protecting the agent from the OOM killer".to_owned())?;
    oci_process::loopback_up().step(|| "bringing the loopback interface up".to_owned())
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).step(|| format!("making {}", path.display()))
}

/// Gives the pod's shared memory its size.
///
/// # Errors
/// [`Error::Step`].
pub(super) fn resize_shm(bytes: u64) -> Result<(), Error> {
    let options = std::ffi::CString::new(format!("size={bytes},mode=1777")).unwrap_or_default();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount_remount(layout::SHM_DIR, flags, options.as_c_str())
        .step(|| format!("giving {} {bytes} bytes", layout::SHM_DIR))
}

/// Writes everything back and ends the VM. The kernel is told to reboot, which the VMM takes for the end (`reboot=t`); a
/// process that is not PID 1 ends itself instead.
pub fn power_off() {
    if std::process::id() != 1 {
        std::process::exit(0);
    }
    // Volumes may still have unwritten data; what is unmounted need not be checked by the next user.
    rustix::fs::sync();
    let _ = rustix::mount::unmount(layout::SCRATCH_DIR, UnmountFlags::DETACH);
    if rustix::system::reboot(rustix::system::RebootCommand::Restart).is_err() {
        // PID 1's end is a kernel panic, which reboots too (`panic=-1`).
        std::process::exit(1);
    }
}
