// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! EmptyDirs on disks of their own: each is a sparse file with a file system in the kubelet's directory of the volume.
//!
//! The kubelet enforces a sizeLimit, and a pod's limit of ephemeral storage, by what the files in that directory occupy,
//! and it tells no runtime of either. So the file must be there, have a name, and occupy what the guest uses: what the
//! guest frees, it discards. It is the volume for as long as the pod is on the node: a VM made anew finds it again, and
//! who removes the directory removes it.
//!
//! Only the kubelet and this process write there; the path is resolved all the same as if a link could be at its end, and
//! what has been opened is what is looked at.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use agent_proto::api;
use hypervisor::{Disk, DiskAccess};
use ids::Bytes;
use pod_spec::{EmptyDir, Medium};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::error::StorageError;
use crate::volumes::owner;
use crate::{ext4, image};

/// The file's name.
const IMAGE: &str = ".coffer.img";

/// The file system of an emptyDir's disk, and how the guest mounts it: what is deleted is given back to the host.
const FS_TYPE: &str = "ext4";
const OPTIONS: &str = "discard";

/// The most entries of an emptyDir that are looked at to tell whether the host has filled it: with more it has.
const MAX_LOOKED_AT: usize = 1024;

/// An emptyDir for the guest.
#[derive(Debug)]
pub struct EmptyDirVolume {
    /// For the agent. One on a disk lacks the device to bind.
    pub volume: api::Volume,
    /// The disk, if it has one. No other VM may use it at the same time.
    pub disk: Option<Disk>,
}

/// Those of `sources`, emptyDirs of medium Disk, in which there is something that neither the kubelet nor the guest has put
/// there: anything but directories (the kubelet makes those of subPaths) and the guest's own disk.
///
/// # Errors
/// [`StorageError::Io`] if one cannot be listed.
pub fn filled_by_the_host(sources: BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>, StorageError> {
    let mut filled = BTreeSet::new();
    for source in sources {
        if is_filled(&source)? {
            filled.insert(source);
        }
    }
    Ok(filled)
}

fn is_filled(source: &Path) -> Result<bool, StorageError> {
    if source.join(IMAGE).symlink_metadata().is_ok() {
        return Ok(false);
    }
    let mut looked_at = 0_usize;
    let mut pending = vec![source.to_owned()];
    while let Some(directory) = pending.pop() {
        let failed = || StorageError::io("list", &directory);
        for entry in fs::read_dir(&directory).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            looked_at = looked_at.saturating_add(1);
            // Not the type of what a link leads to.
            if looked_at > MAX_LOOKED_AT || !entry.file_type().map_err(failed())?.is_dir() {
                return Ok(true);
            }
            pending.push(entry.path());
        }
    }
    Ok(false)
}

/// The emptyDirs for the guest: it takes over the owner and mode that the kubelet gave each directory (fsGroup).
pub(crate) fn make(
    config: &pod_spec::Storage,
    volumes: &[EmptyDir],
) -> Result<Vec<EmptyDirVolume>, StorageError> {
    volumes
        .iter()
        .map(|volume| {
            use api::volume::Medium as Kind;
            let owner = owner(&volume.source)?;
            if !owner.directory {
                return Err(StorageError::NotADirectory(volume.source.clone()));
            }
            let (medium, disk) = match volume.medium {
                Medium::Disk => {
                    let disk = disk(config, volume)?;
                    (Kind::Disk(guest_disk(&disk)), Some(disk))
                }
                Medium::Memory(size) => (Kind::MemoryBytes(bytes(size)), None),
                Medium::HugePages(size) => (Kind::HugePageBytes(bytes(size)), None),
            };
            let volume = api::Volume {
                name: volume.name.clone(),
                medium: Some(medium),
                mode: owner.mode,
                uid: owner.uid,
                gid: owner.gid,
                ..Default::default()
            };
            Ok(EmptyDirVolume { volume, disk })
        })
        .collect()
}

