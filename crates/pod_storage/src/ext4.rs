// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Sparse files with an empty ext4, cloned from templates that are made once per size.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use ids::Bytes;
use rustix::fs::SeekFrom;

use crate::build;
use crate::error::StorageError;
use crate::image;

/// The most bytes that are copied at a time.
const CHUNK: u64 = 64 << 10;

/// What a file system is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The pod's writable layers. The file has no name and goes with its VM: it needs no journal, and a node that loses
    /// power has none left over.
    Scratch,
    /// An emptyDir, which outlives a VM that is killed: it has a journal, the smallest that there is (1024 blocks), and
    /// no spare superblocks, because its own blocks count against the volume's sizeLimit.
    Volume,
}

impl Use {
    /// Another way of formatting makes another template.
    fn template(self, size: Bytes) -> String {
        let mib = size.0 >> 20;
        match self {
            Self::Scratch => format!("scratch-{mib}-v2.ext4"),
            Self::Volume => format!("volume-{mib}-v1.ext4"),
        }
    }

    /// The file is all zeros: inode tables need no writing, neither now nor by the guest.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Scratch => &[
                "-O",
                "^has_journal,^resize_inode",
                "-E",
                "assume_storage_prezeroed=1,nodiscard",
            ],
            Self::Volume => &[
                "-b",
                "4096",
                "-J",
                "size=4",
                "-O",
                "^resize_inode,sparse_super2",
                "-E",
                "assume_storage_prezeroed=1,nodiscard,num_backup_sb=0",
            ],
        }
    }
}

/// Makes `to`, an empty file, an empty file system.
pub(crate) fn fill(config: &pod_spec::Storage, wanted: Use, to: &File) -> Result<(), StorageError> {
    let path = config
        .cache_dir
        .join(wanted.template(config.scratch.into()));
    let template = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_template(config, wanted, &path)?
        }
        Err(error) => return Err(StorageError::io("open", &path)(error)),
    };
    clone_file(&template, to, &path)
}

fn make_template(
    config: &pod_spec::Storage,
    wanted: Use,
    path: &Path,
) -> Result<File, StorageError> {
    let _lock = image::lock(&config.cache_dir.join("images"), "0")?;
    if let Ok(file) = File::open(path) {
        return Ok(file);
    }
    let file = image::unnamed_file(&config.cache_dir)?;
    file.set_len(Bytes::from(config.scratch).0)
        .map_err(StorageError::io("size", path))?;
    let mut command = Command::new(&config.mkfs_ext4);
    command
        .args(["-q", "-F", "-m", "0"])
        .args(wanted.arguments())
        .arg(image::proc_path(&file));
    build::run(config, &mut command, "the template of a disk")?;
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
        copy_range(from, to, start, end).map_err(StorageError::io("copy data of", path))?;
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

/// By reading and writing: the two may be on file systems of different kinds, between which the kernel copies nothing.
fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let wanted = end.saturating_sub(at).min(CHUNK);
        let mut chunk = vec![0; usize::try_from(wanted).unwrap_or_default()];
        from.read_exact_at(&mut chunk, at)?;
        to.write_all_at(&chunk, at)?;
        at = at.saturating_add(wanted);
    }
    Ok(())
}
