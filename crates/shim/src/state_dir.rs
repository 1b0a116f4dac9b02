// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a shim leaves for `delete`, in `/run/coffer/<namespace>/<sandbox id>/`.
//!
//! | file | written by | holds |
//! |---|---|---|
//! | `start.json` | `start`, first of all | the process of `start` |
//! | `bundle` | `start` | the path of the bundle |
//! | `socket` | `start`, before it binds | the path of the shim's socket |
//! | `shim.json` | `serve`, first of all | the shim's process |
//! | `vmm.json` | `serve`, once there is one | the VMM's process |
//! | `cgroups.json` | `start` or CreateSandbox, before it makes them | the cgroups that Coffer has made |
//! | `network` | CreateSandbox | the path of the pod's network namespace; a bundle names it otherwise |
//!
//! Each file appears whole or not at all. Who removes a directory moves it away before it reads it: a shim that has not
//! recorded itself by then finds no directory and ends, so none escapes. It is made and moved away under a lock of the
//! root ([`StateLock`]), and what is moved away is removed under a lock of its own ([`Leftovers`]): a `start` that takes
//! up the same id waits for that.
//!
//! containerd calls no `delete` for a shim that dies before it has connected, and drops the bundle. The keeper of `start`
//! removes the directory then ([`crate::keeper`]). Should that be killed too, the directory is nobody's once the processes
//! and the bundle are gone, and the next `start` removes it ([`StateDir::take_abandoned`]).

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ids::{Namespace, SandboxId};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shim_api::{REMOVED, SHIM_FILE as SHIM, SOCKET_FILE as SOCKET, VMM_FILE as VMM};

use crate::process::ProcessIdentity;

const START: &str = "start.json";
const BUNDLE: &str = "bundle";
const CGROUPS: &str = "cgroups.json";
const NETWORK: &str = "network";

/// A sandbox's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDir {
    root: PathBuf,
    path: PathBuf,
}

/// While it is held, nobody else makes or moves away a directory of the same root.
#[derive(Debug)]
pub(crate) struct StateLock {
    _root: File,
}

