// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block devices of the host as disks of the VM. The spec names one by its number; the kernel tells its file's name, and
//! what has been opened is looked at once more, for the name may have come to mean another device.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use agent_proto::api;
use hypervisor::{Disk, DiskAccess};
use pod_spec::BlockDevice;
use rustix::fs::{major, minor};

use crate::error::StorageError;

/// A block device for the guest.
#[derive(Debug)]
pub struct BlockVolume {
    /// For the agent; it lacks the device to bind.
    pub device: api::BlockDevice,
    /// The disk. Another VM may have it too: so it is with claims of access mode ReadWriteMany.
    pub disk: Disk,
}

/// The block devices for the guest.
///
/// # Errors
/// [`StorageError::Io`] for one that is not there, or is not to be opened; [`StorageError::NameNotUtf8`].
pub fn block_devices(devices: &[BlockDevice]) -> Result<Vec<BlockVolume>, StorageError> {
    devices.iter().map(block_device).collect()
}

fn block_device(device: &BlockDevice) -> Result<BlockVolume, StorageError> {
    let path = device.path.to_str();
    let path = path.ok_or_else(|| StorageError::NameNotUtf8(device.path.clone()))?;
    let (access, suffix) = if device.is_writable() {
        (DiskAccess::ReadWrite, "rw")
    } else {
        (DiskAccess::ReadOnly, "ro")
    };
    let (major, minor) = device.number;
    let disk = Disk {
        serial: format!("b{major}-{minor}-{suffix}")
            .parse()
            .map_err(StorageError::Serial)?,
        file: open(device.number, access)?,
        access,
    };
    Ok(BlockVolume {
        device: api::BlockDevice {
            serial: disk.serial.to_string(),
            path: path.to_owned(),
            access: device.access.clone(),
            mode: device.mode,
            uid: device.uid,
            gid: device.gid,
            ..Default::default()
        },
        disk,
    })
}

fn open(number: (u32, u32), access: DiskAccess) -> Result<File, StorageError> {
    let known = PathBuf::from(format!("/sys/dev/block/{}:{}/uevent", number.0, number.1));
    let text =
        fs::read_to_string(&known).map_err(StorageError::io("find the block device", &known))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.unwrap_or_default());
    // Not waiting for a drive to be ready.
    let file = File::options()
        .read(true)
        .write(access == DiskAccess::ReadWrite)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(StorageError::io("open the block device", &path))?;
    let metadata = file
        .metadata()
        .map_err(StorageError::io("look at the block device", &path))?;
    let found = (major(metadata.rdev()), minor(metadata.rdev()));
    if metadata.file_type().is_block_device() && found == number {
        return Ok(file);
    }
    let reason = io::Error::other(format!("it is not the device {}:{}", number.0, number.1));
    Err(StorageError::io("open the block device", &path)(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: (u32, u32), access: &str) -> BlockDevice {
        BlockDevice {
            path: "/dev/xvda".into(),
            number,
            access: access.to_owned(),
            mode: 0o660,
            uid: 0,
            gid: 6,
        }
    }

    /// A block device of this machine that root can open, if there is any.
    fn any() -> Option<(u32, u32)> {
        fs::read_dir("/sys/dev/block")
            .ok()?
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (major, minor) = name.split_once(':')?;
                let number = (major.parse().ok()?, minor.parse().ok()?);
                open(number, DiskAccess::ReadOnly).ok().map(|_| number)
            })
    }

    #[test]
    fn device_is_opened_by_its_number_as_its_rule_says() {
        let Some(number) = any() else {
            return;
        };
        let made = block_devices(&[device(number, "rm")]).unwrap().remove(0);
        let expected = format!("b{}-{}-ro", number.0, number.1);
        assert_eq!(made.device.serial, expected);
        assert_eq!(made.disk.serial.as_str(), expected);
        assert_eq!(made.disk.access, DiskAccess::ReadOnly);
        assert_eq!((made.device.mode, made.device.gid), (0o660, 6));
        let status = rustix::fs::fcntl_getfl(&made.disk.file).unwrap();
        assert!(!status.contains(rustix::fs::OFlags::RDWR), "{status:?}");
    }

    #[test]
    fn device_that_is_not_there_is_named() {
        let error = block_devices(&[device((4000, 77), "rwm")]).unwrap_err();
        assert!(error.to_string().contains("4000:77"), "{error}");
        assert!(error.is_not_found());
    }
}
