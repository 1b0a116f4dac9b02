// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Files of the kubelet's that a container may write: its termination message, the pod's `/etc/hosts`. The guest has a
//! copy; when the container has ended, what it left there goes back.
//!
//! The host's file is opened before the container is made, and never by path again: what the guest sends ends up in that
//! file or nowhere.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use pod_spec::{HostCopy, WriteBack};
use sha2::{Digest, Sha256};

use crate::error::StorageError;

/// A file of the host's that gets back what the guest made of its copy.
#[derive(Debug)]
pub struct WrittenBack {
    index: u32,
    back: WriteBack,
    path: PathBuf,
    file: File,
    /// Of what the guest got.
    sent: [u8; 32],
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The host has it.
    Back,
    /// The guest has not changed it.
    Unchanged,
    /// It has grown past what is written back.
    TooLarge,
}

impl WrittenBack {
    /// Those of `copies` that are written back.
    ///
    /// # Errors
    /// [`StorageError::Io`] if one cannot be opened for writing, [`StorageError::NotAFile`] if it is no regular file.
    pub fn open_all(copies: &[HostCopy]) -> Result<Vec<Self>, StorageError> {
        let backs = copies.iter().filter_map(|copy| Some((copy, copy.back?)));
        backs.map(|(copy, back)| Self::open(copy, back)).collect()
    }

    fn open(copy: &HostCopy, back: WriteBack) -> Result<Self, StorageError> {
        let path = &copy.source;
        let file = File::options()
            .read(true)
            .write(true)
            // A pipe must not be waited for, and a link not be followed.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(StorageError::io("open for writing", path))?;
        let metadata = file.metadata().map_err(StorageError::io("read", path))?;
        if !metadata.is_file() {
            return Err(StorageError::NotAFile(path.clone()));
        }
        let mut sent = Vec::new();
        (&file)
            .take(WriteBack::Whole.max().0.saturating_add(1))
            .read_to_end(&mut sent)
            .map_err(StorageError::io("read", path))?;
        Ok(Self {
            index: copy.index,
            back,
            path: path.clone(),
            file,
            sent: Sha256::digest(&sent).into(),
        })
    }

    /// The copied mount's number in the guest.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The most bytes to ask the guest for.
    pub fn max_bytes(&self) -> u32 {
        u32::try_from(self.back.max().0).unwrap_or(u32::MAX)
    }

    /// Where the file is on the host, for messages.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Takes the end of the guest's file, which has `size` bytes. Blocks for as long as the host's disk does.
    ///
    /// # Errors
    /// [`StorageError::Io`] if it cannot be written.
    pub fn write(&self, end: &[u8], size: u64) -> Result<Written, StorageError> {
        let max = usize::try_from(self.max_bytes()).unwrap_or(usize::MAX);
        // A guest cannot make it more than that, whatever it sends.
        let end = end.get(end.len().saturating_sub(max)..).unwrap_or_default();
        let len = u64::try_from(end.len()).unwrap_or(u64::MAX);
        if len != size && self.back == WriteBack::Whole {
            return Ok(Written::TooLarge);
        }
        if len == size && self.sent == <[u8; 32]>::from(Sha256::digest(end)) {
            return Ok(Written::Unchanged);
        }
        self.file
            .write_all_at(end, 0)
            .and_then(|()| self.file.set_len(len))
            .map_err(StorageError::io("write back", &self.path))?;
        Ok(Written::Back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_spec::{MAX_TERMINATION_MESSAGE, MAX_WRITTEN_BACK};
    use std::fs;
    use std::path::Path;

    fn open(path: &Path, back: WriteBack) -> Result<WrittenBack, StorageError> {
        let copies = [HostCopy {
            index: 3,
            source: path.to_owned(),
            back: Some(back),
        }];
        WrittenBack::open_all(&copies).map(|mut files| files.remove(0))
    }

    fn write(file: &WrittenBack, data: &[u8]) -> Written {
        file.write(data, data.len() as u64).unwrap()
    }

    #[test]
    fn termination_message_replaces_what_was_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "from an earlier life, and longer").unwrap();
        let back = open(file.path(), WriteBack::TerminationMessage).unwrap();
        assert_eq!((back.index(), back.max_bytes()), (3, 4096));
        assert_eq!(write(&back, b"disk full"), Written::Back);
        assert_eq!(fs::read(file.path()).unwrap(), b"disk full");
    }

    #[test]
    fn of_a_long_message_the_end_is_kept() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let back = open(file.path(), WriteBack::TerminationMessage).unwrap();
        let max = usize::try_from(MAX_TERMINATION_MESSAGE.0).unwrap();
        let end = vec![b'x'; max];
        assert_eq!(back.write(&end, 1 << 40).unwrap(), Written::Back);
        assert_eq!(fs::read(file.path()).unwrap(), end);
        // A guest that sends more than it was asked for.
        let more = [b"a".as_slice(), &end].concat();
        back.write(&more, more.len() as u64).unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), end);
    }

    #[test]
    fn whole_file_is_written_up_to_its_cap_and_not_past_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let back = open(file.path(), WriteBack::Whole).unwrap();
        let max = usize::try_from(MAX_WRITTEN_BACK.0).unwrap();
        assert_eq!(write(&back, &vec![b'h'; max]), Written::Back);
        assert_eq!(write(&back, &vec![b'i'; max + 1]), Written::TooLarge);
        assert_eq!(fs::read(file.path()).unwrap(), vec![b'h'; max]);
    }

    #[test]
    fn file_that_the_guest_left_alone_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "127.0.0.1 localhost").unwrap();
        let back = open(file.path(), WriteBack::Whole).unwrap();
        fs::write(file.path(), "newer, from the kubelet").unwrap();
        assert_eq!(write(&back, b"127.0.0.1 localhost"), Written::Unchanged);
        assert_eq!(fs::read(file.path()).unwrap(), b"newer, from the kubelet");
    }

    #[test]
    fn link_folder_and_pipe_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("target"), "").unwrap();
        std::os::unix::fs::symlink(at("target"), at("link")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), mode).unwrap();
        for name in ["link", "pipe", "."] {
            let error = open(&at(name), WriteBack::Whole).unwrap_err().to_string();
            assert!(error.contains(at(name).to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn copy_that_is_not_written_back_is_not_opened() {
        let copies = [HostCopy {
            index: 0,
            source: "/nowhere".into(),
            back: None,
        }];
        assert!(WrittenBack::open_all(&copies).unwrap().is_empty());
    }
}
