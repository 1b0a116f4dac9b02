// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a pod's storage could not be prepared.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of the node's storage, with the file it is about and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A system call failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The disk is full.
    #[error(
        "no space left in {} while building the image of {what}: free some, or move storage.cache_dir",
        directory.display()
    )]
    NoSpace {
        /// The cache directory.
        directory: PathBuf,
        /// What was built.
        what: String,
    },
    /// `mkfs.erofs` or `mkfs.ext4` is missing or failed.
    #[error("{program} failed on {what} ({status}): {stderr}")]
    Tool {
        /// The program.
        program: String,
        /// What it was to build.
        what: String,
        /// How it ended.
        status: String,
        /// The last lines that it wrote.
        stderr: String,
    },
    /// containerd handed over mounts that no known snapshotter makes.
    #[error(
        "rootfs of type {0:?} is not known: use the overlayfs, native, devmapper, blockfile or erofs snapshotter"
    )]
    UnknownRootfs(String),
    /// An overlay without lower directories, or one of a form that is not known.
    #[error("the rootfs's overlay mount has no usable {option}: {value:?}")]
    Overlay {
        /// The mount option.
        option: &'static str,
        /// Its value.
        value: String,
    },
    /// More images than a container may have.
    #[error(
        "the rootfs has more than {max} layers that are images: use the overlayfs snapshotter, or an image with fewer layers"
    )]
    TooManyImages {
        /// The most.
        max: usize,
    },
    /// Host files are too many or too large to be copied.
    #[error(
        "{} is too large to be copied into the guest: at most {bytes} bytes in {entries} files",
        path.display()
    )]
    CopyTooLarge {
        /// What was to be copied.
        path: PathBuf,
        /// The most bytes, of it and what is copied with it.
        bytes: u64,
        /// The most files, folders and links.
        entries: usize,
    },
    /// A socket, pipe or device cannot be copied.
    #[error("{} is a {kind}, which cannot be copied into the guest: mount a file or a folder", path.display())]
    CopyKind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// An emptyDir of the kubelet's is no directory.
    #[error("{} is no directory, as an emptyDir must be: delete the pod and let it be made again", .0.display())]
    NotADirectory(PathBuf),
    /// Something else is where an emptyDir's disk should be.
    #[error("{} is not the disk of an emptyDir: remove it, or delete the pod", .0.display())]
    NotADisk(PathBuf),
    /// What a container may write is no regular file.
    #[error("{} is no regular file, so it cannot be written back: mount a file", .0.display())]
    NotAFile(PathBuf),
    /// A name that cannot be sent to the guest.
    #[error("{} is not UTF-8, which names in volumes must be: rename it", .0.display())]
    NameNotUtf8(PathBuf),
    /// A serial number could not be made.
    #[error("name a disk")]
    Serial(#[source] ids::InvalidId),
}

impl StorageError {
    /// Whether what it is about is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// For `map_err`: what was tried on which file.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// The same for an errno.
    pub(crate) fn errno<E: Into<io::Error>>(
        operation: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        let error = Self::io(operation, path);
        move |source| error(source.into())
    }
}
