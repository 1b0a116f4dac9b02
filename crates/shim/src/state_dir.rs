// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a shim leaves for `delete`, in `/run/coffer/<namespace>/<sandbox id>/`.
//!
//! | file | written by | holds |
//! |---|---|---|
//! | `bundle` | `start`, first of all | the path of the bundle |
//! | `socket` | `start`, before it binds | the path of the shim's socket |
//! | `shim.json` | `serve`, first of all | the shim's process |
//! | `vmm.json` | `serve`, once there is one | the VMM's process |
//! | `cgroups.json` | `start`, before it makes them | the cgroups that Coffer has made |
//!
//! Each file appears whole or not at all. `delete` moves the directory away before it reads it: a shim that has not
//! recorded itself by then finds no directory and ends, so none escapes.
//!
//! containerd calls no `delete` for a shim that dies before it has connected, and drops the bundle. So a directory whose
//! shim and bundle are both gone is nobody's: the next `start` removes it ([`StateDir::abandoned`]).

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ids::{Namespace, SandboxId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shim_api::{REMOVED, SHIM_FILE as SHIM, SOCKET_FILE as SOCKET, VMM_FILE as VMM};

use crate::process::ProcessIdentity;

const BUNDLE: &str = "bundle";
const CGROUPS: &str = "cgroups.json";

/// How often the directory is made anew when the namespace's is removed meanwhile, with the last other sandbox in it.
const CREATE_TRIES: u32 = 100;

/// A sandbox's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The directory of sandbox `id` under `root`; it need not exist.
    pub(crate) fn of(root: &Path, namespace: &Namespace, id: &SandboxId) -> Self {
        Self {
            path: root.join(namespace.as_str()).join(id.as_str()),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, for root alone. That it is there is not an error.
    pub(crate) fn create(&self) -> io::Result<()> {
        let mut create = DirBuilder::new();
        create.recursive(true).mode(0o700);
        for _ in 1..CREATE_TRIES {
            let created = create.create(&self.path);
            // A directory on the way was removed before the next was made in it, or it was there when it was to be made and
            // gone when `DirBuilder` looked whether it is one.
            let again = |error: &io::Error| {
                matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
                )
            };
            if !created.as_ref().is_err_and(again) {
                return created;
            }
        }
        create.create(&self.path)
    }

    /// The directories of `namespace` under `root` that no shim, no `start` and no `delete` will come back to.
    pub(crate) fn abandoned(root: &Path, namespace: &Namespace) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(root.join(namespace.as_str()))? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| {
                name.strip_suffix(REMOVED)
                    .unwrap_or(name)
                    .parse::<SandboxId>()
                    .ok()
            });
            let Some(id) = id else { continue };
            let dir = Self::of(root, namespace, &id);
            let there = Self {
                path: root.join(namespace.as_str()).join(&name),
            };
            // One that cannot be read does not keep the others.
            if there.is_abandoned().unwrap_or(false) && !found.contains(&dir) {
                found.push(dir);
            }
        }
        Ok(found)
    }

    /// containerd makes the bundle before it calls `start`, and drops it after `delete`.
    fn is_abandoned(&self) -> io::Result<bool> {
        let Some(bundle) = self.recorded_path(BUNDLE)? else {
            return Ok(false);
        };
        if bundle.try_exists()? {
            return Ok(false);
        }
        let shim: Option<ProcessIdentity> = self.recorded(SHIM)?;
        match shim.map(ProcessIdentity::open).transpose()?.flatten() {
            // Ended, and not yet reaped.
            Some(process) => process.wait(Duration::ZERO),
            None => Ok(true),
        }
    }

    /// Where the sandbox's shim listens, if that was recorded.
    pub(crate) fn socket(&self) -> io::Result<Option<PathBuf>> {
        self.recorded_path(SOCKET)
    }

    pub(crate) fn record_bundle(&self, bundle: &Path) -> io::Result<()> {
        self.record_path(BUNDLE, bundle)
    }

    pub(crate) fn record_socket(&self, socket: &Path) -> io::Result<()> {
        self.record_path(SOCKET, socket)
    }

    pub(crate) fn record_shim(&self, process: ProcessIdentity) -> io::Result<()> {
        self.record(SHIM, &process)
    }

    pub(crate) fn record_vmm(&self, process: ProcessIdentity) -> io::Result<()> {
        self.record(VMM, &process)
    }

    pub(crate) fn record_cgroups(&self, cgroups: &[PathBuf]) -> io::Result<()> {
        self.record(CGROUPS, &cgroups)
    }

    /// Moves the directory out of the way and reads what is in it. `None` if there is none.
    pub(crate) fn take(&self) -> io::Result<Option<Leftovers>> {
        let mut name = self.path.clone().into_os_string();
        name.push(REMOVED);
        let away = PathBuf::from(name);
        match fs::rename(&self.path, &away) {
            Ok(()) => {}
            // A `delete` that was killed half way has left it there.
            Err(error) if error.kind() == io::ErrorKind::NotFound && away.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                fs::remove_dir_all(&away)?;
                fs::rename(&self.path, &away)?;
            }
            Err(error) => return Err(error),
        }
        let dir = Self { path: away };
        Ok(Some(Leftovers {
            socket: dir.socket()?,
            shim: dir.recorded(SHIM)?,
            vmm: dir.recorded(VMM)?,
            cgroups: dir.recorded(CGROUPS)?.unwrap_or_default(),
            dir,
        }))
    }

    /// Removes it with all that is in it, and the namespace's directory with the last one. Nothing there is not an error.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(namespace) = self.path.parent() {
            // It stays while another sandbox is in it.
            let _in_use = fs::remove_dir(namespace);
        }
        Ok(())
    }

    fn record_path(&self, name: &str, path: &Path) -> io::Result<()> {
        write_whole(&self.path.join(name), path.as_os_str().as_encoded_bytes())
    }

    fn recorded_path(&self, name: &str) -> io::Result<Option<PathBuf>> {
        let bytes = read_if_there(&self.path.join(name))?;
        Ok(bytes.map(|bytes| PathBuf::from(OsString::from_vec(bytes))))
    }

    fn record(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        write_whole(&self.path.join(name), &serde_json::to_vec(value)?)
    }

    fn recorded<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        let bytes = read_if_there(&self.path.join(name))?;
        Ok(bytes
            .map(|bytes| serde_json::from_slice(&bytes))
            .transpose()?)
    }
}

