// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The volumes of requests as values that make sense: names of one part, paths that stay below.

use std::path::PathBuf;

use agent_proto::{api, layout};

use crate::Error;
use crate::plan::{CopiedFile, DiskPlan, copied_file, device_name, plain_path};

/// The most volumes, and the most parts of volumes, that one container may mount.
pub const MAX_VOLUMES: usize = 256;

/// The most mounts below host directories that one container is told of: 256 for each of its 64 directories.
pub const MAX_WRITABLE_MOUNTS: usize = 16_384;

/// The longest tag of a file system (virtio v1.3 §5.11.4).
const MAX_TAG_LEN: usize = 36;

/// The longest name of a volume (`NAME_MAX`).
pub const MAX_VOLUME_NAME_LEN: usize = 255;

/// An emptyDir of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlan {
    /// Its name: one path component.
    pub name: String,
    /// What it is kept in.
    pub medium: MediumPlan,
    /// Of its root.
    pub owner: OwnerPlan,
}

/// What a volume is kept in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MediumPlan {
    /// A disk of its own.
    Disk(DiskPlan),
    /// A tmpfs of so many bytes; `None` leaves the kernel's default.
    Memory(Option<u64>),
    /// A hugetlbfs with pages of so many bytes; `None` leaves the kernel's default.
    HugePages(Option<u64>),
}

/// Whose a directory is, and for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerPlan {
    /// Permission bits, set-group-ID among them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A part of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubPathPlan {
    /// Its number among the container's.
    pub index: u32,
    /// Where the volume is.
    pub volume: PathBuf,
    /// Relative to the volume, of plain components only.
    pub path: PathBuf,
    /// Of the directory, if it has to be made.
    pub owner: OwnerPlan,
}

/// The host's own directories that a container mounts, all in one file system of the pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFoldersPlan {
    /// By which the guest finds the file system.
    pub tag: String,
    /// The platform device to bind first, if any.
    pub bind_device: Option<String>,
    /// The directories' names, one path component each.
    pub names: Vec<String>,
    /// Mounts below them, relative to the file system's root, to be there before a container is made.
    pub writable_mounts: Vec<PathBuf>,
}

/// One part of what a volume is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutPlan {
    /// The volume's name: one path component.
    pub volume: String,
    /// Counts from 0.
    pub part: u32,
    /// Whether the volume is to change now.
    pub last: bool,
    /// Parents before what is in them.
    pub entries: Vec<CopiedFile>,
}

impl PutPlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(request: api::PutFilesRequest) -> Result<Self, Error> {
        check_name("volume", &request.volume)?;
        let entries = request.entries.into_iter().map(copied_file);
        Ok(Self {
            volume: request.volume,
            part: request.part,
            last: request.last,
            entries: entries.collect::<Result<_, _>>()?,
        })
    }
}

impl HostFoldersPlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(folders: api::HostFolders) -> Result<Self, Error> {
        let tag = folders.tag;
        if !(1..=MAX_TAG_LEN).contains(&tag.len()) || tag.contains('\0') {
            return Err(Error::bad(
                "host_folders.tag",
                format!("{tag:?} is no tag of 1 to {MAX_TAG_LEN} bytes"),
            ));
        }
        let len = folders.names.len();
        if len > MAX_VOLUMES {
            return Err(Error::bad(
                "host_folders.names",
                format!("are {len}, at most {MAX_VOLUMES} are allowed"),
            ));
        }
        for name in &folders.names {
            check_name("host_folders.names", name)?;
        }
        let len = folders.writable_mounts.len();
        if len > MAX_WRITABLE_MOUNTS {
            return Err(Error::bad(
                "host_folders.writable_mounts",
                format!("are {len}, at most {MAX_WRITABLE_MOUNTS} are allowed"),
            ));
        }
        let writable_mounts = folders
            .writable_mounts
            .iter()
            .map(|path| plain_path("host_folders.writable_mounts", path))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            tag,
            bind_device: device_name("host_folders.bind_device", folders.bind_device)?,
            names: folders.names,
            writable_mounts,
        })
    }
}

impl VolumePlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(volume: api::Volume) -> Result<Self, Error> {
        check_name("volumes.name", &volume.name)?;
        let some = |bytes: u64| (bytes != 0).then_some(bytes);
        let medium = match volume.medium {
            Some(api::volume::Medium::Disk(disk)) => MediumPlan::Disk(DiskPlan::parse(disk)?),
            Some(api::volume::Medium::MemoryBytes(bytes)) => MediumPlan::Memory(some(bytes)),
            Some(api::volume::Medium::HugePageBytes(bytes)) => MediumPlan::HugePages(some(bytes)),
            _ => {
                return Err(Error::bad(
                    "volumes.medium",
                    format!("of {} is missing", volume.name),
                ));
            }
        };
        Ok(Self {
            name: volume.name,
            medium,
            owner: OwnerPlan {
                mode: volume.mode & 0o7777,
                uid: volume.uid,
                gid: volume.gid,
            },
        })
    }

    /// Where the volume is in the guest.
    pub fn place(&self) -> PathBuf {
        PathBuf::from(match self.medium {
            MediumPlan::Disk(_) => layout::disk_volume(&self.name),
            MediumPlan::Memory(_) | MediumPlan::HugePages(_) => layout::memory_volume(&self.name),
        })
    }
}

