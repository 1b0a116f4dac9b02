// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The volumes that the guest makes: it takes over the owner and mode that the kubelet gave the directory on the host
//! (fsGroup), and nothing else of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agent_proto::api;
use pod_spec::{EmptyDir, HostMounts, Medium, SubPath};

use crate::error::StorageError;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The mounts that this process sees, and which of `sources` are directories. One that is not there is none: who needs
/// it will say so.
///
/// # Errors
/// [`StorageError::Io`] if the kernel does not tell.
pub fn host_mounts<'a>(
    sources: impl Iterator<Item = &'a Path>,
) -> Result<HostMounts, StorageError> {
    let path = Path::new(MOUNTINFO);
    let text = fs::read(path).map_err(StorageError::io("read", path))?;
    let directories = sources.filter(|source| source.is_dir());
    Ok(HostMounts::parse(&text).with_directories(directories.map(Path::to_owned)))
}

/// The emptyDirs for the guest.
///
/// # Errors
/// [`StorageError::Io`] if a directory is not there, [`StorageError::NotADirectory`] if it is none.
pub fn empty_dirs(volumes: &[EmptyDir]) -> Result<Vec<api::Volume>, StorageError> {
    volumes
        .iter()
        .map(|volume| {
            use api::volume::Medium::{HugePageBytes, MemoryBytes, Scratch};
            let owner = owner(&volume.source)?;
            if !owner.directory {
                return Err(StorageError::NotADirectory(volume.source.clone()));
            }
            let medium = match volume.medium {
                Medium::Disk => Scratch(api::Empty::new()),
                Medium::Memory(size) => MemoryBytes(size.unwrap_or_default().0),
                Medium::HugePages(size) => HugePageBytes(size.unwrap_or_default().0),
            };
            Ok(api::Volume {
                name: volume.name.clone(),
                medium: Some(medium),
                mode: owner.mode,
                uid: owner.uid,
                gid: owner.gid,
                ..Default::default()
            })
        })
        .collect()
}

/// The parts of emptyDirs for the guest.
///
/// # Errors
/// [`StorageError::Io`] if the kubelet has not made one, [`StorageError::NameNotUtf8`].
pub fn sub_paths(parts: &[SubPath]) -> Result<Vec<api::SubPath>, StorageError> {
    parts
        .iter()
        .map(|part| {
            let owner = owner(&part.source)?;
            let path = part.path.to_str();
            let path = path.ok_or_else(|| StorageError::NameNotUtf8(part.path.clone()))?;
            Ok(api::SubPath {
                index: part.index,
                volume: part.volume.clone(),
                path: path.to_owned(),
                mode: owner.mode,
                uid: owner.uid,
                gid: owner.gid,
                ..Default::default()
            })
        })
        .collect()
}

struct Owner {
    mode: u32,
    uid: u32,
    gid: u32,
    directory: bool,
}

fn owner(path: &Path) -> Result<Owner, StorageError> {
    let metadata = fs::metadata(path).map_err(StorageError::io("read", path))?;
    Ok(Owner {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        directory: metadata.is_dir(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::Bytes;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn empty_dir_takes_over_owner_and_mode_of_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2770)).unwrap();
        let volume = EmptyDir {
            name: "u.v".to_owned(),
            medium: Medium::Memory(Some(Bytes(4096))),
            source: dir.path().to_owned(),
        };
        let made = empty_dirs(&[volume]).unwrap().remove(0);
        let owner = fs::metadata(dir.path()).unwrap();
        assert_eq!((made.name.as_str(), made.mode), ("u.v", 0o2770));
        assert_eq!((made.uid, made.gid), (owner.uid(), owner.gid()));
        assert_eq!(made.medium, Some(api::volume::Medium::MemoryBytes(4096)));
    }

    #[test]
    fn empty_dir_that_is_missing_or_a_file_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/nowhere/v")] {
            let volume = EmptyDir {
                name: "v".to_owned(),
                medium: Medium::Disk,
                source: path.to_owned(),
            };
            let error = empty_dirs(&[volume]).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn own_mounts_are_read() {
        let none = std::iter::empty();
        assert_ne!(host_mounts(none).unwrap(), HostMounts::default());
    }
}
