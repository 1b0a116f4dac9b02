// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The jail: what the process may once the guest runs. Every step fails closed.
//!
//! Order, each step while the one before still allows it:
//! 1. at start: no descriptors but standard input to error, death with the shim;
//! 2. with the configuration: resource limits, namespaces of its own, an empty read-only root;
//! 3. no capabilities in the bounding set, an unprivileged user, no capabilities at all, no new privileges;
//! 4. per thread, before the guest's first instruction: its seccomp filter.
//!
//! Credentials belong to threads, so steps 1 to 3 come while there is one thread; those that it starts inherit them.
#![expect(unsafe_code, reason = "close_range and unshare have no safe wrapper")]

use std::ffi::CStr;
use std::io;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use seccomp_filters::ThreadRole;

use crate::VmmError;
use crate::control::JailConfig;

/// Descriptors: a thousand vsock streams, and what a VM with all its devices has.
const MAX_DESCRIPTORS: u64 = 2048;
/// First descriptor that is not standard.
const FIRST_DESCRIPTOR: libc::c_uint = 3;
/// Where the empty root is mounted before it becomes the root; any folder that every host has.
const MOUNT_POINT: &str = "/proc";
/// The empty root: one page, one inode, and nothing can be made in it.
const ROOT_OPTIONS: &CStr = c"size=4k,nr_inodes=1,mode=555";

fn failed(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> VmmError {
    move |error| VmmError::Jail {
        step,
        source: error.into(),
    }
}

/// Closes what was inherited by mistake, and makes sure that the process does not outlive its shim.
///
/// # Errors
/// [`VmmError::Jail`] names the step.
pub fn at_start() -> Result<(), VmmError> {
    // SAFETY: nothing in this process has opened a descriptor yet, so none is owned by anyone.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_DESCRIPTOR,
            libc::c_uint::MAX,
            0,
        )
    };
    if closed != 0 {
        return Err(VmmError::Jail {
            step: "close inherited descriptors",
            source: io::Error::last_os_error(),
        });
    }
    die_with_the_shim()
}

/// The kernel forgets this when credentials change.
fn die_with_the_shim() -> Result<(), VmmError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("tie the VMM to its shim"))
}

/// Closes the jail around the process, which must have one thread.
///
/// # Errors
/// [`VmmError::Jail`] names the step.
pub(crate) fn enter(config: &JailConfig) -> Result<(), VmmError> {
    if config.uid == 0 || config.gid == 0 {
        return Err(VmmError::Config {
            reason: "the VMM's user and group must not be root's".to_owned(),
        });
    }
    limit_resources()?;
    separate_namespaces()?;
    empty_root()?;
    drop_privileges(config)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("forbid core dumps and tracing"))?;
    die_with_the_shim()
}

fn limit_resources() -> Result<(), VmmError> {
    let limits = [
        (Resource::Nofile, MAX_DESCRIPTORS),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ];
    for (resource, limit) in limits {
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        rustix::process::setrlimit(resource, limit).map_err(failed("limit resources"))?;
    }
    Ok(())
}

fn separate_namespaces() -> Result<(), VmmError> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of these flags unshares descriptors or memory; the process has one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("make namespaces"))
}

/// An empty tmpfs becomes the root, and the host's mounts go.
fn empty_root() -> Result<(), VmmError> {
    let step = "empty the root";
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed(step))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount("none", MOUNT_POINT, "tmpfs", flags, ROOT_OPTIONS)
        .map_err(failed(step))?;
    rustix::process::chdir(MOUNT_POINT).map_err(failed(step))?;
    // The new root lies over the old one for a moment (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").map_err(failed(step))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed(step))?;
    rustix::process::chdir("/").map_err(failed(step))?;
    match rustix::fs::statat(CWD, "/proc", rustix::fs::AtFlags::empty()) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        _ => Err(failed(step)(rustix::io::Errno::NOTEMPTY)),
    }
}

fn drop_privileges(config: &JailConfig) -> Result<(), VmmError> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel does not know the newest ones.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(failed("empty the capability bounding set")(error)),
        }
    }
    let step = "become an unprivileged user";
    let (uid, gid) = (Uid::from_raw(config.uid), Gid::from_raw(config.gid));
    rustix::thread::set_thread_groups(&[]).map_err(failed(step))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed(step))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed(step))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("drop all capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("forbid new privileges"))
}

fn confine(role: ThreadRole) -> Result<(), VmmError> {
    seccomp_filters::install(role).map_err(|error| VmmError::Jail {
        step: "install a thread's seccomp filter",
        source: io::Error::other(error),
    })
}

/// Confines the calling thread to what the I/O thread needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_io() -> Result<(), VmmError> {
    confine(ThreadRole::Io)
}

/// Confines the calling thread to what a vCPU needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_vcpu() -> Result<(), VmmError> {
    confine(ThreadRole::Vcpu)
}

/// Confines the calling thread to what a vCPU needs that is made while the guest runs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_spare_vcpu() -> Result<(), VmmError> {
    confine(ThreadRole::SpareVcpu)
}

/// Confines the calling thread to what the control thread needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_control() -> Result<(), VmmError> {
    confine(ThreadRole::Control)
}
