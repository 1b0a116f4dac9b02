// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The cache of EROFS images, one file per chain of layers, shared by all pods of the node.
//!
//! An image's name is a hash of what identifies its layers: path, device, inode, birth time and modification time of
//! each. A snapshotter never changes a committed layer and never reuses its directory, so nothing inside needs reading;
//! birth time tells a directory from an earlier one of the same name and number.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ids::{ContainerId, DiskSerial};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use sha2::{Digest, Sha256};

use crate::build;
use crate::error::StorageError;

/// Part of every key: another way of building makes another image.
const FORMAT: &[u8] = b"coffer erofs 1";

/// The file system's magic number and where it is (Linux, `erofs_fs.h`).
const EROFS_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();
const EROFS_MAGIC_AT: u64 = 1024;

/// The image of a chain of layers, topmost first; built if there is none yet. Processes that want the same image at one
/// time build it once.
pub(crate) fn cached(
    config: &pod_spec::Storage,
    lowers: &[PathBuf],
) -> Result<(DiskSerial, File), StorageError> {
    let key = key(lowers)?;
    let serial = serial("i", &key)?;
    let images = config.cache_dir.join("images");
    let path = images.join(format!("{key}.erofs"));
    if let Some(file) = open_image(&path)? {
        return Ok((serial, file));
    }
    let _lock = lock(&images, &key)?;
    if let Some(file) = open_image(&path)? {
        return Ok((serial, file));
    }
    tracing::info!(image = %key, layers = lowers.len(), "building the image of a layer chain");
    let started = std::time::Instant::now();
    let file = build::erofs(config, lowers)?;
    publish(&file, &path)?;
    let elapsed_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    tracing::info!(image = %key, phase = "image_build", elapsed_us, "built the image of a layer chain");
    let file = open_image(&path)?.ok_or_else(|| {
        StorageError::io("read back", &path)(io::Error::other("the image has no EROFS superblock"))
    })?;
    Ok((serial, file))
}

/// An image of a layer that a snapshotter has made. It never changes, so containers that name it share it.
pub(crate) fn foreign(path: &Path) -> Result<(DiskSerial, File), StorageError> {
    let file = open_image(path)?.ok_or_else(|| {
        StorageError::io("open", path)(io::Error::other("no EROFS image is there"))
    })?;
    let key = key(std::slice::from_ref(&path.to_owned()))?;
    Ok((serial("e", &key)?, file))
}

/// An image of one container's own directory. It has no name and goes with its last user.
pub(crate) fn build_private(
    config: &pod_spec::Storage,
    directories: &[PathBuf],
) -> Result<File, StorageError> {
    let file = build::erofs(config, directories)?;
    reopen_read_only(&file, &config.cache_dir)
}

/// The serial number of a disk that is container `id`'s alone; `prefix` tells its kinds apart.
pub(crate) fn private_serial(prefix: &str, id: &ContainerId) -> Result<DiskSerial, StorageError> {
    serial(prefix, &hex(&Sha256::digest(id.as_str())))
}

/// An unnamed file in `directory`.
pub(crate) fn unnamed_file(directory: &Path) -> Result<File, StorageError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(StorageError::errno(
            "open an unnamed file (O_TMPFILE) in",
            directory,
        ))
}

/// Gives an unnamed file its name, once its bytes are on the disk. Another one of that name, which an earlier process
/// may have left damaged, is replaced.
pub(crate) fn publish(file: &File, path: &Path) -> Result<(), StorageError> {
    file.sync_data().map_err(StorageError::io("sync", path))?;
    match std::fs::remove_file(path) {
        Ok(()) => tracing::warn!(path = %path.display(), "replaced a damaged file"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(StorageError::io("remove", path)(error)),
    }
    rustix::fs::linkat(CWD, proc_path(file), CWD, path, AtFlags::SYMLINK_FOLLOW)
        .map_err(StorageError::errno("name", path))
}

/// The path by which a child process opens one of our files; it resolves in this process and its threads.
pub(crate) fn proc_path(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}

/// A read-only descriptor for an unnamed file, so that what is handed to a VMM cannot be written.
fn reopen_read_only(file: &File, directory: &Path) -> Result<File, StorageError> {
    File::open(proc_path(file)).map_err(StorageError::io("reopen an image in", directory))
}

/// Locks one key of the cache until the file is dropped: a byte of a lock file, so that a process that dies leaves
/// neither lock nor file behind. Two keys that share a byte merely wait for each other.
pub(crate) fn lock(directory: &Path, key: &str) -> Result<File, StorageError> {
    let path = directory.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(StorageError::io("open", &path))?;
    let byte = i64::from_str_radix(key.get(..8).unwrap_or("0"), 16).unwrap_or(0);
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or(1),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLKW(&lock)) {
            Ok(_) => return Ok(file),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(StorageError::errno("lock", &path)(errno)),
        }
    }
}

/// The image at `path`, or `None` if there is none or it is damaged.
fn open_image(path: &Path) -> Result<Option<File>, StorageError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StorageError::io("open", path)(error)),
    };
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, EROFS_MAGIC_AT) {
        Ok(()) => Ok((magic == EROFS_MAGIC).then_some(file)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(StorageError::io("read", path)(error)),
    }
}

fn key(lowers: &[PathBuf]) -> Result<String, StorageError> {
    let mut hash = Sha256::new();
    hash.update(FORMAT);
    for lower in lowers {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(CWD, lower, AtFlags::empty(), wanted)
            .map_err(StorageError::errno("read the identity of", lower))?;
        let path = lower.as_os_str().as_bytes();
        hash.update(path.len().to_le_bytes());
        hash.update(path);
        let mut numbers = vec![
            u64::from(stat.stx_dev_major),
            u64::from(stat.stx_dev_minor),
            stat.stx_ino,
        ];
        for time in [stat.stx_btime, stat.stx_mtime] {
            numbers.extend([time.tv_sec.cast_unsigned(), u64::from(time.tv_nsec)]);
        }
        for number in numbers {
            hash.update(number.to_le_bytes());
        }
    }
    Ok(hex(&hash.finalize()))
}

/// `prefix` and as much of a hash as a serial number holds.
pub(crate) fn serial(prefix: &str, hash: &str) -> Result<DiskSerial, StorageError> {
    let text: String = prefix.chars().chain(hash.chars()).take(20).collect();
    text.parse().map_err(StorageError::Serial)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
