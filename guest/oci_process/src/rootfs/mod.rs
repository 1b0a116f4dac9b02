// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The container's root: its mounts and devices, and the way into it.
//!
//! Called once by the container's init, in a mount namespace of its own, before any code of the container has run. All
//! mounts are made detached, with their attributes already set, and attached to a place that `openat2(2)` has found
//! inside the root: nothing in an image can lead a mount out of it.

mod devices;
mod inside;
mod mounts;
mod options;
mod restrict;

use std::path::Path;

use oci_spec::runtime::Spec;
use rustix::mount::{
    MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount,
};

pub(crate) use inside::Root;
pub(crate) use mounts::{bind_over, open_in_new_root};
pub(crate) use restrict::restrict;

use crate::Error;
use crate::error::Context as _;
use crate::sys::{AttributeChange, mount_setattr};

/// Builds everything below `rootfs` that `spec` asks for. The caller's mount namespace is its own.
///
/// # Errors
/// [`Error`] for the first mount or device that cannot be made.
pub(crate) fn build(spec: &Spec, rootfs: &Path) -> Result<Root, Error> {
    // Nothing made from here on is seen by other namespaces.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .step(|| "making the mounts private".to_owned())?;
    // pivot_root(2) wants a mount point, whatever the root file system is.
    let tree = open_tree(
        rustix::fs::CWD,
        rootfs,
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE,
    )
    .step(|| format!("opening the root file system {}", rootfs.display()))?;
    let place = inside::open_path(rootfs).step(|| format!("opening {}", rootfs.display()))?;
    mounts::attach(&tree, &place)
        .step(|| format!("mounting the root file system at {}", rootfs.display()))?;
    drop(place);
    let root = Root::new(tree);
    let read_only_after = mounts::mount_all(&root, spec.mounts().as_deref().unwrap_or_default())?;
    let own_dev = !spec.mounts().iter().flatten().any(|mount| {
        mount.destination() == Path::new("/dev") && mount.typ().as_deref() == Some("bind")
    });
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref());
    devices::make(&root, devices.unwrap_or_default(), own_dev)?;
    for mount in read_only_after {
        let change = AttributeChange {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Default::default()
        };
        mount_setattr(mount, change).step(|| "making /dev read-only".to_owned())?;
    }
    if let Some(process) = spec.process() {
        root.make_directory(process.cwd())?;
    }
    Ok(root)
}

/// Makes `root` the process's root and leaves the old one behind.
///
/// # Errors
/// [`Error::Step`].
pub(crate) fn enter(root: Root, propagation: Option<&str>) -> Result<(), Error> {
    rustix::process::fchdir(&root).step(|| "entering the root file system".to_owned())?;
    // The old root comes to lie over the new one and is then taken away: no directory for it is needed (pivot_root(2)).
    rustix::process::pivot_root(".", ".").step(|| "changing the root (pivot_root)".to_owned())?;
    unmount(".", UnmountFlags::DETACH).step(|| "leaving the old root".to_owned())?;
    rustix::process::chdir("/").step(|| "entering the new root".to_owned())?;
    let Some(word) = propagation.filter(|word| !word.is_empty()) else {
        return Ok(());
    };
    let (kind, recursive) = options::propagation(word).ok_or_else(|| {
        Error::invalid("linux.rootfsPropagation", format!("{word:?} is not known"))
    })?;
    let change = AttributeChange {
        propagation: kind,
        recursive,
        ..Default::default()
    };
    mount_setattr(&root, change).step(|| format!("making the root {word}"))
}
