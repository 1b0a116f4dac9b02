// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Finding and making places inside a root whose symbolic links are not to be trusted.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use crate::Error;
use crate::error::Context as _;

/// How symbolic links below the root are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    /// Followed, as a process inside the root would.
    Inside,
    /// Refused: the place must be what its name says (GHSA-fh74-hm69-rqjw for proc and sysfs).
    Refused,
}

/// A root file system, held by descriptor.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

/// A place on the guest's own side, whose path has no symbolic links.
///
/// # Errors
/// Those of `openat2(2)`; `ELOOP` for a symbolic link on the way.
pub(crate) fn open_path(path: &Path) -> rustix::io::Result<OwnedFd> {
    openat2(
        rustix::fs::CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

impl Root {
    pub(crate) fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens `path` as a process in the root would, links never leading out.
    ///
    /// # Errors
    /// Those of `openat2(2)`.
    pub(crate) fn open(
        &self,
        path: &Path,
        flags: OFlags,
        links: Links,
    ) -> rustix::io::Result<OwnedFd> {
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if links == Links::Refused {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        // An absolute path means the same within RESOLVE_IN_ROOT.
        openat2(
            &self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    }

    /// The directory at `path`, made with mode 0755 where it or its parents are missing.
    ///
    /// # Errors
    /// [`Error`]; a path with `..` is refused.
    pub(crate) fn make_directory(&self, path: &Path) -> Result<OwnedFd, Error> {
        self.make_directory_with(path, Links::Inside)
    }

    pub(crate) fn make_directory_with(&self, path: &Path, links: Links) -> Result<OwnedFd, Error> {
        let open = |path: &Path| self.open(path, OFlags::PATH | OFlags::DIRECTORY, links);
        let name = || format!("making the directory {} in the container", path.display());
        match open(path) {
            Err(Errno::NOENT) => {}
            other => return other.step(name),
        }
        let mut here = PathBuf::from("/");
        for component in path.components() {
            let Some(part) = plain(component, path)? else {
                continue;
            };
            let parent = open(&here).step(name)?;
            match mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).step(name),
            }
            here.push(part);
        }
        open(path).step(name)
    }

    /// The file at `path`, made empty where it is missing; whatever it is if it exists.
    ///
    /// # Errors
    /// [`Error`]; a path with `..` is refused.
    pub(crate) fn make_file(&self, path: &Path) -> Result<OwnedFd, Error> {
        let name = || format!("making the file {} in the container", path.display());
        match self.open(path, OFlags::PATH, Links::Inside) {
            Err(Errno::NOENT) => {}
            other => return other.step(name),
        }
        let (parent, file) = self.make_parent(path)?;
        let created = rustix::fs::openat(
            &parent,
            file.as_os_str(),
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        );
        drop(created.step(name)?);
        rustix::fs::openat(
            &parent,
            file.as_os_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(name)
    }

    /// The directory that `path` is in, made where it is missing, and the last part of `path`.
    ///
    /// # Errors
    /// [`Error`]; a path with `..` or without a last part is refused.
    pub(crate) fn make_parent(&self, path: &Path) -> Result<(OwnedFd, PathBuf), Error> {
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(Error::invalid(path.display().to_string(), "names no file"));
        };
        Ok((self.make_directory(parent)?, PathBuf::from(file)))
    }
}

fn plain<'a>(component: Component<'a>, path: &Path) -> Result<Option<&'a OsStr>, Error> {
    match component {
        Component::Normal(part) => Ok(Some(part)),
        Component::RootDir | Component::CurDir => Ok(None),
        Component::ParentDir | Component::Prefix(_) => Err(Error::invalid(
            path.display().to_string(),
            "has a \"..\" in it",
        )),
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root(folder: &Path) -> Root {
        Root::new(open_path(&folder.canonicalize().unwrap()).unwrap())
    }

    #[test]
    fn link_out_of_the_root_ends_inside_it() {
        let folder = tempfile::tempdir().unwrap();
        symlink("/etc", folder.path().join("outside")).unwrap();
        let root = root(folder.path());
        assert_eq!(
            root.open(Path::new("/outside/passwd"), OFlags::PATH, Links::Inside)
                .unwrap_err(),
            Errno::NOENT
        );
        std::fs::create_dir(folder.path().join("etc")).unwrap();
        root.make_file(Path::new("/outside/made")).unwrap();
        assert!(folder.path().join("etc/made").is_file());
    }

    #[test]
    fn parents_are_made() {
        let folder = tempfile::tempdir().unwrap();
        let root = root(folder.path());
        root.make_directory(Path::new("/a/b/c")).unwrap();
        root.make_file(Path::new("/x/y")).unwrap();
        assert!(folder.path().join("a/b/c").is_dir());
        assert!(folder.path().join("x/y").is_file());
    }

    #[test]
    fn dotdot_in_a_missing_path_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            root(folder.path())
                .make_directory(Path::new("/a/../../b"))
                .is_err()
        );
    }

    #[test]
    fn link_is_refused_where_it_may_not_be() {
        let folder = tempfile::tempdir().unwrap();
        symlink("etc", folder.path().join("proc")).unwrap();
        std::fs::create_dir(folder.path().join("etc")).unwrap();
        assert!(
            root(folder.path())
                .make_directory_with(Path::new("/proc"), Links::Refused)
                .is_err()
        );
    }
}
