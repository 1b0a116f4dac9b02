// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What containerd's mounts mean. Pure.

use std::path::{Path, PathBuf};

use crate::error::StorageError;
use crate::mount_list;

/// One of containerd's mounts, as in `CreateTaskRequest.rootfs`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootfsMount {
    /// "overlay", "bind", "ext4", ...
    pub fs_type: String,
    /// A device or a directory.
    pub source: String,
    /// Mount options.
    pub options: Vec<String>,
}

/// How a root file system reaches the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsPlan {
    /// Committed layers, which never change again, and perhaps a writable one.
    Layers {
        /// Topmost first.
        lowers: Vec<PathBuf>,
        /// What a container has written before; usually empty.
        upper: Option<PathBuf>,
    },
    /// EROFS images of committed layers, topmost first.
    Images(Vec<PathBuf>),
    /// A directory that is this container's alone.
    Directory(PathBuf),
    /// A file system on a device or in an image file.
    Device {
        /// The device or file.
        path: PathBuf,
        /// Its file system.
        fs_type: String,
        /// Mount options for the guest.
        options: Vec<String>,
    },
}

/// Options that say how the host is to mount, and nothing to the guest.
const HOST_OPTIONS: [&str; 1] = ["loop"];

/// Options of containerd's own, never of a kernel's.
const CONTAINERD_OPTION: &str = "X-containerd.";

/// The plan for `mounts`; `directory` is the root file system if there are none.
pub(crate) fn plan(mounts: &[RootfsMount], directory: &Path) -> Result<RootfsPlan, StorageError> {
    let mount = match mounts {
        [] => return Ok(RootfsPlan::Directory(directory.to_owned())),
        [mount] => mount,
        several => return mount_list::images(several).map(RootfsPlan::Images),
    };
    match mount.fs_type.as_str() {
        "overlay" => overlay(&mount.options),
        "bind" if has(mount, "ro") => Ok(RootfsPlan::Layers {
            lowers: vec![PathBuf::from(&mount.source)],
            upper: None,
        }),
        "bind" => Ok(RootfsPlan::Directory(PathBuf::from(&mount.source))),
        "ext4" | "xfs" => Ok(RootfsPlan::Device {
            path: PathBuf::from(&mount.source),
            fs_type: mount.fs_type.clone(),
            options: mount
                .options
                .iter()
                .filter(|option| {
                    !HOST_OPTIONS.contains(&option.as_str())
                        && !option.starts_with(CONTAINERD_OPTION)
                })
                .cloned()
                .collect(),
        }),
        other => Err(StorageError::UnknownRootfs(other.to_owned())),
    }
}

fn has(mount: &RootfsMount, option: &str) -> bool {
    mount.options.iter().any(|have| have == option)
}

fn overlay(options: &[String]) -> Result<RootfsPlan, StorageError> {
    let value = |key: &str| {
        options
            .iter()
            .find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
    };
    let lowerdir = value("lowerdir").unwrap_or_default();
    let invalid = || StorageError::Overlay {
        option: "lowerdir",
        value: lowerdir.to_owned(),
    };
    // A backslash escapes the next character (overlayfs.rst); containerd makes no such paths.
    if lowerdir.is_empty() || lowerdir.contains('\\') {
        return Err(invalid());
    }
    let lowers: Vec<PathBuf> = lowerdir.split(':').map(PathBuf::from).collect();
    if lowers.iter().any(|lower| !lower.is_absolute()) {
        return Err(invalid());
    }
    Ok(RootfsPlan::Layers {
        lowers,
        upper: value("upperdir").map(PathBuf::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fs_type: &str, source: &str, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fs_type: fs_type.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn plan_one(mount: RootfsMount) -> Result<RootfsPlan, StorageError> {
        plan(&[mount], Path::new("/bundle/rootfs"))
    }

    #[test]
    fn overlay_gives_its_layers_topmost_first() {
        let overlay = mount(
            "overlay",
            "overlay",
            &[
                "index=off",
                "workdir=/w",
                "upperdir=/u",
                "lowerdir=/2/fs:/1/fs",
            ],
        );
        let expected = RootfsPlan::Layers {
            lowers: vec!["/2/fs".into(), "/1/fs".into()],
            upper: Some("/u".into()),
        };
        assert_eq!(plan_one(overlay).unwrap(), expected);
    }

    #[test]
    fn overlay_without_usable_layers_is_refused() {
        for options in [
            &["upperdir=/u"][..],
            &["lowerdir="],
            &["lowerdir=a:b"],
            &["lowerdir=/a\\:b"],
        ] {
            assert!(matches!(
                plan_one(mount("overlay", "", options)),
                Err(StorageError::Overlay { .. })
            ));
        }
    }

    #[test]
    fn read_only_bind_is_a_layer_and_writable_one_a_directory() {
        let ro = plan_one(mount("bind", "/s", &["ro", "rbind"])).unwrap();
        assert_eq!(
            ro,
            RootfsPlan::Layers {
                lowers: vec!["/s".into()],
                upper: None
            }
        );
        assert_eq!(
            plan_one(mount("bind", "/s", &["rw"])).unwrap(),
            RootfsPlan::Directory("/s".into())
        );
    }

    #[test]
    fn no_mounts_mean_the_bundles_directory() {
        let expected = RootfsPlan::Directory("/bundle/rootfs".into());
        assert_eq!(plan(&[], Path::new("/bundle/rootfs")).unwrap(), expected);
    }

    #[test]
    fn device_keeps_the_options_that_a_kernel_knows() {
        let mount = mount(
            "ext4",
            "/i",
            &["loop", "X-containerd.mkfs.size=1", "discard"],
        );
        let expected = RootfsPlan::Device {
            path: "/i".into(),
            fs_type: "ext4".into(),
            options: vec!["discard".into()],
        };
        assert_eq!(plan_one(mount).unwrap(), expected);
    }

    #[test]
    fn unknown_types_are_refused_by_name() {
        let error = plan_one(mount("zfs", "pool/x", &[]))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("rootfs of type \"zfs\" is not known"),
            "{error}"
        );
        let two = plan(
            &[mount("zfs", "", &[]), mount("overlay", "", &[])],
            Path::new("/"),
        )
        .unwrap_err();
        assert!(two.to_string().contains("zfs+overlay"));
    }
}
