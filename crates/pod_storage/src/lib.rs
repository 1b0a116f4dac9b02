// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From containerd's mounts to disks for the VM and mounts in the guest.
//!
//! ```text
//! CreateTaskRequest.rootfs ──plan──> RootfsPlan ──Store::rootfs──> Rootfs { disks, form }
//! ```
//!
//! | what containerd hands over | what the guest gets |
//! |---|---|
//! | `overlay` | its lower directories as one EROFS image, built once per node; a filled upper directory as one more |
//! | read-only `bind` of a committed snapshot | the same |
//! | writable `bind`, or a plain directory | an EROFS image of its own |
//! | `erofs` images under an `overlay` of them | the images as they are |
//! | `ext4`, `xfs` on a block device or an image file | the device |
//!
//! Nothing is ever mounted where somebody else sees it, and no file has a name before it is whole: a build happens in an
//! unnamed file, which gets its name by `linkat` when it is done. A process that dies half-way leaves nothing.
//!
//! All functions block, but those of [`Watch`]; call them off the async threads.

mod block_devices;
mod build;
mod copies;
mod empty_dirs;
mod error;
mod ext4;
mod image;
mod live;
mod mount_list;
mod plan;
mod volumes;
mod watch;
mod write_back;

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use agent_proto::api;
use hypervisor::{Disk, DiskAccess};
use ids::{ContainerId, DiskSerial};
use pod_spec::{EmptyDir, HostCopy};

pub use block_devices::{BlockVolume, block_devices};
pub use copies::{MAX_COPY_BYTES, MAX_COPY_ENTRIES};
pub use empty_dirs::{EmptyDirVolume, filled_by_the_host};
pub use error::StorageError;
pub use live::{LiveTree, MAX_LIVE_VOLUMES, MAX_VOLUME_BYTES, MAX_VOLUME_ENTRIES};
pub use plan::{RootfsMount, RootfsPlan};
pub use volumes::{host_mounts, sub_paths};
pub use watch::Watch;
pub use write_back::{Written, WrittenBack};

/// The node's storage: the image cache and the scratch template. Any number of processes may use one cache directory.
#[derive(Debug, Clone)]
pub struct Store {
    config: pod_spec::Storage,
}

/// What a container's root file system is made of.
#[derive(Debug)]
pub struct Rootfs {
    /// The disks that must be attached. One whose serial the VM has already is the same image: it is shared.
    pub disks: Vec<Disk>,
    /// How the guest mounts them.
    pub form: RootfsForm,
}

/// How the guest mounts a container's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsForm {
    /// Read-only EROFS images, topmost first, under an overlay that writes to the scratch disk.
    Layered(Vec<DiskSerial>),
    /// One disk with a file system of its own.
    Disk {
        /// The disk.
        serial: DiskSerial,
        /// "ext4" or "xfs".
        fs_type: String,
        /// Mount options for the guest.
        options: Vec<String>,
    },
}

