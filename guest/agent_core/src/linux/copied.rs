// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Host files that are copied into guest memory: ConfigMaps, Secrets, the small files that kubelet mounts.
//!
//! Every entry is made beneath its mount's own place, with links neither followed nor crossed on the way, so that no
//! entry, whatever its path and whatever earlier entries were, is made elsewhere.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, mkdirat, openat,
    openat2, symlinkat,
};

use crate::Error;
use crate::error::Context as _;
use crate::plan::{CopiedContent, CopiedFile};
use crate::system::FileEnd;

/// Makes the copied mount with these `entries` at `place`, which does not exist yet; parents come before what is in them.
///
/// # Errors
/// [`Error::Step`] with the entry's path.
pub(super) fn write(place: &Path, entries: &[CopiedFile]) -> Result<(), Error> {
    let parent = place.parent().unwrap_or(place);
    let step = || format!("making {}", parent.display());
    std::fs::create_dir_all(parent).step(step)?;
    let base = openat(
        CWD,
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(step)?;
    let name = place.file_name().map(Path::new).unwrap_or(Path::new("."));
    for entry in entries {
        let path = if entry.path.as_os_str().is_empty() {
            name.to_owned()
        } else {
            name.join(&entry.path)
        };
        make(&base, &path, entry).step(|| format!("copying {}", path.display()))?;
    }
    Ok(())
}

/// The last `max` bytes of the copied file at `place`, which a container may be writing to.
///
/// # Errors
/// [`Error::Step`], [`Error::BadRequest`] if it is no regular file.
pub(super) fn read_end(place: &Path, max: usize) -> Result<FileEnd, Error> {
    let step = || format!("reading {}", place.display());
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(openat(CWD, place, flags, Mode::empty()).step(step)?);
    let metadata = file.metadata().step(step)?;
    if !metadata.is_file() {
        return Err(Error::bad("index", "is of no single file"));
    }
    let size = metadata.len();
    let len = u64::try_from(max).unwrap_or(u64::MAX).min(size);
    let mut data = vec![0; usize::try_from(len).unwrap_or(max)];
    let mut have = 0;
    while let Some(rest) = data.get_mut(have..).filter(|rest| !rest.is_empty()) {
        let done = u64::try_from(have).unwrap_or(u64::MAX);
        let at = size.saturating_sub(len).saturating_add(done);
        match file.read_at(rest, at).step(step)? {
            // It has become shorter meanwhile.
            0 => break,
            read => have = have.saturating_add(read),
        }
    }
    data.truncate(have);
    Ok(FileEnd { size, data })
}

fn make(base: &OwnedFd, path: &Path, entry: &CopiedFile) -> std::io::Result<()> {
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let folder = openat2(
        base,
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        beneath,
    )?;
    let (user, group) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    let mode = Mode::from_raw_mode(entry.mode);
    match &entry.content {
        CopiedContent::Symlink(target) => {
            symlinkat(target.as_str(), &folder, name)?;
            chownat(
                &folder,
                name,
                Some(user),
                Some(group),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
            return Ok(());
        }
        CopiedContent::Directory => {
            mkdirat(&folder, name, Mode::from_raw_mode(0o700))?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&folder, name, flags, Mode::empty())?;
            fchown(&made, Some(user), Some(group))?;
            fchmod(&made, mode)?;
        }
        CopiedContent::Data(data) if entry.offset > 0 => {
            let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut begun = std::fs::File::from(openat(&folder, name, flags, Mode::empty())?);
            let metadata = begun.metadata()?;
            if !metadata.is_file() || metadata.len() != entry.offset {
                return Err(std::io::ErrorKind::InvalidInput.into());
            }
            begun.write_all(data)?;
        }
        CopiedContent::Data(data) => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut made =
                std::fs::File::from(openat(&folder, name, flags, Mode::from_raw_mode(0o600))?);
            made.write_all(data)?;
            // The owner first: changing it takes set-user-ID bits away.
            fchown(&made, Some(user), Some(group))?;
            fchmod(&made, mode)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn entry(path: &str, content: CopiedContent) -> CopiedFile {
        let owner = std::fs::metadata("/proc/self").unwrap();
        CopiedFile {
            path: path.into(),
            mode: 0o640,
            uid: owner.uid(),
            gid: owner.gid(),
            content,
            offset: 0,
        }
    }

    #[test]
    fn config_map_is_made_as_kubelet_lays_it_out() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("copied/0");
        let mut directory = entry("", CopiedContent::Directory);
        directory.mode = 0o755;
        let mut data = entry("..2026", CopiedContent::Directory);
        data.mode = 0o755;
        write(
            &place,
            &[
                directory,
                data,
                entry("..2026/key", CopiedContent::Data(b"value".to_vec())),
                entry("..data", CopiedContent::Symlink("..2026".to_owned())),
                entry("key", CopiedContent::Symlink("..data/key".to_owned())),
            ],
        )
        .unwrap();
        assert_eq!(std::fs::read(place.join("key")).unwrap(), b"value");
        assert_eq!(
            std::fs::metadata(place.join("key")).unwrap().mode() & 0o7777,
            0o640
        );
    }

    #[test]
    fn single_file_is_the_mount_itself() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("3");
        write(&place, &[entry("", CopiedContent::Data(b"hosts".to_vec()))]).unwrap();
        assert_eq!(std::fs::read(place).unwrap(), b"hosts");
    }

    #[test]
    fn end_of_a_file_is_read_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("0");
        std::fs::write(&place, "0123456789").unwrap();
        for (max, data) in [(0, ""), (4, "6789"), (10, "0123456789"), (11, "0123456789")] {
            let end = read_end(&place, max).unwrap();
            assert_eq!((end.size, end.data.as_slice()), (10, data.as_bytes()));
        }
        read_end(folder.path(), 4).unwrap_err();
        std::os::unix::fs::symlink(&place, folder.path().join("1")).unwrap();
        read_end(&folder.path().join("1"), 4).unwrap_err();
        read_end(&folder.path().join("2"), 4).unwrap_err();
    }

    #[test]
    fn entry_behind_a_link_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let mut directory = entry("", CopiedContent::Directory);
        directory.mode = 0o755;
        let link = CopiedContent::Symlink(outside.path().display().to_string());
        let entries = [
            directory,
            entry("out", link),
            entry("out/file", CopiedContent::Data(Vec::new())),
        ];
        let error = write(&folder.path().join("0"), &entries).unwrap_err();
        assert!(
            error.to_string().starts_with("copying 0/out/file"),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
