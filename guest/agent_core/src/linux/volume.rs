// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! EmptyDirs: made by the first container that names one, and kept until the guest ends. Containers get bind mounts of
//! them. One on a disk is a directory of that disk, which may be from an earlier guest of the pod: then it is as that
//! left it. A part of one (subPath) is mounted by the agent itself from a descriptor: the volume's contents are its
//! containers' to change at any time, and a path through them could be led elsewhere between a look and a mount.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fstat, mkdirat,
    open, openat2,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::disk;
use super::mount::{mount_filesystem, unmount};
use crate::Error;
use crate::error::Context as _;
use crate::plan::DiskPlan;
use crate::volume_plan::{MediumPlan, OwnerPlan, SubPathPlan, VolumePlan};

/// The volumes that have been made.
#[derive(Debug, Default)]
pub(super) struct Volumes(Mutex<BTreeSet<PathBuf>>);

impl Volumes {
    /// Makes the volume at `place`, unless it was made before.
    ///
    /// # Errors
    /// [`Error::Step`].
    pub(super) fn make(&self, plan: &VolumePlan, place: &Path) -> Result<(), Error> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if made.contains(place) {
            return Ok(());
        }
        match &plan.medium {
            MediumPlan::Disk(disk) => on_disk(plan, disk, place)?,
            MediumPlan::Memory(size) => in_memory(plan, ("tmpfs", "size", *size), place)?,
            MediumPlan::HugePages(size) => {
                in_memory(plan, ("hugetlbfs", "pagesize", *size), place)?
            }
        }
        made.insert(place.to_owned());
        Ok(())
    }
}

/// Mounts the file system `kind`, with a number of bytes as its option.
fn in_memory(
    plan: &VolumePlan,
    (kind, key, size): (&str, &str, Option<u64>),
    place: &Path,
) -> Result<(), Error> {
    let step = || format!("making the volume {}", plan.name);
    fs::create_dir_all(place).step(step)?;
    let options: Vec<String> = size
        .map(|bytes| format!("{key}={bytes}"))
        .into_iter()
        .collect();
    mount_filesystem(kind, None, &options, place, false)?;
    // By calls, and not by mount options: those of hugetlbfs know no set-group-ID.
    if let Err(error) = own(place, plan.owner) {
        unmount(place)?;
        return Err(error).step(step);
    }
    Ok(())
}

/// Mounts a disk at the parent of `place`.
fn on_disk(plan: &VolumePlan, disk: &DiskPlan, place: &Path) -> Result<(), Error> {
    let top = place.parent().unwrap_or(place);
    disk::mount(disk, top, false)
        .and_then(|()| {
            directory_on_disk(plan, place).inspect_err(|_| {
                // The error is the one to tell, not what comes of it.
                let _ = unmount(top);
            })
        })
        .inspect_err(|_| {
            if let Some(device) = &disk.bind_device {
                let _ = disk::unbind(device);
            }
        })
}

/// Makes the volume's directory, unless an earlier guest has done so. It gets its name when it has its owner and mode.
fn directory_on_disk(plan: &VolumePlan, place: &Path) -> Result<(), Error> {
    if fs::symlink_metadata(place).is_ok() {
        return Ok(());
    }
    let new = place.with_extension("new");
    (|| {
        fs::create_dir_all(&new)?;
        own(&new, plan.owner)?;
        fs::rename(&new, place)
    })()
    .step(|| format!("making the volume {}", plan.name))
}

fn own(place: &Path, owner: OwnerPlan) -> std::io::Result<()> {
    // The owner first: changing it takes set-group-ID away.
    std::os::unix::fs::chown(place, Some(owner.uid), Some(owner.gid))?;
    fs::set_permissions(place, fs::Permissions::from_mode(owner.mode))
}

