// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The scratch disk of a pod: a sparse file with an empty ext4, cloned from a template that is made once per size.
//!
//! The file has no name: it goes with the VM that uses it. So it needs no journal, and a node that loses power has none
//! left over.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use hypervisor::{Disk, DiskAccess};
use ids::{Bytes, DiskSerial};
use rustix::fs::SeekFrom;

use crate::build;
use crate::error::StorageError;
use crate::image;

/// Another way of formatting makes another template.
const FORMAT: u32 = 2;

/// A new scratch disk.
pub(crate) fn clone_template(config: &pod_spec::Storage) -> Result<Disk, StorageError> {
    let name = format!("scratch-{}-v{FORMAT}.ext4", config.scratch.0);
    let path = config.cache_dir.join(&name);
    let template = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_template(config, &path)?,
        Err(error) => return Err(StorageError::io("open", &path)(error)),
    };
    let file = image::unnamed_file(&config.cache_dir)?;
    clone_file(&template, &file, &path)?;
    let serial: DiskSerial = "scratch".parse().map_err(StorageError::Serial)?;
    Ok(Disk {
        serial,
        file,
        access: DiskAccess::ReadWrite,
    })
}

fn make_template(config: &pod_spec::Storage, path: &Path) -> Result<File, StorageError> {
    let _lock = image::lock(&config.cache_dir.join("images"), "0")?;
    if let Ok(file) = File::open(path) {
        return Ok(file);
    }
    let file = image::unnamed_file(&config.cache_dir)?;
    file.set_len(Bytes::from(config.scratch).0)
        .map_err(StorageError::io("size", path))?;
    // The file is all zeros: inode tables need no writing, neither now nor by the guest.
    let mut command = Command::new(&config.mkfs_ext4);
    command
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-O",
            "^has_journal,^resize_inode",
            "-E",
            "assume_storage_prezeroed=1,nodiscard",
        ])
        .arg(image::proc_path(&file));
    build::run(config, &mut command, "the scratch disk's template")?;
    image::publish(&file, path)?;
    Ok(file)
}

/// Shares the blocks of `from` with `to` where the file system can, and copies what is not a hole where it cannot.
fn clone_file(from: &File, to: &File, path: &Path) -> Result<(), StorageError> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from
        .metadata()
        .map_err(StorageError::io("read the length of", path))?
        .len();
    to.set_len(len)
        .map_err(StorageError::io("size a clone of", path))?;
    let mut at = 0;
    while let Some((start, end)) =
        next_data(from, at, len).map_err(StorageError::errno("find data in", path))?
    {
        copy_range(from, to, start, end).map_err(StorageError::errno("copy data of", path))?;
        at = end;
    }
    Ok(())
}

fn next_data(file: &File, at: u64, len: u64) -> rustix::io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some((
        start,
        rustix::fs::seek(file, SeekFrom::Hole(start))?,
    )))
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> rustix::io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let left = usize::try_from(end.saturating_sub(source)).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(
            from.as_fd(),
            Some(&mut source),
            to.as_fd(),
            Some(&mut target),
            left,
        )?;
        if copied == 0 {
            return Err(rustix::io::Errno::IO);
        }
    }
    Ok(())
}