impl StateDir {
    /// The directory of sandbox `id` under `root`; it need not exist.
    pub(crate) fn of(root: &Path, namespace: &Namespace, id: &SandboxId) -> Self {
        Self {
            root: root.to_path_buf(),
            path: root.join(namespace.as_str()).join(id.as_str()),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is anything to take.
    pub(crate) fn is_left(&self) -> bool {
        self.path.exists() || self.away().path.exists()
    }

    /// Waits for the lock of the root, which is made if it is not there and stays.
    pub(crate) fn lock(&self) -> io::Result<StateLock> {
        lock(&self.root)
    }

    /// Makes it, for root alone and for the process `start`. That it is there is not an error.
    pub(crate) fn create(&self, _: &StateLock, start: ProcessIdentity) -> io::Result<()> {
        make_dir(&self.path)?;
        self.record(START, &start)
    }

    /// Moves the directory away, or finds it moved away and not removed, and waits until nobody else removes it. `None`
    /// if there is nothing to remove.
    pub(crate) fn take(&self) -> io::Result<Option<Leftovers>> {
        self.move_away(&self.lock()?)?;
        self.away().claim(FlockOperation::LockExclusive)
    }

    /// The same, or `None` if somebody is about removing it.
    pub(crate) fn take_if_free(&self) -> io::Result<Option<Leftovers>> {
        self.move_away(&self.lock()?)?;
        self.away().claim(FlockOperation::NonBlockingLockExclusive)
    }

    /// The same, or `None` if another than `start` has made it. One without a maker is of one that was killed, or had no
    /// room, before it could record itself.
    pub(crate) fn take_of(&self, start: ProcessIdentity) -> io::Result<Option<Leftovers>> {
        let lock = self.lock()?;
        let made_by: Option<ProcessIdentity> = self.recorded(START)?;
        if made_by.is_some_and(|made_by| made_by != start) {
            return Ok(None);
        }
        self.move_away(&lock)?;
        self.away().claim(FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the directories of `namespace` under `root` to which no shim, `start` or `delete` will come back.
    pub(crate) fn take_abandoned(root: &Path, namespace: &Namespace) -> io::Result<Vec<Leftovers>> {
        let mut taken = Vec::new();
        let lock = lock(root)?;
        for entry in fs::read_dir(root.join(namespace.as_str()))? {
            let name = entry?.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_suffix(REMOVED).unwrap_or(name).parse().ok());
            let Some(id) = id else { continue };
            let found = Self {
                root: root.to_path_buf(),
                path: root.join(namespace.as_str()).join(&name),
            };
            // One that cannot be read does not keep the others.
            if !found.is_abandoned().unwrap_or(false) {
                continue;
            }
            let dir = Self::of(root, namespace, &id);
            if dir == found && dir.move_away(&lock).is_err() {
                continue;
            }
            let claimed = dir.away().claim(FlockOperation::NonBlockingLockExclusive);
            taken.extend(claimed.ok().flatten());
        }
        Ok(taken)
    }

    /// containerd makes the bundle before it calls `start`, and drops it after `delete`.
    fn is_abandoned(&self) -> io::Result<bool> {
        if let Some(bundle) = self.recorded_path(BUNDLE)?
            && bundle.try_exists()?
        {
            return Ok(false);
        }
        for process in [START, SHIM] {
            let process: Option<ProcessIdentity> = self.recorded(process)?;
            if let Some(process) = process.map(ProcessIdentity::open).transpose()?.flatten()
                // Else it has ended, and is not yet reaped.
                && !process.wait(Duration::ZERO)?
            {
                return Ok(false);
            }
        }
        Ok(true)
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

    pub(crate) fn record_network(&self, namespace: &Path) -> io::Result<()> {
        self.record_path(NETWORK, namespace)
    }

    /// That there is none is not an error.
    fn move_away(&self, _: &StateLock) -> io::Result<()> {
        let away = self.away().path;
        match fs::rename(&self.path, &away) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                fs::remove_dir_all(&away)?;
                fs::rename(&self.path, &away)
            }
            moved => moved,
        }
    }

    /// Where it is while it is removed.
    fn away(&self) -> Self {
        let mut path = self.path.clone().into_os_string();
        path.push(REMOVED);
        Self {
            root: self.root.clone(),
            path: PathBuf::from(path),
        }
    }

    /// Locks a directory that was moved away, and reads what is in it. `None` if it is gone, or locked and not waited for.
    fn claim(self, operation: FlockOperation) -> io::Result<Option<Leftovers>> {
        let claim = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            claim => claim?,
        };
        match flock(&claim, operation) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        if claim.metadata()?.nlink() == 0 {
            // Who held the lock has removed it.
            return Ok(None);
        }
        Ok(Some(Leftovers {
            socket: self.socket()?,
            shim: self.recorded(SHIM)?,
            vmm: self.recorded(VMM)?,
            cgroups: self.recorded(CGROUPS)?.unwrap_or_default(),
            network: self.recorded_path(NETWORK)?,
            dir: self,
            _claim: claim,
        }))
    }

    /// Removes it with all that is in it, and the namespace's directory with the last one. Nothing there is not an error.
    fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let _lock = self.lock()?;
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

/// What a shim has left, for the one who holds this to remove.
#[derive(Debug)]
pub(crate) struct Leftovers {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) shim: Option<ProcessIdentity>,
    pub(crate) vmm: Option<ProcessIdentity>,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) network: Option<PathBuf>,
    /// Where the rest is.
    dir: StateDir,
    _claim: File,
}

impl Leftovers {
    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Removes the directory, after all else that it tells of.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.dir.remove()
    }
}

