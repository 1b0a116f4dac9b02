// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What of the host's mounts and of the kubelet's directories a volume's form depends on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agent_proto::api;
use pod_spec::{HostMounts, SubPath};

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

/// Of a directory or file.
pub(crate) struct Owner {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) directory: bool,
}

pub(crate) fn owner(path: &Path) -> Result<Owner, StorageError> {
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

    #[test]
    fn own_mounts_are_read() {
        let none = std::iter::empty();
        assert_ne!(host_mounts(none).unwrap(), HostMounts::default());
    }
}
