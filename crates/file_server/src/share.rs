// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What is shared, and how.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::FileServerError;

/// The most directories of one pod: what the server's root has inodes for.
pub const MAX_SHARES: usize = 256;
/// The longest name.
const MAX_NAME_BYTES: usize = 64;

/// A directory or a regular file of the host, under a name in the server's root.
#[derive(Debug)]
pub struct Share {
    /// Its folder (or file) in the root of the file system that the guest mounts.
    pub name: ShareName,
    /// The directory or file; `O_PATH` will do.
    pub source: OwnedFd,
    /// Whether the guest may write.
    pub access: Access,
    /// Whether later mounts of the host below it arrive.
    pub propagation: Propagation,
}

impl Share {
    /// The directory or file at `path`, as it is now; links are followed.
    ///
    /// # Errors
    /// [`FileServerError::Mount`] if it cannot be opened.
    pub fn open(
        name: ShareName,
        path: &Path,
        access: Access,
        propagation: Propagation,
    ) -> Result<Self, FileServerError> {
        match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(source) => Ok(Self {
                name,
                source,
                access,
                propagation,
            }),
            Err(error) => Err(FileServerError::Mount {
                operation: "open the source",
                name,
                source: error.into(),
            }),
        }
    }
}

/// Whether the guest may write. The host enforces it, by the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everywhere the host's own mounts allow it.
    ReadWrite,
    /// Not here, but in what is mounted below.
    ReadOnly,
    /// Neither here nor in what is mounted below.
    RecursiveReadOnly,
}

/// Whether what the host mounts below a shared directory after it was shared arrives there. What is mounted below
/// at the time of sharing always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// No; Kubernetes' `None`.
    Private,
    /// Yes; Kubernetes' `HostToContainer`.
    FromHost,
}

/// The name of a share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShareName(String);

impl ShareName {
    /// A name of 1 to 64 letters, digits, `-`, `_` and `.`, which does not begin with a dot.
    ///
    /// # Errors
    /// [`FileServerError::Name`].
    pub fn new(name: &str) -> Result<Self, FileServerError> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let fine = (1..=MAX_NAME_BYTES).contains(&name.len())
            && !name.starts_with('.')
            && name.bytes().all(known);
        if fine {
            Ok(Self(name.to_owned()))
        } else {
            Err(FileServerError::Name {
                name: name.chars().take(MAX_NAME_BYTES).collect(),
            })
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ShareName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_but_into_the_root() {
        for bad in ["", ".", "..", ".a", "a/b", "/", "a\0", "é", &"a".repeat(65)] {
            assert!(ShareName::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "pvc-1_2.x", &"a".repeat(64)] {
            assert_eq!(ShareName::new(good).unwrap().as_str(), good);
        }
    }
}
