// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Hears by inotify that the kubelet has changed a volume.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::StorageError;

/// Hears of changes of volumes.
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
    volumes: BTreeMap<i32, String>,
}

impl Watch {
    /// A watch of nothing. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`StorageError::Io`] if the node has no inotify instance left.
    pub fn new() -> Result<Self, StorageError> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let step = "make an inotify instance (fs.inotify.max_user_instances) for";
        let inotify =
            inotify::init(flags).map_err(StorageError::errno(step, Path::new("volumes")))?;
        #[expect(
            unsafe_code,
            reason = "tokio cannot know what a type's descriptor does"
        )]
        // SAFETY: an OwnedFd names one open descriptor, always the same, until it is dropped, and the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
        let inotify = registered.map_err(|error| wait_error(error.into()))?;
        Ok(Self {
            inotify,
            volumes: BTreeMap::new(),
        })
    }

    /// Watches the volume `name` at `source` from here on.
    ///
    /// # Errors
    /// [`StorageError::Io`] if it is not there, or the node has no inotify watch left.
    pub fn add(&mut self, name: &str, source: &Path) -> Result<(), StorageError> {
        use inotify::WatchFlags;
        let flags = WatchFlags::ONLYDIR
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM;
        let step = "watch (fs.inotify.max_user_watches)";
        let watch = inotify::add_watch(self.inotify.get_ref(), source, flags)
            .map_err(StorageError::errno(step, source))?;
        self.volumes.insert(watch, name.to_owned());
        Ok(())
    }

    /// The volumes that have changed since it was asked last, each once, as soon as there are any. A future that is
    /// dropped loses nothing.
    ///
    /// # Errors
    /// [`StorageError::Io`] if the kernel does not tell.
    pub async fn changed(&mut self) -> Result<Vec<String>, StorageError> {
        loop {
            let mut ready = self.inotify.readable().await.map_err(wait_error)?;
            let names = heard(ready.get_inner(), &mut self.volumes)?;
            ready.clear_ready();
            if !names.is_empty() {
                return Ok(names);
            }
        }
    }
}

fn wait_error(error: std::io::Error) -> StorageError {
    StorageError::io("wait for changes of", Path::new("volumes"))(error)
}

/// The volumes that have changed, as far as the kernel has told; never waits.
fn heard(
    inotify: &OwnedFd,
    volumes: &mut BTreeMap<i32, String>,
) -> Result<Vec<String>, StorageError> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut changed = BTreeMap::new();
    let gone = inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED;
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(Errno::AGAIN) => return Ok(changed.into_values().collect()),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(wait_error(error.into())),
        };
        let (watch, what) = (event.wd(), event.events());
        if what.contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
            // Some were lost: whose, nobody knows.
            changed.extend(volumes.clone());
        } else if what.intersects(gone) {
            // The watch is no more, and its number may be given out again.
            volumes.remove(&watch);
        } else if let Some(name) = volumes.get(&watch) {
            changed.insert(watch, name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn heard_now(watch: &mut Watch) -> Vec<String> {
        heard(watch.inotify.get_ref(), &mut watch.volumes).unwrap()
    }

    #[tokio::test]
    async fn change_is_heard_once_and_only_of_its_volume() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut watch = Watch::new().unwrap();
        watch.add("one", one.path()).unwrap();
        watch.add("two", two.path()).unwrap();
        assert!(heard_now(&mut watch).is_empty());
        for name in ["a", "b"] {
            fs::write(two.path().join(name), "").unwrap();
        }
        assert_eq!(watch.changed().await.unwrap(), ["two"]);
        assert!(heard_now(&mut watch).is_empty());
        fs::rename(two.path().join("a"), two.path().join("..data")).unwrap();
        assert_eq!(watch.changed().await.unwrap(), ["two"]);
    }

    #[tokio::test]
    async fn volume_that_is_gone_is_heard_of_no_more() {
        let one = tempfile::tempdir().unwrap();
        let mut watch = Watch::new().unwrap();
        watch.add("one", one.path()).unwrap();
        one.close().unwrap();
        heard_now(&mut watch);
        assert!(watch.volumes.is_empty());
        let error = watch.add("gone", Path::new("/nowhere")).unwrap_err();
        assert!(error.is_not_found(), "{error}");
    }
}
