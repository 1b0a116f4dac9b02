// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device files of a container (OCI runtime specification, config-linux, "Default Devices").

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat, symlinkat,
};
use rustix::io::Errno;

use super::inside::Root;
use crate::Error;
use crate::error::Context as _;

/// Path, major and minor number of the devices that each container has.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

struct Device {
    path: PathBuf,
    kind: FileType,
    number: Dev,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Makes `devices`, and where `own_dev` says that `/dev` is the container's own, the default devices and links.
///
/// # Errors
/// [`Error`] for the first that cannot be made.
pub(super) fn make(root: &Root, devices: &[LinuxDevice], own_dev: bool) -> Result<(), Error> {
    if own_dev {
        for (path, major, minor) in DEFAULT {
            let device = Device {
                path: path.into(),
                kind: FileType::CharacterDevice,
                number: makedev(major, minor),
                mode: 0o666,
                uid: 0,
                gid: 0,
            };
            make_one(root, &device)?;
        }
        for (path, target) in LINKS {
            let (parent, name) = root.make_parent(Path::new(path))?;
            match symlinkat(target, &parent, name) {
                Ok(()) | Err(Errno::EXIST) => {}
                other => other.step(|| format!("making the link {path}"))?,
            }
        }
    }
    devices
        .iter()
        .map(parse)
        .try_for_each(|device| make_one(root, &device?))
}

fn parse(device: &LinuxDevice) -> Result<Device, Error> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            return Err(Error::invalid(
                format!("linux.devices[{}].type", device.path().display()),
                "is \"a\", which only a cgroup rule can be",
            ));
        }
    };
    let number = |value: i64, what: &str| {
        u32::try_from(value).map_err(|_| {
            Error::invalid(
                format!("linux.devices[{}].{what}", device.path().display()),
                format!("is {value}"),
            )
        })
    };
    let number = if kind == FileType::Fifo {
        0
    } else {
        makedev(
            number(device.major(), "major")?,
            number(device.minor(), "minor")?,
        )
    };
    Ok(Device {
        path: device.path().clone(),
        kind,
        number,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

fn make_one(root: &Root, device: &Device) -> Result<(), Error> {
    let step = || format!("making the device {}", device.path.display());
    let (parent, name) = root.make_parent(&device.path)?;
    match mknodat(
        &parent,
        &name,
        device.kind,
        Mode::from_raw_mode(device.mode),
        device.number,
    ) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let found = statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).step(step)?;
            if FileType::from_raw_mode(found.st_mode) != device.kind
                || found.st_rdev != device.number
            {
                return Err(Errno::EXIST).step(step);
            }
        }
        other => return other.step(step),
    }
    // mknodat obeys the umask.
    chmodat(
        &parent,
        &name,
        Mode::from_raw_mode(device.mode),
        AtFlags::empty(),
    )
    .step(step)?;
    chownat(
        &parent,
        &name,
        Some(Uid::from_raw(device.uid)),
        Some(Gid::from_raw(device.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .step(step)
}