/// Mounts a part of a volume at `place`. Links in the volume are followed as long as they stay within it, as a kubelet
/// does; what is missing is made.
///
/// # Errors
/// [`Error::Step`].
pub(super) fn mount_part(part: &SubPathPlan, place: &Path) -> Result<(), Error> {
    let step = || {
        let volume = part.volume.display();
        format!("mounting {} of the volume {volume}", part.path.display())
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let volume = open(&part.volume, flags, Mode::empty()).step(step)?;
    let found = open_or_make(&volume, part).step(step)?;
    let parent = place.parent().unwrap_or(place);
    fs::create_dir_all(parent).step(step)?;
    match FileType::from_raw_mode(fstat(&found).step(step)?.st_mode) {
        FileType::Directory => fs::create_dir(place).step(step)?,
        // A file, a socket or a pipe: what is mounted over is replaced whole.
        _ => drop(fs::File::create_new(place).step(step)?),
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&found, c"", flags).step(step)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, c"", CWD, place, flags).step(step)
}

fn open_or_make(volume: &OwnedFd, part: &SubPathPlan) -> rustix::io::Result<OwnedFd> {
    match open_beneath(volume, &part.path) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut here = PathBuf::new();
    for component in part.path.components() {
        let Component::Normal(name) = component else {
            return Err(Errno::INVAL);
        };
        let parent = if here.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &here
        };
        let parent = open_beneath(volume, parent)?;
        match mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => own_made(volume, &parent, name, &here.join(name), part.owner)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        here.push(name);
    }
    open_beneath(volume, &part.path)
}

fn own_made(
    volume: &OwnedFd,
    parent: &OwnedFd,
    name: &std::ffi::OsStr,
    path: &Path,
    owner: OwnerPlan,
) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(parent, name, Some(uid), Some(gid), flags)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let made = openat2(volume, path, flags, Mode::empty(), resolve)?;
    fchmod(&made, Mode::from_raw_mode(owner.mode))
}

fn open_beneath(volume: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(volume, path, flags, Mode::empty(), resolve)
}