fn bytes(size: Option<Bytes>) -> u64 {
    size.unwrap_or_default().0
}

fn guest_disk(disk: &Disk) -> api::Disk {
    api::Disk {
        serial: disk.serial.to_string(),
        fs_type: FS_TYPE.to_owned(),
        mount_options: vec![OPTIONS.to_owned()],
        ..Default::default()
    }
}

/// The disk that an emptyDir is kept on; made if there is none yet.
fn disk(config: &pod_spec::Storage, volume: &EmptyDir) -> Result<Disk, StorageError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&volume.source, flags, Mode::empty())
        .map(File::from)
        .map_err(StorageError::errno("open", &volume.source))?;
    let path = volume.source.join(IMAGE);
    let file = match open(&directory, &path)? {
        Some(file) => file,
        None => create(config, &directory, &path)?,
    };
    Ok(Disk {
        serial: image::serial("v", &image::hex(&Sha256::digest(&volume.name)))?,
        file,
        access: DiskAccess::ReadWrite,
    })
}

fn open(directory: &File, path: &Path) -> Result<Option<File>, StorageError> {
    // Not waiting for the other end of a pipe, nor for a device.
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = match rustix::fs::openat2(directory, IMAGE, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(StorageError::errno("open", path)(error)),
    };
    let metadata = file.metadata().map_err(StorageError::io("read", path))?;
    // The group may be the pod's: the kubelet gives it all that is in the volume (fsGroup).
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if metadata.is_file() && own && metadata.nlink() == 1 && metadata.len() > 0 {
        return Ok(Some(file));
    }
    Err(StorageError::NotADisk(path.to_owned()))
}