impl Store {
    /// The store of the node's config. Makes its directories, readable by root alone.
    ///
    /// # Errors
    /// [`StorageError::Io`] if they cannot be made.
    pub fn open(config: &pod_spec::Storage) -> Result<Self, StorageError> {
        let images = config.cache_dir.join("images");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&images)
            .map_err(StorageError::io("create", &images))?;
        Ok(Self {
            config: config.clone(),
        })
    }

    /// A pod's scratch disk: a clone of the node's template, an unnamed file that goes with its last user.
    ///
    /// # Errors
    /// [`StorageError::Tool`] if the template cannot be made, [`StorageError::Io`] if it cannot be cloned.
    pub fn scratch_disk(&self) -> Result<Disk, StorageError> {
        let file = image::unnamed_file(&self.config.cache_dir)?;
        ext4::fill(&self.config, ext4::Use::Scratch, &file)?;
        Ok(Disk {
            serial: "scratch".parse().map_err(StorageError::Serial)?,
            file,
            access: DiskAccess::ReadWrite,
        })
    }

    /// The root file system of container `id` from containerd's mounts. `directory` is where the root file system is if
    /// there are no mounts.
    ///
    /// # Errors
    /// [`StorageError::UnknownRootfs`] for mounts that no snapshotter hands over, [`StorageError::Tool`] or
    /// [`StorageError::NoSpace`] if an image cannot be built, [`StorageError::Io`] if a file cannot be opened.
    pub fn rootfs(
        &self,
        id: &ContainerId,
        mounts: &[RootfsMount],
        directory: &Path,
    ) -> Result<Rootfs, StorageError> {
        match plan::plan(mounts, directory)? {
            RootfsPlan::Layers { lowers, upper } => self.layers(id, &lowers, upper.as_deref()),
            RootfsPlan::Images(paths) => {
                let images: Result<Vec<Disk>, StorageError> = paths
                    .iter()
                    .map(|path| image::foreign(path).map(|(serial, file)| read_only(serial, file)))
                    .collect();
                Ok(layered(images?))
            }
            RootfsPlan::Directory(path) => {
                let serial = image::private_serial("t", id)?;
                let file = image::build_private(&self.config, std::slice::from_ref(&path))?;
                Ok(layered(vec![read_only(serial, file)]))
            }
            RootfsPlan::Device {
                path,
                fs_type,
                options,
            } => {
                let serial = image::private_serial("d", id)?;
                let access = if options.iter().any(|option| option == "ro") {
                    DiskAccess::ReadOnly
                } else {
                    DiskAccess::ReadWrite
                };
                let file = File::options()
                    .read(true)
                    .write(access == DiskAccess::ReadWrite)
                    .open(&path)
                    .map_err(StorageError::io("open", &path))?;
                let disks = vec![Disk {
                    serial: serial.clone(),
                    file,
                    access,
                }];
                Ok(Rootfs {
                    disks,
                    form: RootfsForm::Disk {
                        serial,
                        fs_type,
                        options,
                    },
                })
            }
        }
    }

    /// The contents of host files and folders for the guest, in the order of `copies`.
    ///
    /// # Errors
    /// [`StorageError::CopyTooLarge`] past [`MAX_COPY_BYTES`] or [`MAX_COPY_ENTRIES`], [`StorageError::CopyKind`] for
    /// what is neither file, folder nor symbolic link, [`StorageError::Io`] if something cannot be read.
    pub fn copy_files(&self, copies: &[HostCopy]) -> Result<Vec<api::CopiedMount>, StorageError> {
        copies::read_all(copies)
    }

    /// EmptyDirs for the guest; those of medium Disk with the disk that they are kept on, which is made in the kubelet's
    /// directory if it is not there yet.
    ///
    /// # Errors
    /// [`StorageError::Io`] if a directory is not there, [`StorageError::NotADirectory`] if it is none,
    /// [`StorageError::NotADisk`] if something else has the disk's name, [`StorageError::Tool`] if none can be made.
    pub fn empty_dirs(&self, volumes: &[EmptyDir]) -> Result<Vec<EmptyDirVolume>, StorageError> {
        empty_dirs::make(&self.config, volumes)
    }

    fn layers(
        &self,
        id: &ContainerId,
        lowers: &[PathBuf],
        upper: Option<&Path>,
    ) -> Result<Rootfs, StorageError> {
        let mut disks = Vec::new();
        if let Some(upper) = upper
            && !is_empty(upper)?
        {
            let file = image::build_private(&self.config, &[upper.to_owned()])?;
            disks.push(read_only(image::private_serial("u", id)?, file));
        }
        let (serial, file) = image::cached(&self.config, lowers)?;
        disks.push(read_only(serial, file));
        Ok(layered(disks))
    }
}

fn read_only(serial: DiskSerial, file: File) -> Disk {
    Disk {
        serial,
        file,
        access: DiskAccess::ReadOnly,
    }
}

fn layered(disks: Vec<Disk>) -> Rootfs {
    let form = RootfsForm::Layered(disks.iter().map(|disk| disk.serial.clone()).collect());
    Rootfs { disks, form }
}

fn is_empty(directory: &Path) -> Result<bool, StorageError> {
    let mut entries = directory
        .read_dir()
        .map_err(StorageError::io("list", directory))?;
    Ok(entries.next().is_none())
}

#[cfg(test)]
mod tests;
