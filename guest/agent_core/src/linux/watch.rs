// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Tells when something about a container's memory has happened (`memory.events` wakes inotify, cgroup-v2.rst).

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ids::ContainerId;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use crate::stdio::Stream;

/// Watches over the `memory.events` of all containers.
#[derive(Debug, Clone)]
pub struct MemoryWatch {
    inotify: Arc<OwnedFd>,
    containers: Arc<Mutex<HashMap<i32, ContainerId>>>,
}

impl MemoryWatch {
    /// A watch over nothing.
    ///
    /// # Errors
    /// Those of `inotify_init1(2)`.
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            inotify: Arc::new(inotify),
            containers: Arc::default(),
        })
    }

    /// Watches one more cgroup. A cgroup without the memory controller tells nothing; the kernel forgets the watch with
    /// the cgroup.
    pub(super) fn add(&self, container: &ContainerId, cgroup: &Path) {
        if let Ok(number) = inotify::add_watch(
            &self.inotify,
            cgroup.join("memory.events"),
            WatchFlags::MODIFY,
        ) {
            self.containers().insert(number, container.clone());
        }
    }

    /// Calls `happened` for each container with news, for ever.
    ///
    /// # Errors
    /// Those of `read(2)` on inotify.
    pub async fn run(&self, mut happened: impl FnMut(&ContainerId)) -> io::Result<()> {
        let stream = Stream::new(self.inotify.try_clone()?)?;
        loop {
            let numbers = stream
                .when_readable(|descriptor| {
                    let mut buffer = [MaybeUninit::uninit(); 4096];
                    let mut reader = inotify::Reader::new(descriptor, &mut buffer);
                    let mut numbers = Vec::new();
                    loop {
                        let event = reader.next()?;
                        numbers.push((event.wd(), event.events().contains(ReadFlags::IGNORED)));
                        if reader.is_buffer_empty() {
                            return Ok(numbers);
                        }
                    }
                })
                .await?;
            for (number, gone) in numbers {
                let container = if gone {
                    self.containers().remove(&number);
                    None
                } else {
                    self.containers().get(&number).cloned()
                };
                if let Some(container) = container {
                    happened(&container);
                }
            }
        }
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<i32, ContainerId>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
