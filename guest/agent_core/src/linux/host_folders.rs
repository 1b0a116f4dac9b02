// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's directories: one virtiofs for the pod, in which each of them is a folder (or a file) by its name.
//!
//! The host decides what may be written, by its own mounts; what a container may do beyond that is decided when a folder
//! is bound into it. Each folder is a file system of its own (Linux makes a mount of it when it is first walked into), so
//! inode numbers are unique. It is walked into before a container is made: what is bound into it is then that mount. So are
//! the host's mounts below it that stay writable in a read-only folder: Linux gives a mount that it finds later the flags
//! of the mount above it.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use agent_proto::layout;

use super::disk;
use super::mount::mount_filesystem;
use crate::Error;
use crate::error::Context as _;
use crate::volume_plan::HostFoldersPlan;

/// Whether the pod's file system is mounted.
#[derive(Debug, Default)]
pub(super) struct HostFolders(Mutex<bool>);

impl HostFolders {
    /// Mounts the file system, unless it was mounted before, and what a container needs of it. It stays until the guest
    /// ends.
    ///
    /// # Errors
    /// [`Error::Step`] with the kernel's own words.
    pub(super) fn make(&self, plan: &HostFoldersPlan) -> Result<(), Error> {
        let mut mounted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !*mounted {
            let place = Path::new(layout::HOST_FOLDERS_DIR);
            mount(&plan.tag, plan.bind_device.as_deref(), place)?;
            *mounted = true;
        }
        drop(mounted);
        plan.names
            .iter()
            .try_for_each(|name| enter(Path::new(&layout::host_folder(name))))?;
        for mount in &plan.writable_mounts {
            // One that the host has taken away meanwhile, or has put another over, is not there to be written.
            drop(enter(&Path::new(layout::HOST_FOLDERS_DIR).join(mount)));
        }
        Ok(())
    }
}

/// Mounts the file system `tag` at `place`, which is made. `bind_device` is the slot that it came in, if the guest has
/// not looked at that yet. The driver has found the tag by the time that the slot is bound, so nothing is waited for.
fn mount(tag: &str, bind_device: Option<&str>, place: &Path) -> Result<(), Error> {
    if let Some(device) = bind_device {
        disk::bind_slot(device)?;
    }
    fs::create_dir_all(place).step(|| format!("making {}", place.display()))?;
    mount_filesystem("virtiofs", Some(Path::new(tag)), &[], place, false)
}

/// Walks into a folder; a file has nothing to walk into.
fn enter(folder: &Path) -> Result<(), Error> {
    let step = || format!("looking at the host's {}", folder.display());
    if fs::metadata(folder).step(step)?.is_dir() {
        fs::metadata(folder.join(".")).step(step)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = mount(
            "volumes",
            Some("virtio-mmio.none"),
            &folder.path().join("x"),
        );
        assert!(error.unwrap_err().to_string().contains("virtio-mmio.none"));
        assert!(!folder.path().join("x").exists());
    }

    #[test]
    fn folder_that_the_host_does_not_share_is_named() {
        let folder = tempfile::tempdir().unwrap();
        enter(folder.path()).unwrap();
        let error = enter(&folder.path().join("rw-none")).unwrap_err();
        assert!(error.to_string().contains("rw-none"), "{error}");
    }
}
