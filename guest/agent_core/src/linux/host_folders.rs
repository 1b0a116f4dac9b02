// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's directories: one virtiofs for the pod, in which each of them is a folder (or a file) by its name.
//!
//! The host decides what may be written, by its own mounts; what a container may do beyond that is decided when a folder
//! is bound into it. Each folder is a file system of its own (Linux makes a mount of it when it is first walked into), so
//! inode numbers are unique.

use std::fs;
use std::path::Path;

use super::disk;
use super::mount::mount_filesystem;
use crate::Error;
use crate::error::Context as _;

/// Mounts the file system `tag` at `place`, which is made. `bind_device` is the slot that it came in, if the guest has
/// not looked at that yet. The driver has found the tag by the time that the slot is bound, so nothing is waited for.
///
/// # Errors
/// [`Error::Step`] with the kernel's own words.
pub fn mount(tag: &str, bind_device: Option<&str>, place: &Path) -> Result<(), Error> {
    if let Some(device) = bind_device {
        disk::bind_slot(device)?;
    }
    fs::create_dir_all(place).step(|| format!("making {}", place.display()))?;
    mount_filesystem("virtiofs", Some(Path::new(tag)), &[], place, false)
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
}
