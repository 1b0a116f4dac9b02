// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The mounts of a spec, in its order.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Mount;
use rustix::fs::{FileType, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::inside::{Links, Root, open_path};
use super::options::{Bind, MountOptions};
use crate::Error;
use crate::error::Context as _;
use crate::sys::{AttributeChange, mount_setattr};

/// Makes all `mounts`. A read-only `/dev` is given back, writable, to be made read-only when its devices are in it.
///
/// # Errors
/// [`Error`] for the first that cannot be made.
pub(super) fn mount_all(root: &Root, mounts: &[Mount]) -> Result<Vec<OwnedFd>, Error> {
    let mut read_only_after = Vec::new();
    for mount in mounts {
        let place = mount.destination();
        if !place.is_absolute() {
            return Err(Error::invalid(
                format!("mounts[{}].destination", place.display()),
                "is not an absolute path",
            ));
        }
        let words = mount.options().iter().flatten().map(String::as_str);
        let mut options = MountOptions::parse(mount.typ().as_deref(), words);
        let late = place == Path::new("/dev")
            && options.bind.is_none()
            && options.set & libc::MOUNT_ATTR_RDONLY != 0;
        if late {
            options.set &= !libc::MOUNT_ATTR_RDONLY;
        }
        let mounted = mount_one(root, mount, &options)?;
        if late {
            read_only_after.push(mounted);
        }
    }
    Ok(read_only_after)
}

fn mount_one(root: &Root, mount: &Mount, options: &MountOptions) -> Result<OwnedFd, Error> {
    let place = mount.destination();
    let (tree, directory) = match options.bind {
        Some(bind) => bind_tree(mount, options, bind)?,
        None => (new_tree(mount, options)?, true),
    };
    let name = || format!("mounting {}", describe(mount));
    let plain = AttributeChange {
        set: options.set,
        clear: options.clear,
        ..Default::default()
    };
    let recursive = AttributeChange {
        set: options.recursive_set,
        clear: options.recursive_clear,
        recursive: true,
        ..Default::default()
    };
    for change in [plain, recursive] {
        if change.set | change.clear != 0 {
            mount_setattr(&tree, change).step(name)?;
        }
    }
    let target = if !directory {
        root.make_file(place)?
    } else if matches!(mount.typ().as_deref(), Some("proc" | "sysfs")) {
        root.make_directory_with(place, Links::Refused)?
    } else {
        root.make_directory(place)?
    };
    attach(&tree, &target).step(name)?;
    if let Some((propagation, recursive)) = options.propagation {
        let change = AttributeChange {
            propagation,
            recursive,
            ..Default::default()
        };
        mount_setattr(&tree, change).step(name)?;
    }
    Ok(tree)
}

/// Puts the detached `tree` at `target`.
///
/// # Errors
/// Those of `move_mount(2)`.
pub(super) fn attach(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    move_mount(
        tree,
        c"",
        target,
        c"",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// A detached copy of the mount at the source, and whether it is a directory.
fn bind_tree(mount: &Mount, options: &MountOptions, bind: Bind) -> Result<(OwnedFd, bool), Error> {
    let name = || format!("mounting {}", describe(mount));
    if let Some((key, _)) = options.data.first() {
        return Err(Error::invalid(
            format!("mounts[{}].options", mount.destination().display()),
            format!("has {key:?}, which means nothing for a bind mount"),
        ));
    }
    let source = mount.source().as_deref().ok_or_else(|| {
        Error::invalid(
            format!("mounts[{}].source", mount.destination().display()),
            "is missing",
        )
    })?;
    let source = open_path(source).step(name)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&source).step(name)?.st_mode);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if bind == Bind::Recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(&source, c"", flags).step(name)?;
    Ok((tree, kind == FileType::Directory))
}

/// A detached mount of a new file system.
fn new_tree(mount: &Mount, options: &MountOptions) -> Result<OwnedFd, Error> {
    let kind = match mount.typ().as_deref() {
        // The guest has cgroup v2 alone; runc mounts it under the old name too.
        Some("cgroup") => "cgroup2",
        Some(kind) if !kind.is_empty() && kind != "none" => kind,
        _ => {
            return Err(Error::invalid(
                format!("mounts[{}].type", mount.destination().display()),
                "is missing, and the mount is no bind mount",
            ));
        }
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .step(|| format!("mounting {}: file system {kind}", describe(mount)))?;
    let configured = configure(&context, mount, options);
    configured.map_err(|error| match kernel_says(&context) {
        Some(text) => Error::Step {
            step: format!("mounting {}: {text}", describe(mount)),
            source: error.into(),
        },
        None => Error::Step {
            step: format!("mounting {}", describe(mount)),
            source: error.into(),
        },
    })
}

fn configure(
    context: &OwnedFd,
    mount: &Mount,
    options: &MountOptions,
) -> rustix::io::Result<OwnedFd> {
    if let Some(source) = mount.source() {
        fsconfig_set_string(context.as_fd(), "source", source)?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), key.as_str(), value.as_str())?,
            None => fsconfig_set_flag(context.as_fd(), key.as_str())?,
        }
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
}

/// The kernel's own words about a mount that failed, which it leaves in the context (fsopen(2)).
fn kernel_says(context: &OwnedFd) -> Option<String> {
    let mut line = [0_u8; 256];
    let len = rustix::io::read(context, &mut line).ok()?;
    let text = String::from_utf8_lossy(line.get(..len)?).trim().to_owned();
    Some(text.strip_prefix("e ").unwrap_or(&text).to_owned())
}

fn describe(mount: &Mount) -> String {
    let kind = mount.typ().as_deref().unwrap_or("bind");
    match mount.source() {
        Some(source) => format!(
            "{kind} {} at {}",
            source.display(),
            mount.destination().display()
        ),
        None => format!("{kind} at {}", mount.destination().display()),
    }
}

/// Binds the file at `source`, seen from the caller's root, over `target`.
///
/// # Errors
/// Those of `open_tree(2)` and `move_mount(2)`.
pub(crate) fn bind_over(
    source: impl AsFd,
    target: impl AsFd,
    read_only: bool,
) -> std::io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(source, c"", flags)?;
    if read_only {
        let change = AttributeChange {
            set: libc::MOUNT_ATTR_RDONLY,
            recursive: true,
            ..Default::default()
        };
        mount_setattr(&tree, change)?;
    }
    attach(&tree, target).map_err(Into::into)
}

/// Lays an empty read-only tmpfs over the directory `target`.
///
/// # Errors
/// Those of the mount calls.
pub(super) fn cover_directory(target: impl AsFd) -> std::io::Result<()> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", "tmpfs")?;
    fsconfig_create(context.as_fd())?;
    let tree = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?;
    attach(&tree, target).map_err(Into::into)
}

/// A path of the process's own root, for what is done after the root has changed.
pub(crate) fn open_in_new_root(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
}
