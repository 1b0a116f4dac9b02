// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Mounting in the guest's own mount namespace, through the kernel's descriptor-based calls: an overlay of any number of
//! layers needs no option string, and the kernel says in words what it does not like.

use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::Error;
use crate::error::Context as _;

/// Mounts a file system at `place`. `options` are `key` or `key=value`.
///
/// # Errors
/// [`Error::Step`] with the kernel's own words.
pub(super) fn mount_filesystem(
    kind: &str,
    source: Option<&Path>,
    options: &[String],
    place: &Path,
    read_only: bool,
) -> Result<(), Error> {
    let mut settings: Vec<(&str, Option<&str>)> = options
        .iter()
        .map(|option| match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option.as_str(), None),
        })
        .collect();
    if read_only {
        settings.push(("ro", None));
    }
    let name = source
        .unwrap_or_else(|| Path::new(kind))
        .to_string_lossy()
        .into_owned();
    settings.insert(0, ("source", Some(&name)));
    mount_with(kind, &settings, place)
}

/// Mounts an overlay of `lower`, topmost first, with its writable layer in `upper` and `work`.
///
/// # Errors
/// [`Error::Step`] with the kernel's own words.
pub(super) fn mount_overlay(
    lower: &[String],
    upper: &str,
    work: &str,
    place: &Path,
) -> Result<(), Error> {
    let mut settings = vec![("source", Some("overlay"))];
    settings.extend(
        lower
            .iter()
            .map(|layer| ("lowerdir+", Some(layer.as_str()))),
    );
    settings.extend([("upperdir", Some(upper)), ("workdir", Some(work))]);
    mount_with("overlay", &settings, place)
}

fn mount_with(kind: &str, settings: &[(&str, Option<&str>)], place: &Path) -> Result<(), Error> {
    let step = || format!("mounting {kind} at {}", place.display());
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).step(step)?;
    let made = (|| -> rustix::io::Result<()> {
        for (key, value) in settings {
            match value {
                Some(value) => fsconfig_set_string(context.as_fd(), *key, *value)?,
                None => fsconfig_set_flag(context.as_fd(), *key)?,
            }
        }
        fsconfig_create(context.as_fd())?;
        let tree = fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        move_mount(
            &tree,
            c"",
            rustix::fs::CWD,
            place,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })();
    made.map_err(|error| {
        let mut line = [0_u8; 256];
        // The kernel's words, if it left any in the context (fsopen(2)).
        let words = rustix::io::read(&context, &mut line)
            .ok()
            .and_then(|len| line.get(..len))
            .map(|words| String::from_utf8_lossy(words).trim().to_owned());
        let step = match words {
            Some(words) => format!("{}: {}", step(), words.strip_prefix("e ").unwrap_or(&words)),
            None => step(),
        };
        Error::Step {
            step,
            source: error.into(),
        }
    })
}

/// Unmounts what is mounted at `place`; one that something still uses goes when that does.
///
/// # Errors
/// [`Error::Step`]; a place where nothing is mounted is none.
pub(super) fn unmount(place: &Path) -> Result<(), Error> {
    let unmounted = match rustix::mount::unmount(place, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            rustix::mount::unmount(place, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
        }
        other => other,
    };
    match unmounted {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error).step(|| format!("unmounting {}", place.display())),
    }
}
