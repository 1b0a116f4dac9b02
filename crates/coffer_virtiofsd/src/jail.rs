// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The jail, but for the system call filter, which comes when all threads are there. Every step fails closed.
//!
//! Order: descriptors, limits, namespaces; `/proc/self/fd` alone of a procfs of the own PID namespace; an empty
//! read-only root; capabilities. Credentials belong to threads, so all of it comes while there is one.
#![expect(unsafe_code, reason = "close_range and unshare have no safe wrapper")]

use std::ffi::CStr;
use std::fs::File;
use std::io;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use crate::ServerError;

/// First descriptor that is not standard.
const FIRST_DESCRIPTOR: libc::c_uint = 3;
/// Every inode that the guest has looked up and not yet forgotten is a descriptor: room for a tree of 250,000 files.
/// Less where the host's hard limit is lower and may not be raised (CAP_SYS_RESOURCE); the guest then gets ENFILE earlier.
const MAX_DESCRIPTORS: u64 = 1 << 18;
/// Where procfs and the new root are mounted for a moment; any folder that every host has.
const MOUNT_POINT: &str = "/proc";
/// The root: inodes for itself and the mount points of 256 directories, no bytes to speak of.
const ROOT_OPTIONS: &CStr = c"size=64k,nr_inodes=257,mode=755";
/// No device, program or set-user-id file of the root has a meaning here.
const ROOT_FLAGS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// To serve files of any owner and mode, in the name of any user of the guest. No MKNOD, no SETFCAP, no SYS_ADMIN:
/// devices, file capabilities and `trusted` attributes cannot be made from inside a guest. No DAC_READ_SEARCH, with
/// which files could be opened by handle from outside the shared directories.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ServerError {
    move |error| ServerError::Jail {
        step,
        source: error.into(),
    }
}

/// What the process has left of the host.
pub(crate) struct Jail {
    /// Its `/proc/self/fd`, through which files are opened a second time.
    pub(crate) own_descriptors: File,
    /// How many descriptors it may have.
    pub(crate) max_descriptors: u64,
}

/// Closes the jail around the process.
///
/// # Errors
/// [`ServerError::Jail`] names the step.
pub(crate) fn enter() -> Result<Jail, ServerError> {
    close_inherited()?;
    die_with_the_shim()?;
    if !rustix::process::getpid().is_init() {
        return Err(failed("do without a PID namespace")(io::Error::from(
            io::ErrorKind::PermissionDenied,
        )));
    }
    let max_descriptors = limit_resources()?;
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of these flags unshares descriptors or memory; the process has one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("make namespaces"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("leave the host's mounts"))?;
    let own_descriptors = own_descriptors().map_err(failed("open its own descriptors' folder"))?;
    empty_root()?;
    drop_privileges()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("forbid core dumps and tracing"))?;
    die_with_the_shim()?;
    Ok(Jail {
        own_descriptors,
        max_descriptors,
    })
}

fn close_inherited() -> Result<(), ServerError> {
    // SAFETY: nothing in this process has opened a descriptor yet, so none is owned by anyone.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_DESCRIPTOR,
            libc::c_uint::MAX,
            0,
        )
    };
    match closed {
        0 => Ok(()),
        _ => Err(failed("close inherited descriptors")(
            io::Error::last_os_error(),
        )),
    }
}

fn die_with_the_shim() -> Result<(), ServerError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("tie itself to its shim"))
}

/// How many descriptors it may have.
fn limit_resources() -> Result<u64, ServerError> {
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    // Whoever started containerd may have given it few.
    let descriptors = match limit(Resource::Nofile, MAX_DESCRIPTORS) {
        Ok(()) => MAX_DESCRIPTORS,
        Err(_) => hard.map_or(MAX_DESCRIPTORS, |hard| hard.min(MAX_DESCRIPTORS)),
    };
    let limits = [
        (Resource::Nofile, descriptors),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ];
    for (resource, most) in limits {
        limit(resource, most).map_err(failed("limit resources"))?;
    }
    Ok(descriptors)
}

fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    rustix::process::setrlimit(resource, limit)
}

/// `/proc/self/fd` as a mount of its own, so that no `..` leads from it to the rest of procfs: this process is still the
/// host's root to `/proc/sys`.
fn own_descriptors() -> rustix::io::Result<File> {
    let proc = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&proc)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&proc, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let from_itself = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", CWD, MOUNT_POINT, from_itself)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let folder = rustix::mount::open_tree(CWD, "/proc/self/fd", clone)?;
    rustix::mount::unmount(MOUNT_POINT, UnmountFlags::DETACH)?;
    Ok(File::from(folder))
}

/// An empty tmpfs becomes the root, and the host's mounts go. This process may only read it; the shim, which has
/// CAP_SYS_ADMIN, makes mount points through a writable mount of the same tmpfs.
fn empty_root() -> Result<(), ServerError> {
    let step = "empty the root";
    rustix::mount::mount("none", MOUNT_POINT, "tmpfs", ROOT_FLAGS, ROOT_OPTIONS)
        .map_err(failed(step))?;
    rustix::process::chdir(MOUNT_POINT).map_err(failed(step))?;
    // The new root lies over the old one for a moment (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").map_err(failed(step))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed(step))?;
    rustix::process::chdir("/").map_err(failed(step))?;
    let read_only = ROOT_FLAGS | MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount("/", read_only, c"").map_err(failed(step))?;
    match rustix::fs::statat(CWD, MOUNT_POINT, rustix::fs::AtFlags::empty()) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        _ => Err(failed(step)(rustix::io::Errno::NOTEMPTY)),
    }
}

fn drop_privileges() -> Result<(), ServerError> {
    for capability in CapabilitySet::all().difference(CAPABILITIES).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel does not know the newest ones.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(failed("empty the capability bounding set")(error)),
        }
    }
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave its groups"))?;
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("forbid new privileges"))
}