impl SubPathPlan {
    /// A part of one of `volumes`.
    ///
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(part: api::SubPath, volumes: &[VolumePlan]) -> Result<Self, Error> {
        let volume = volumes
            .iter()
            .find(|volume| volume.name == part.volume)
            .ok_or_else(|| {
                Error::bad(
                    "sub_paths.volume",
                    format!("{:?} is none of the volumes", part.volume),
                )
            })?
            .place();
        if part.path.is_empty() {
            return Err(Error::bad("sub_paths.path", "is empty"));
        }
        Ok(Self {
            index: part.index,
            volume,
            path: plain_path("sub_paths.path", &part.path)?,
            owner: OwnerPlan {
                mode: part.mode & 0o7777,
                uid: part.uid,
                gid: part.gid,
            },
        })
    }
}

/// Both lists of a request.
///
/// # Errors
/// [`Error::BadRequest`].
pub(crate) fn parse_all(
    volumes: Vec<api::Volume>,
    parts: Vec<api::SubPath>,
) -> Result<(Vec<VolumePlan>, Vec<SubPathPlan>), Error> {
    for (field, len) in [("volumes", volumes.len()), ("sub_paths", parts.len())] {
        if len > MAX_VOLUMES {
            return Err(Error::bad(
                field,
                format!("are {len}, at most {MAX_VOLUMES} are allowed"),
            ));
        }
    }
    let volumes = volumes
        .into_iter()
        .map(VolumePlan::parse)
        .collect::<Result<Vec<_>, _>>()?;
    let parts = parts
        .into_iter()
        .map(|part| SubPathPlan::parse(part, &volumes))
        .collect::<Result<_, _>>()?;
    Ok((volumes, parts))
}

/// Checks that a volume's name is one path component.
///
/// # Errors
/// [`Error::BadRequest`].
pub(crate) fn check_name(field: &str, name: &str) -> Result<(), Error> {
    let plain = !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..";
    if plain && name.len() <= MAX_VOLUME_NAME_LEN {
        return Ok(());
    }
    Err(Error::bad(field, format!("{name:?} is no volume's name")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str) -> api::Volume {
        api::Volume {
            name: name.to_owned(),
            medium: Some(api::volume::Medium::Disk(api::Disk {
                serial: "v1".to_owned(),
                fs_type: "ext4".to_owned(),
                ..Default::default()
            })),
            mode: 0o42777,
            ..Default::default()
        }
    }

    fn part(volume: &str, path: &str) -> api::SubPath {
        api::SubPath {
            volume: volume.to_owned(),
            path: path.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn volume_is_one_component_below_the_volumes() {
        let plan = VolumePlan::parse(volume("u.v")).unwrap();
        assert_eq!(
            plan.place(),
            PathBuf::from("/run/coffer/volume_disks/u.v/content")
        );
        assert_eq!(plan.owner.mode, 0o2777);
        for name in ["", ".", "..", "a/b", "a\0", &"x".repeat(256)] {
            VolumePlan::parse(volume(name)).unwrap_err();
        }
        VolumePlan::parse(volume(&"x".repeat(255))).unwrap();
    }

    #[test]
    fn host_folders_are_single_names_in_one_file_system() {
        let parse = |tag: &str, device: &str, names: &[&str]| {
            HostFoldersPlan::parse(api::HostFolders {
                tag: tag.to_owned(),
                bind_device: device.to_owned(),
                names: names.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            })
        };
        parse("host", "virtio-mmio.30", &["rw-1", "ro-2"]).unwrap();
        assert_eq!(parse("host", "", &[]).unwrap().bind_device, None);
        parse(&"x".repeat(MAX_TAG_LEN), "", &["a"; MAX_VOLUMES]).unwrap();
        parse(&"x".repeat(MAX_TAG_LEN + 1), "", &[]).unwrap_err();
        parse("host", "", &["a"; MAX_VOLUMES + 1]).unwrap_err();
        let mounts = |paths: Vec<&str>| {
            HostFoldersPlan::parse(api::HostFolders {
                tag: "host".to_owned(),
                writable_mounts: paths.into_iter().map(str::to_owned).collect(),
                ..Default::default()
            })
        };
        mounts(vec!["ro-1/a/b"; MAX_WRITABLE_MOUNTS]).unwrap();
        mounts(vec!["ro-1/a/b"; MAX_WRITABLE_MOUNTS + 1]).unwrap_err();
        mounts(vec!["ro-1/../b"]).unwrap_err();
        for (tag, device, name) in [
            ("", "", "a"),
            ("a\0", "", "a"),
            ("host", "../x", "a"),
            ("host", "", ".."),
            ("host", "", "a/b"),
            ("host", "", ""),
        ] {
            parse(tag, device, &[name]).unwrap_err();
        }
    }

    #[test]
    fn part_is_below_a_volume_of_the_request() {
        let parse = |parts| parse_all(vec![volume("v")], parts);
        parse(vec![part("v", "a/b")]).unwrap();
        for (volume, path) in [("w", "a"), ("v", ""), ("v", "/a"), ("v", "a/../b")] {
            parse(vec![part(volume, path)]).unwrap_err();
        }
        parse(vec![part("v", "a"); MAX_VOLUMES]).unwrap();
        parse(vec![part("v", "a"); MAX_VOLUMES + 1]).unwrap_err();
    }
}