/// What a shim has left.
#[derive(Debug)]
pub(crate) struct Leftovers {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) shim: Option<ProcessIdentity>,
    pub(crate) vmm: Option<ProcessIdentity>,
    pub(crate) cgroups: Vec<PathBuf>,
    /// Where the rest is; to be removed last.
    pub(crate) dir: StateDir,
}

/// Writes a file that a reader sees whole or not at all. Fails if its directory is gone.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.to_path_buf().into_os_string();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(content)?;
    fs::rename(&new, path)
}

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(root: &Path) -> StateDir {
        StateDir::of(root, &"k8s.io".parse().unwrap(), &"pod1".parse().unwrap())
    }

    #[test]
    fn what_was_recorded_is_taken_once() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        let shim = ProcessIdentity {
            pid: 7,
            start_time: 8,
        };
        let cgroups = vec![PathBuf::from("/sys/fs/cgroup/a")];
        dir.create().unwrap();
        dir.create().unwrap();
        dir.record_socket(Path::new("/run/s/1")).unwrap();
        dir.record_shim(shim).unwrap();
        dir.record_cgroups(&cgroups).unwrap();
        let left = dir.take().unwrap().unwrap();
        assert_eq!(left.socket.as_deref(), Some(Path::new("/run/s/1")));
        assert_eq!((left.shim, left.vmm), (Some(shim), None));
        assert_eq!(left.cgroups, cgroups);
        left.dir.remove().unwrap();
        left.dir.remove().unwrap();
        assert!(dir.take().unwrap().is_none());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn shim_that_comes_after_delete_cannot_record_itself() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        dir.create().unwrap();
        let left = dir.take().unwrap().unwrap();
        let error = dir
            .record_shim(ProcessIdentity {
                pid: 7,
                start_time: 8,
            })
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(left.shim, None);
    }

    #[test]
    fn half_removed_directory_is_taken_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        dir.create().unwrap();
        dir.record_socket(Path::new("/a")).unwrap();
        drop(dir.take().unwrap().unwrap());
        assert_eq!(
            dir.take().unwrap().unwrap().socket.as_deref(),
            Some(Path::new("/a"))
        );
        dir.create().unwrap();
        dir.record_socket(Path::new("/b")).unwrap();
        assert_eq!(
            dir.take().unwrap().unwrap().socket.as_deref(),
            Some(Path::new("/b"))
        );
    }

    #[test]
    fn sandboxes_that_come_and_go_do_not_take_the_namespace_from_each_other() {
        let root = tempfile::tempdir().unwrap();
        let namespace = "k8s.io".parse().unwrap();
        std::thread::scope(|scope| {
            for number in 0..4 {
                let dir = StateDir::of(
                    root.path(),
                    &namespace,
                    &format!("p{number}").parse().unwrap(),
                );
                scope.spawn(move || {
                    for _ in 0..200 {
                        dir.create().unwrap();
                        dir.record_socket(Path::new("/s")).unwrap();
                        dir.take().unwrap().unwrap().dir.remove().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn directory_is_abandoned_when_bundle_and_shim_are_gone() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        let abandoned = || StateDir::abandoned(root.path(), &"k8s.io".parse().unwrap()).unwrap();
        dir.create().unwrap();
        assert_eq!(abandoned(), [], "not even a bundle is known");
        let bundle = root.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        dir.record_bundle(&bundle).unwrap();
        dir.record_shim(ProcessIdentity {
            pid: i32::MAX,
            start_time: 1,
        })
        .unwrap();
        assert_eq!(abandoned(), [], "containerd still has the bundle");
        fs::remove_dir(&bundle).unwrap();
        assert_eq!(abandoned(), std::slice::from_ref(&dir));
        drop(dir.take().unwrap().unwrap());
        assert_eq!(
            abandoned(),
            std::slice::from_ref(&dir),
            "a `delete` was killed half way"
        );
        dir.create().unwrap();
        dir.record_bundle(&bundle).unwrap();
        dir.record_shim(ProcessIdentity::current().unwrap())
            .unwrap();
        dir.take().unwrap().unwrap().dir.remove().unwrap();
        dir.create().unwrap();
        dir.record_bundle(&bundle).unwrap();
        dir.record_shim(ProcessIdentity::current().unwrap())
            .unwrap();
        assert_eq!(abandoned(), [], "its shim lives");
    }

    #[test]
    fn directory_that_cannot_be_read_does_not_keep_the_others() {
        let root = tempfile::tempdir().unwrap();
        let namespace = "k8s.io".parse().unwrap();
        let gone = root.path().join("bundle");
        for id in ["bad", "old"] {
            let dir = StateDir::of(root.path(), &namespace, &id.parse().unwrap());
            dir.create().unwrap();
            dir.record_bundle(&gone).unwrap();
        }
        let bad = StateDir::of(root.path(), &namespace, &"bad".parse().unwrap());
        fs::write(bad.path().join(SHIM), "no JSON").unwrap();
        let old = StateDir::of(root.path(), &namespace, &"old".parse().unwrap());
        assert_eq!(StateDir::abandoned(root.path(), &namespace).unwrap(), [old]);
    }

    #[test]
    fn file_in_the_place_of_the_namespace_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        fs::write(dir.path().parent().unwrap(), "").unwrap();
        assert!(dir.create().is_err());
    }

    #[test]
    fn half_written_record_is_not_seen() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        dir.create().unwrap();
        fs::write(dir.path().join("shim.json.new"), "{\"pid\":").unwrap();
        assert_eq!(dir.take().unwrap().unwrap().shim, None);
    }
}
