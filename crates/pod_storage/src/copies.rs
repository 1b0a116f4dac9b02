// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Reads the small host files and folders that a container mounts read-only, for the guest to hold in memory.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_proto::api;
use pod_spec::HostCopy;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::StorageError;
use crate::image;

/// The most bytes that one container's copied files may have: with its spec they cross to the guest in one ttrpc message
/// of at most 4 MiB. Volumes that the kubelet writes are not among them.
pub const MAX_COPY_BYTES: u64 = 3 << 20;

/// The most files, folders and links that one container may have copied.
pub const MAX_COPY_ENTRIES: usize = 1024;

/// The most names that are read of one folder: more than any budget has entries.
const MAX_FOLDER_NAMES: usize = 1 << 16;

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
            let all = Within {
                root: &copy.source,
                wanted: &|_| true,
            };
            read_tree(all, &mut budget, &mut entries)?;
            Ok(api::CopiedMount {
                index: copy.index,
                entries,
                ..Default::default()
            })
        })
        .collect()
}

/// Adds what there is to `entries`, parents before what is in them.
///
/// Another pod may write to the folder at the same time, and this process may read everything on the node: so each entry
/// is opened beneath the root, without a link on the way, and it is the open descriptor that is looked at and read.
pub(crate) fn read_tree(
    within: Within<'_>,
    budget: &mut Budget,
    entries: &mut Vec<api::CopiedFile>,
) -> Result<(), StorageError> {
    // The root itself may be a link; what it points to is meant, as for a bind mount.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(within.root, flags, Mode::empty())
        .map(File::from)
        .map_err(StorageError::errno("read", within.root))?;
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let left = budget.entries.checked_sub(1);
        budget.entries = left.ok_or_else(|| budget.exceeded(within.root))?;
        let entry = if relative.as_os_str().is_empty() {
            Entry::new(root.try_clone(), within.root.to_owned())?
        } else {
            let path = within.root.join(&relative);
            Entry::new(open_beneath(&root, &relative), path)?
        };
        let content = entry.content(budget)?;
        let content = content.ok_or_else(|| budget.exceeded(within.root))?;
        if entry.metadata.is_dir() {
            for name in entry.names()? {
                let below = relative.join(name);
                if !(within.wanted)(&below) {
                    continue;
                }
                pending.push(below);
                if pending.len() > budget.entries {
                    return Err(budget.exceeded(within.root));
                }
            }
        }
        entries.push(api::CopiedFile {
            path: entry.text(&relative)?,
            mode: entry.metadata.mode() & 0o7777,
            uid: entry.metadata.uid(),
            gid: entry.metadata.gid(),
            content: Some(content),
            ..Default::default()
        });
    }
    Ok(())
}

fn open_beneath(root: &File, relative: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let entry = rustix::fs::openat2(root, relative, flags, Mode::empty(), resolve)?;
    Ok(File::from(entry))
}

/// A file, folder or link that was found, held by a descriptor.
struct Entry {
    file: File,
    metadata: Metadata,
    /// For messages.
    path: PathBuf,
}

impl Entry {
    fn new(file: io::Result<File>, path: PathBuf) -> Result<Self, StorageError> {
        let opened = file.and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) = opened.map_err(StorageError::io("read", &path))?;
        Ok(Self {
            file,
            metadata,
            path,
        })
    }

    /// The content, or `None` if it is past the budget.
    fn content(
        &self,
        budget: &mut Budget,
    ) -> Result<Option<api::copied_file::Content>, StorageError> {
        use api::copied_file::Content;
        let kind = self.metadata.file_type();
        if kind.is_dir() {
            return Ok(Some(Content::Directory(api::Empty::new())));
        }
        if kind.is_symlink() {
            let target = rustix::fs::readlinkat(&self.file, "", Vec::new())
                .map_err(StorageError::errno("read the link", &self.path))?;
            let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
            return self.text(&target).map(Content::Symlink).map(Some);
        }
        if kind.is_file() {
            return Ok(self.data(budget)?.map(Content::Data));
        }
        let kind = if kind.is_socket() {
            "socket"
        } else if kind.is_fifo() {
            "pipe"
        } else {
            "device"
        };
        Err(StorageError::CopyKind {
            path: self.path.clone(),
            kind,
        })
    }

    fn data(&self, budget: &mut Budget) -> Result<Option<Vec<u8>>, StorageError> {
        let mut data = Vec::new();
        let file = File::open(image::proc_path(&self.file))
            .map_err(StorageError::io("open", &self.path))?;
        file.take(budget.bytes.saturating_add(1))
            .read_to_end(&mut data)
            .map_err(StorageError::io("read", &self.path))?;
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let Some(left) = budget.bytes.checked_sub(len) else {
            return Ok(None);
        };
        budget.bytes = left;
        Ok(Some(data))
    }

    /// The names in a folder.
    fn names(&self) -> Result<Vec<OsString>, StorageError> {
        let list = || StorageError::io("list", &self.path);
        let entries = fs::read_dir(image::proc_path(&self.file)).map_err(list())?;
        entries
            .map(|entry| entry.map(|entry| entry.file_name()).map_err(list()))
            // One past any budget is enough to see that it is past.
            .take(MAX_FOLDER_NAMES)
            .collect()
    }

    fn text(&self, path: &Path) -> Result<String, StorageError> {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| StorageError::NameNotUtf8(self.path.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    fn read(path: &Path) -> Result<Vec<api::CopiedFile>, StorageError> {
        let copies = [HostCopy {
            index: 0,
            source: path.to_owned(),
            back: None,
        }];
        read_all(&copies).map(|mut mounts| mounts.remove(0).entries)
    }

    #[test]
    fn nothing_outside_of_the_root_is_opened_whatever_a_link_says() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        fs::create_dir(&inside).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        symlink("..", inside.join("up")).unwrap();
        let root = File::open(&inside).unwrap();
        open_beneath(&root, Path::new("up")).unwrap();
        open_beneath(&root, Path::new("up/secret")).unwrap_err();
        open_beneath(&root, Path::new("../secret")).unwrap_err();
        let entries = read(&inside).unwrap();
        let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(
            paths,
            ["", "up"],
            "the link itself, and not what it leads to"
        );
    }

    #[test]
    fn root_that_is_a_link_is_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "content").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let entries = read(&dir.path().join("link")).unwrap();
        let content = entries.first().unwrap().content.clone();
        let expected = api::copied_file::Content::Data(b"content".to_vec());
        assert_eq!(content, Some(expected));
    }

    #[test]
    fn name_and_link_that_are_not_utf_8_are_refused() {
        let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
        let (name, link) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(name.path().join(odd), "").unwrap();
        symlink(odd, link.path().join("link")).unwrap();
        for dir in [&name, &link] {
            let error = read(dir.path()).unwrap_err();
            assert!(matches!(error, StorageError::NameNotUtf8(_)), "{error}");
        }
    }

    #[test]
    fn pipe_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("pipe"), mode).unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("pipe is a pipe"), "{error}");
        read(Path::new("/dev/null")).unwrap_err();
    }
}