/// Unmounts all parts of volumes at `directory`, and removes it. None is no error.
///
/// # Errors
/// [`Error::Step`].
pub(super) fn unmount_parts(directory: &Path) -> Result<(), Error> {
    let step = || format!("removing {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.step(step)?,
    };
    for entry in entries {
        let place = entry.step(step)?.path();
        unmount(&place)?;
        // Never what is behind a mount: a directory goes only if it is empty.
        if fs::symlink_metadata(&place).step(step)?.is_dir() {
            fs::remove_dir(&place).step(step)?;
        } else {
            fs::remove_file(&place).step(step)?;
        }
    }
    fs::remove_dir(directory).step(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    fn owner(mode: u32) -> OwnerPlan {
        let own = fs::metadata("/proc/self").unwrap();
        OwnerPlan {
            mode,
            uid: own.uid(),
            gid: own.gid(),
        }
    }

    fn plan(medium: MediumPlan, mode: u32) -> VolumePlan {
        VolumePlan {
            name: "v".to_owned(),
            medium,
            owner: owner(mode),
        }
    }

    fn part(volume: &Path, path: &str) -> SubPathPlan {
        SubPathPlan {
            index: 0,
            volume: volume.to_owned(),
            path: path.into(),
            owner: owner(0o750),
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    /// Whether mounts of this thread are its own from here on: not where nobody but root may make them.
    fn own_mounts() -> bool {
        use rustix::mount::{MountPropagationFlags, mount_change};
        if !rustix::process::geteuid().is_root() {
            return false;
        }
        #[expect(unsafe_code, reason = "the mounts of a test are its thread's own")]
        // SAFETY: only the calling thread's mount namespace changes; no descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags).unwrap();
        true
    }

    fn disk() -> DiskPlan {
        DiskPlan {
            serial: "none-has-this".parse().unwrap(),
            bind_device: Some("virtio-mmio.none".to_owned()),
            fs_type: "ext4",
            options: Vec::new(),
        }
    }

    #[test]
    fn volume_on_a_disk_is_made_once_with_owner_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("content");
        let make = |mode| directory_on_disk(&plan(MediumPlan::Disk(disk()), mode), &place);
        make(0o2770).unwrap();
        assert_eq!(mode(&place), 0o2770);
        fs::write(place.join("kept"), "x").unwrap();
        // Another guest, after a container has changed it.
        fs::set_permissions(&place, fs::Permissions::from_mode(0o711)).unwrap();
        make(0o2770).unwrap();
        assert_eq!(mode(&place), 0o711);
        assert!(place.join("kept").exists());
        let entries = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(entries, 1, "nothing else is left");
    }

    #[test]
    fn volume_whose_disk_is_not_there_is_named_and_can_be_made_later() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("disk/content");
        let volumes = Volumes::default();
        for _ in 0..2 {
            let plan = plan(MediumPlan::Disk(disk()), 0o777);
            let error = volumes.make(&plan, &place).unwrap_err();
            assert!(
                error.chain().contains("virtio-mmio.none"),
                "{}",
                error.chain()
            );
        }
        assert!(!place.exists());
    }

    #[test]
    fn volume_in_memory_holds_no_more_than_its_size() {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v");
        let volumes = Volumes::default();
        for _ in 0..2 {
            volumes
                .make(&plan(MediumPlan::Memory(Some(64 << 10)), 0o2777), &place)
                .unwrap();
        }
        assert_eq!(mode(&place), 0o2777);
        fs::write(place.join("small"), vec![0; 32 << 10]).unwrap();
        let error = fs::write(place.join("large"), vec![0; 64 << 10]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        unmount(&place).unwrap();
    }

    #[test]
    fn volume_of_huge_pages_has_owner_mode_and_page_size() {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v");
        let medium = MediumPlan::HugePages(Some(2 << 20));
        let made = Volumes::default().make(&plan(medium, 0o2770), &place);
        if !fs::read_to_string("/proc/filesystems")
            .unwrap()
            .contains("hugetlbfs")
        {
            assert!(made.unwrap_err().chain().contains("hugetlbfs"));
            return;
        }
        made.unwrap();
        assert_eq!(mode(&place), 0o2770);
        assert_eq!(rustix::fs::statfs(&place).unwrap().f_bsize, 2 << 20);
        unmount(&place).unwrap();
    }

    #[test]
    fn part_is_mounted_and_unmounted_without_loss() {
        if !own_mounts() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "content").unwrap();
        symlink("made/there", volume.join("link")).unwrap();
        let places = dir.path().join("parts");
        for (name, path) in [("0", "made/there"), ("1", "file"), ("2", "link")] {
            mount_part(&part(&volume, path), &places.join(name)).unwrap();
        }
        assert_eq!(mode(&volume.join("made/there")), 0o750);
        assert_eq!(fs::read(places.join("1")).unwrap(), b"content");
        fs::write(places.join("0/note"), "kept").unwrap();
        assert_eq!(fs::read(places.join("2/note")).unwrap(), b"kept");
        unmount_parts(&places).unwrap();
        assert!(!places.exists());
        assert_eq!(fs::read(volume.join("made/there/note")).unwrap(), b"kept");
        unmount_parts(&places).unwrap();
    }

    #[test]
    fn part_that_a_link_leads_out_of_its_volume_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir(&volume).unwrap();
        symlink("/", volume.join("absolute")).unwrap();
        symlink("..", volume.join("up")).unwrap();
        for path in ["absolute", "absolute/etc", "up", "up/new"] {
            let error = mount_part(&part(&volume, path), &dir.path().join("place")).unwrap_err();
            assert!(
                error.chain().contains("of the volume") && error.chain().contains("os error 18"),
                "{}",
                error.chain()
            );
        }
        assert!(!dir.path().join("new").exists());
    }
}