fn lock(root: &Path) -> io::Result<StateLock> {
    make_dir(root)?;
    let root = File::open(root)?;
    flock(&root, FlockOperation::LockExclusive)?;
    Ok(StateLock { _root: root })
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
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

    const GONE: ProcessIdentity = ProcessIdentity {
        pid: i32::MAX,
        start_time: 1,
    };

    fn dir(root: &Path) -> StateDir {
        StateDir::of(root, &"k8s.io".parse().unwrap(), &"pod1".parse().unwrap())
    }

    fn create(dir: &StateDir) {
        dir.create(&dir.lock().unwrap(), GONE).unwrap();
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
        create(&dir);
        create(&dir);
        dir.record_socket(Path::new("/run/s/1")).unwrap();
        dir.record_shim(shim).unwrap();
        dir.record_cgroups(&cgroups).unwrap();
        let left = dir.take().unwrap().unwrap();
        assert!(dir.is_left());
        assert_eq!(left.socket.as_deref(), Some(Path::new("/run/s/1")));
        assert_eq!((left.shim, left.vmm), (Some(shim), None));
        assert_eq!(left.cgroups, cgroups);
        left.remove().unwrap();
        left.remove().unwrap();
        assert!(!dir.is_left());
        drop(left);
        assert!(dir.take().unwrap().is_none());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn shim_that_comes_after_delete_cannot_record_itself() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        create(&dir);
        let left = dir.take().unwrap().unwrap();
        let error = dir.record_shim(GONE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(left.shim, None);
    }

    #[test]
    fn half_removed_directory_is_taken_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        create(&dir);
        dir.record_socket(Path::new("/a")).unwrap();
        drop(dir.take().unwrap().unwrap());
        assert_eq!(
            dir.take().unwrap().unwrap().socket.as_deref(),
            Some(Path::new("/a"))
        );
        create(&dir);
        dir.record_socket(Path::new("/b")).unwrap();
        assert_eq!(
            dir.take().unwrap().unwrap().socket.as_deref(),
            Some(Path::new("/b"))
        );
    }

    #[test]
    fn who_comes_while_it_is_removed_waits_or_leaves_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        create(&dir);
        let left = dir.take().unwrap().unwrap();
        assert!(dir.take_if_free().unwrap().is_none());
        let abandoned = StateDir::take_abandoned(root.path(), &"k8s.io".parse().unwrap());
        assert_eq!(abandoned.unwrap().len(), 0);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| dir.take().unwrap().is_none());
            left.remove().unwrap();
            drop(left);
            assert!(waits.join().unwrap(), "what was waited for is gone");
        });
    }

    #[test]
    fn directory_that_another_start_has_made_stays() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        assert!(dir.take_of(GONE).unwrap().is_none(), "nothing was made");
        let own = ProcessIdentity::current().unwrap();
        dir.create(&dir.lock().unwrap(), own).unwrap();
        assert!(dir.take_of(GONE).unwrap().is_none());
        dir.take_of(own).unwrap().unwrap().remove().unwrap();
        make_dir(dir.path()).unwrap();
        fs::write(dir.path().join("start.json.new"), "").unwrap();
        dir.take_of(own).unwrap().unwrap().remove().unwrap();
        assert!(!dir.is_left());
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
                        create(&dir);
                        dir.record_socket(Path::new("/s")).unwrap();
                        dir.take().unwrap().unwrap().remove().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn directory_is_abandoned_when_bundle_and_processes_are_gone() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        let own = ProcessIdentity::current().unwrap();
        let bundle = root.path().join("bundle");
        let abandoned = || {
            let taken = StateDir::take_abandoned(root.path(), &"k8s.io".parse().unwrap());
            taken.unwrap().len()
        };
        let make = |start, shim| {
            dir.create(&dir.lock().unwrap(), start).unwrap();
            dir.record_bundle(&bundle).unwrap();
            dir.record_shim(shim).unwrap();
        };
        fs::create_dir(&bundle).unwrap();
        make(GONE, GONE);
        assert_eq!(abandoned(), 0, "containerd still has the bundle");
        fs::remove_dir(&bundle).unwrap();
        assert_eq!(abandoned(), 1);
        assert_eq!(abandoned(), 1, "its removal was broken off");
        dir.take().unwrap().unwrap().remove().unwrap();
        make(GONE, own);
        assert_eq!(abandoned(), 0, "its shim lives");
        make(own, GONE);
        assert_eq!(abandoned(), 0, "its `start` lives");
        dir.take().unwrap().unwrap().remove().unwrap();
        make_dir(dir.path()).unwrap();
        assert_eq!(abandoned(), 1, "its `start` was killed at once");
    }

    #[test]
    fn directory_that_cannot_be_read_does_not_keep_the_others() {
        let root = tempfile::tempdir().unwrap();
        let namespace = "k8s.io".parse().unwrap();
        let [bad, old] = ["bad", "old"].map(|id| {
            let dir = StateDir::of(root.path(), &namespace, &id.parse().unwrap());
            create(&dir);
            dir
        });
        fs::write(bad.path().join(SHIM), "no JSON").unwrap();
        let taken = StateDir::take_abandoned(root.path(), &namespace).unwrap();
        let taken: Vec<_> = taken.iter().map(Leftovers::path).collect();
        assert_eq!(taken, [old.away().path()]);
    }

    #[test]
    fn file_in_the_place_of_the_namespace_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        fs::write(dir.path().parent().unwrap(), "").unwrap();
        assert!(dir.create(&dir.lock().unwrap(), GONE).is_err());
    }

    #[test]
    fn half_written_record_is_not_seen() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        create(&dir);
        fs::write(dir.path().join("shim.json.new"), "{\"pid\":").unwrap();
        assert_eq!(dir.take().unwrap().unwrap().shim, None);
    }
}
