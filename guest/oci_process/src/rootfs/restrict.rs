// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What is taken away inside the new root: masked and read-only paths, and writing to the root itself.

use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::Spec;
use rustix::fs::FileType;
use rustix::io::Errno;

use super::mounts::{bind_over, cover_directory, open_in_new_root};
use crate::Error;
use crate::error::Context as _;
use crate::sys::{AttributeChange, mount_setattr};

/// Applies `linux.readonlyPaths`, `linux.maskedPaths` and `root.readonly` to the process's root.
///
/// # Errors
/// [`Error::Step`]; a path that does not exist is no error (OCI runtime specification, config-linux).
pub(crate) fn restrict(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    for path in linux
        .and_then(|linux| linux.readonly_paths().as_deref())
        .unwrap_or_default()
    {
        if let Some((place, _)) = open(path)? {
            bind_over(&place, &place, true).step(|| format!("making {path} read-only"))?;
        }
    }
    for path in linux
        .and_then(|linux| linux.masked_paths().as_deref())
        .unwrap_or_default()
    {
        let Some((place, kind)) = open(path)? else {
            continue;
        };
        let masked = if kind == FileType::Directory {
            cover_directory(&place)
        } else {
            open_in_new_root(Path::new("/dev/null"))
                .map_err(Into::into)
                .and_then(|null| bind_over(null, &place, false))
        };
        masked.step(|| format!("masking {path}"))?;
    }
    if spec.root().as_ref().and_then(|root| root.readonly()) == Some(true) {
        let root = open_in_new_root(Path::new("/")).step(|| "opening the root".to_owned())?;
        let change = AttributeChange {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Default::default()
        };
        mount_setattr(&root, change).step(|| "making the root read-only".to_owned())?;
    }
    Ok(())
}

fn open(path: &str) -> Result<Option<(OwnedFd, FileType)>, Error> {
    let name = || format!("opening {path}");
    match open_in_new_root(Path::new(path)) {
        Ok(place) => {
            let mode = rustix::fs::fstat(&place).step(name)?.st_mode;
            Ok(Some((place, FileType::from_raw_mode(mode))))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error).step(name),
    }
}