fn create(config: &pod_spec::Storage, directory: &File, path: &Path) -> Result<File, StorageError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, ".", flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(StorageError::errno("make an unnamed file for", path))?;
    ext4::fill(config, ext4::Use::Volume, &file)?;
    file.sync_data().map_err(StorageError::io("sync", path))?;
    let from = image::proc_path(&file);
    match rustix::fs::linkat(
        rustix::fs::CWD,
        from,
        directory,
        IMAGE,
        AtFlags::SYMLINK_FOLLOW,
    ) {
        Ok(()) => Ok(file),
        // Another container of the pod was first.
        Err(Errno::EXIST) => {
            open(directory, path)?.ok_or_else(|| StorageError::NotADisk(path.to_owned()))
        }
        Err(error) => Err(StorageError::errno("name", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};

    struct Node {
        dir: tempfile::TempDir,
        config: pod_spec::Storage,
    }

    fn node() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "[storage]\ncache_dir = \"{}\"\nscratch_mib = 10240",
            dir.path().join("cache").display()
        );
        let config = pod_spec::RuntimeConfig::parse(&text).unwrap().storage;
        crate::Store::open(&config).unwrap();
        fs::create_dir(dir.path().join("volume")).unwrap();
        Node { dir, config }
    }

    impl Node {
        fn source(&self) -> PathBuf {
            self.dir.path().join("volume")
        }

        fn volume(&self, medium: Medium) -> EmptyDir {
            EmptyDir {
                name: "u.v".to_owned(),
                medium,
                source: self.source(),
            }
        }

        fn disk(&self) -> Result<Disk, StorageError> {
            let mut made = make(&self.config, &[self.volume(Medium::Disk)])?;
            Ok(made.remove(0).disk.unwrap())
        }

        fn is_filled(&self) -> bool {
            is_filled(&self.source()).unwrap()
        }

        /// What the kubelet thinks that the volume uses.
        fn used(&self) -> u64 {
            let entries = fs::read_dir(self.source()).unwrap();
            entries
                .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
                .sum()
        }
    }

    #[test]
    fn disk_is_made_in_the_volume_once_and_is_small() {
        let node = node();
        let disk = node.disk().unwrap();
        assert_eq!(disk.file.metadata().unwrap().len(), 10 << 30);
        assert!(node.used() <= 256 << 10, "{} bytes", node.used());
        let path = node.source().join(IMAGE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        disk.file.write_all_at(b"kept", 1 << 20).unwrap();
        let again = node.disk().unwrap();
        assert_eq!(again.serial, disk.serial);
        let mut read = [0; 4];
        again.file.read_exact_at(&mut read, 1 << 20).unwrap();
        assert_eq!(&read, b"kept");
        // As the kubelet does for an fsGroup.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        node.disk().unwrap();
    }

    #[test]
    fn file_system_of_a_disk_is_sound_and_has_a_journal() {
        let node = node();
        node.disk().unwrap();
        let path = node.source().join(IMAGE);
        let checked = std::process::Command::new("/sbin/e2fsck")
            .args(["-fn", path.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(checked.status.success(), "{checked:?}");
        let shown = std::process::Command::new("/sbin/dumpe2fs")
            .args(["-h", path.to_str().unwrap()])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(text.contains("has_journal"), "{text}");
        assert!(text.contains("4096k"), "{text}");
    }

    #[test]
    fn what_is_no_disk_of_ours_is_refused_by_name() {
        for plant in [
            |path: &Path| symlink("/etc/passwd", path).unwrap(),
            |path: &Path| fs::create_dir(path).unwrap(),
            |path: &Path| fs::write(path, "").unwrap(),
            |path: &Path| {
                let other = path.with_file_name("other");
                fs::write(&other, "x").unwrap();
                fs::hard_link(other, path).unwrap();
            },
            |path: &Path| {
                rustix::fs::mknodat(
                    rustix::fs::CWD,
                    path,
                    rustix::fs::FileType::Fifo,
                    Mode::RUSR,
                    0,
                )
                .unwrap();
            },
        ] {
            let node = node();
            plant(&node.source().join(IMAGE));
            let error = node.disk().unwrap_err().to_string();
            assert!(error.contains(IMAGE), "{error}");
        }
        let node = node();
        fs::remove_dir(node.source()).unwrap();
        symlink("/tmp", node.source()).unwrap();
        node.disk().unwrap_err();
    }

    #[test]
    fn volume_is_filled_by_files_and_links_but_not_by_directories_or_its_disk() {
        let node = node();
        fs::create_dir_all(node.source().join("sub/path")).unwrap();
        assert!(!node.is_filled());
        symlink("x", node.source().join("sub/path/link")).unwrap();
        assert!(node.is_filled());
        node.disk().unwrap();
        assert!(!node.is_filled(), "what is seen is on the disk");
        let many = self::node();
        for number in 0..MAX_LOOKED_AT {
            fs::create_dir(many.source().join(number.to_string())).unwrap();
        }
        assert!(!many.is_filled());
        fs::create_dir(many.source().join("more")).unwrap();
        assert!(many.is_filled());
    }

    #[test]
    fn empty_dir_takes_over_owner_and_mode_of_the_hosts() {
        let node = node();
        fs::set_permissions(node.source(), fs::Permissions::from_mode(0o2770)).unwrap();
        let volume = node.volume(Medium::Memory(Some(Bytes(4096))));
        let made = make(&node.config, &[volume]).unwrap().remove(0).volume;
        let owner = fs::metadata(node.source()).unwrap();
        assert_eq!((made.name.as_str(), made.mode), ("u.v", 0o2770));
        assert_eq!((made.uid, made.gid), (owner.uid(), owner.gid()));
        assert_eq!(made.medium, Some(api::volume::Medium::MemoryBytes(4096)));
    }

    #[test]
    fn empty_dir_that_is_missing_or_a_file_is_refused_by_name() {
        let node = node();
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/nowhere/v")] {
            let volume = EmptyDir {
                source: path.to_owned(),
                ..node.volume(Medium::Disk)
            };
            let error = make(&node.config, &[volume]).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
