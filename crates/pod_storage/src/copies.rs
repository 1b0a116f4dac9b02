// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Reads the small host files and folders that a container mounts read-only, for the guest to hold in memory.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_proto::api;
use pod_spec::HostCopy;

use crate::error::StorageError;

/// The most bytes that one container's copied files may have: with its spec they cross to the guest in one ttrpc message
/// of at most 4 MiB. Volumes that the kubelet writes are not among them.
pub const MAX_COPY_BYTES: u64 = 3 << 20;

/// The most files, folders and links that one container may have copied.
pub const MAX_COPY_ENTRIES: usize = 1024;

/// What is left of the caps.
pub(crate) struct Budget {
    bytes: u64,
    entries: usize,
    max: (u64, usize),
}

impl Budget {
    pub(crate) fn new(bytes: u64, entries: usize) -> Self {
        Self {
            bytes,
            entries,
            max: (bytes, entries),
        }
    }

    fn exceeded(&self, path: &Path) -> StorageError {
        StorageError::CopyTooLarge {
            path: path.to_owned(),
            bytes: self.max.0,
            entries: self.max.1,
        }
    }
}

/// What to read: everything below the root that is wanted, by its path from there.
#[derive(Clone, Copy)]
pub(crate) struct Within<'a> {
    pub(crate) root: &'a Path,
    pub(crate) wanted: &'a dyn Fn(&Path) -> bool,
}

/// The contents of each of `copies`.
pub(crate) fn read_all(copies: &[HostCopy]) -> Result<Vec<api::CopiedMount>, StorageError> {
    let mut budget = Budget::new(MAX_COPY_BYTES, MAX_COPY_ENTRIES);
    copies
        .iter()
        .map(|copy| {
            let mut entries = Vec::new();
            // The mount's source itself may be a link; what it points to is meant, as for a bind mount.
            let metadata =
                fs::metadata(&copy.source).map_err(StorageError::io("read", &copy.source))?;
            let all = Within {
                root: &copy.source,
                wanted: &|_| true,
            };
            read_tree(all, &metadata, &mut budget, &mut entries)?;
            Ok(api::CopiedMount {
                index: copy.index,
                entries,
                ..Default::default()
            })
        })
        .collect()
}

/// Adds what there is to `entries`, parents before what is in them.
pub(crate) fn read_tree(
    within: Within<'_>,
    metadata: &Metadata,
    budget: &mut Budget,
    entries: &mut Vec<api::CopiedFile>,
) -> Result<(), StorageError> {
    let root = within.root;
    let mut pending: Vec<(PathBuf, Metadata)> = vec![(PathBuf::new(), metadata.clone())];
    while let Some((relative, metadata)) = pending.pop() {
        let path = if relative.as_os_str().is_empty() {
            root.to_owned()
        } else {
            root.join(&relative)
        };
        let left = budget.entries.checked_sub(1);
        budget.entries = left.ok_or_else(|| budget.exceeded(root))?;
        let content = read_entry(&path, &metadata, budget)
            .and_then(|content| content.ok_or_else(|| budget.exceeded(root)))?;
        if matches!(content, api::copied_file::Content::Directory(_)) {
            for entry in path.read_dir().map_err(StorageError::io("list", &path))? {
                let entry = entry.map_err(StorageError::io("list", &path))?;
                let below = relative.join(entry.file_name());
                if !(within.wanted)(&below) {
                    continue;
                }
                let metadata = entry
                    .metadata()
                    .map_err(StorageError::io("read", &entry.path()))?;
                pending.push((below, metadata));
                if pending.len() > budget.entries {
                    return Err(budget.exceeded(root));
                }
            }
        }
        let name = relative.to_str().map(str::to_owned);
        let name = name.ok_or_else(|| StorageError::NameNotUtf8(path.clone()))?;
        entries.push(api::CopiedFile {
            path: name,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            content: Some(content),
            ..Default::default()
        });
    }
    Ok(())
}

/// One entry's content, or `None` if it is past the budget.
fn read_entry(
    path: &Path,
    metadata: &Metadata,
    budget: &mut Budget,
) -> Result<Option<api::copied_file::Content>, StorageError> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Ok(Some(
            api::copied_file::Content::Directory(api::Empty::new()),
        ));
    }
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(StorageError::io("read the link", path))?;
        let target = target.to_str().map(str::to_owned);
        let target = target.ok_or_else(|| StorageError::NameNotUtf8(path.to_owned()))?;
        return Ok(Some(api::copied_file::Content::Symlink(target)));
    }
    if !kind.is_file() {
        let kind = if kind.is_socket() {
            "socket"
        } else if kind.is_fifo() {
            "pipe"
        } else {
            "device"
        };
        return Err(StorageError::CopyKind {
            path: path.to_owned(),
            kind,
        });
    }
    let mut data = Vec::new();
    let file = File::open(path).map_err(StorageError::io("open", path))?;
    file.take(budget.bytes.saturating_add(1))
        .read_to_end(&mut data)
        .map_err(StorageError::io("read", path))?;
    let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
    let Some(left) = budget.bytes.checked_sub(len) else {
        return Ok(None);
    };
    budget.bytes = left;
    Ok(Some(api::copied_file::Content::Data(data)))
}
