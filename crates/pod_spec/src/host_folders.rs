// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's own directories that a container mounts: as whom the pod's file server shares each of them.

use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::host_mounts::HostMounts;

/// The bytes of a name's digest: two directories of a pod have different names.
const DIGEST_BYTES: usize = 16;

/// A directory, or a file, of the host that is shared with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFolder {
    /// Its name among the pod's: what is shared alike has one name in all containers of the pod.
    pub name: String,
    /// Where it is on the host.
    pub source: PathBuf,
    /// Whether the pod may write.
    pub access: FolderAccess,
    /// Whether later mounts of the host below it arrive.
    pub propagation: FolderPropagation,
    /// Of one that is read-only itself: the mounts below it that may be written, relative to it, parents first. At most
    /// [`MAX_WRITABLE_MOUNTS`]; what is mounted there later, or beyond that, is read-only.
    pub writable: Vec<PathBuf>,
}

/// The most mounts of the host that stay writable below a read-only directory.
pub const MAX_WRITABLE_MOUNTS: usize = 256;

/// Whether a pod may write to a shared directory; the host enforces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderAccess {
    /// It may.
    ReadWrite,
    /// Not here, but in what the host has mounted below.
    ReadOnly,
    /// Neither here nor in what is mounted below.
    RecursiveReadOnly,
}

/// Whether what the host mounts below a shared directory later on arrives there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderPropagation {
    /// No; Kubernetes' `None`.
    Private,
    /// Yes; Kubernetes' `HostToContainer`.
    FromHost,
}

impl HostFolder {
    /// The share for a bind mount of `source` with `options`; why there is none, if there cannot be one.
    pub(crate) fn new(
        source: &Path,
        options: &[String],
        host: &HostMounts,
    ) -> Result<Self, String> {
        let has = |wanted: &[&str]| {
            options
                .iter()
                .any(|option| wanted.contains(&option.as_str()))
        };
        if !source.is_absolute() {
            return Err(format!("the source {} is not absolute", source.display()));
        }
        if has(&["shared", "rshared"]) {
            let reason = "mounts that are made in a VM cannot appear on the host: use the propagation HostToContainer";
            return Err(reason.to_owned());
        }
        let access = if has(&["rro"]) {
            FolderAccess::RecursiveReadOnly
        } else if has(&["ro"]) {
            FolderAccess::ReadOnly
        } else {
            FolderAccess::ReadWrite
        };
        let propagation = if has(&["slave", "rslave"]) {
            FolderPropagation::FromHost
        } else {
            FolderPropagation::Private
        };
        Ok(Self {
            name: name(source, access, propagation),
            source: source.to_owned(),
            access,
            propagation,
            writable: match access {
                FolderAccess::ReadOnly => host.writable_below(source, MAX_WRITABLE_MOUNTS),
                FolderAccess::ReadWrite | FolderAccess::RecursiveReadOnly => Vec::new(),
            },
        })
    }
}

fn name(source: &Path, access: FolderAccess, propagation: FolderPropagation) -> String {
    let kind = match (access, propagation) {
        (FolderAccess::ReadWrite, FolderPropagation::Private) => "rw",
        (FolderAccess::ReadWrite, FolderPropagation::FromHost) => "rws",
        (FolderAccess::ReadOnly, FolderPropagation::Private) => "ro",
        (FolderAccess::ReadOnly, FolderPropagation::FromHost) => "ros",
        (FolderAccess::RecursiveReadOnly, FolderPropagation::Private) => "rro",
        (FolderAccess::RecursiveReadOnly, FolderPropagation::FromHost) => "rros",
    };
    let digest = Sha256::digest(source.as_os_str().as_bytes());
    digest
        .iter()
        .take(DIGEST_BYTES)
        .fold(format!("{kind}-"), |mut name, byte| {
            // Writing to a string does not fail.
            let _ = write!(name, "{byte:02x}");
            name
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(source: &str, options: &[&str]) -> Result<HostFolder, String> {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let host = HostMounts::parse(b"2 1 8:2 / /srv/a rw - ext4 /dev/sdb1 rw\n");
        HostFolder::new(Path::new(source), &options, &host)
    }

    #[test]
    fn mounts_below_stay_writable_unless_the_option_is_recursive() {
        for (options, writable) in [
            (vec!["rbind", "ro"], vec![PathBuf::from("a")]),
            (vec!["rbind", "rro"], vec![]),
            (vec!["rbind", "rw"], vec![]),
        ] {
            assert_eq!(folder("/srv", &options).unwrap().writable, writable);
        }
    }

    #[test]
    fn options_say_who_writes_and_which_mounts_arrive() {
        for (options, access, propagation) in [
            (
                vec!["rbind"],
                FolderAccess::ReadWrite,
                FolderPropagation::Private,
            ),
            (
                vec!["rbind", "rprivate", "rw"],
                FolderAccess::ReadWrite,
                FolderPropagation::Private,
            ),
            (
                vec!["rbind", "ro", "rslave"],
                FolderAccess::ReadOnly,
                FolderPropagation::FromHost,
            ),
            (
                vec!["rbind", "ro", "rro"],
                FolderAccess::RecursiveReadOnly,
                FolderPropagation::Private,
            ),
        ] {
            let folder = folder("/srv", &options).unwrap();
            assert_eq!(
                (folder.access, folder.propagation),
                (access, propagation),
                "{options:?}"
            );
        }
    }

    #[test]
    fn name_is_one_for_what_is_shared_alike_and_another_for_all_else() {
        let name = |source, options: &[&str]| folder(source, options).unwrap().name;
        let data = name("/srv/data", &["rbind"]);
        assert_eq!(data, name("/srv/data", &["bind", "rw"]));
        assert_ne!(data, name("/srv/data", &["rbind", "ro"]));
        assert_ne!(data, name("/srv/data", &["rbind", "rslave"]));
        assert_ne!(data, name("/srv/other", &["rbind"]));
        assert_eq!(data.len(), 3 + 2 * DIGEST_BYTES);
    }

    #[test]
    fn mounts_of_the_guest_cannot_reach_the_host() {
        assert!(
            folder("/srv", &["rbind", "rshared"])
                .unwrap_err()
                .contains("HostToContainer")
        );
        assert!(folder("srv", &["rbind"]).is_err());
    }
}
