// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The file system device, which comes while the VM runs.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_device::balloon::Backing;
use virtio_device::fs::{Fs, FsOptions};
use virtio_wire::fs::QUEUES;
use vm_memory::GuestAddressSpace;

use super::Machine;
use crate::boot::cmdline;
use crate::sharing::{self, Target};
use crate::{End, Ends, VmmError};

/// What comes with a file system device.
pub struct FileSystemParts {
    /// The vhost-user connection to the file server.
    pub connection: UnixStream,
    /// An empty file for guest memory with all that can be plugged, exactly as large, sealed against shrinking.
    pub memory: File,
    /// `/proc/<pid>/pagemap` of this process.
    pub pagemap: File,
}

impl Machine {
    /// Puts a file system device into a free slot; answers the guest's name of the slot's device. Guest memory moves into
    /// `parts.memory` first, for which the VM pauses.
    ///
    /// When the file server is lost later, `ends` hears of it: a guest does not recover from that.
    ///
    /// # Errors
    /// There is one already, no slot is free, or the file server does not do its part: nothing has changed then. If guest
    /// memory cannot be moved, the VM goes on, but never gets the device.
    pub fn attach_file_system(
        &mut self,
        tag: &str,
        parts: FileSystemParts,
        ends: &Arc<Ends>,
    ) -> Result<String, VmmError> {
        if let Some((_, tag)) = &self.file_system {
            return Err(VmmError::FileSystemInUse { tag: tag.clone() });
        }
        let index = self.free_slot()?;
        let kicks = Self::kicks(QUEUES)?;
        let memory = Arc::new(parts.memory);
        let fs = Fs::new(FsOptions {
            tag: tag.to_owned(),
            connection: parts.connection,
            memory: Arc::clone(&memory),
            regions: sharing::regions(&self.memory.memory(), &self.resizing.pluggable),
            kicks: kicks.clone(),
            on_loss: Box::new({
                let ends = Arc::clone(ends);
                move |reason| ends.report(End::Failed(VmmError::FileServer { reason }))
            }),
        })
        .map_err(|source| VmmError::Device { name: "fs", source })?;
        self.file_system = Some((index, tag.to_owned()));
        self.share_memory(&memory, &parts.pagemap)?;
        let io = Arc::clone(&self.io);
        self.install(index, Box::new(fs), kicks, io)?;
        Ok(cmdline::platform_device(index))
    }

    fn share_memory(&mut self, file: &Arc<File>, pagemap: &File) -> Result<(), VmmError> {
        let running = !self.paused.load(Ordering::SeqCst);
        if running {
            self.pause();
        }
        let target = Target {
            file,
            pagemap,
            from_files: &self.from_files,
            pluggable: &self.resizing.pluggable,
        };
        let result = sharing::share(&self.memory.memory(), &target);
        if result.is_ok() {
            self.backing.set(Backing::Shared);
            self.resizing.share(&self.memory, Arc::clone(file));
        }
        if running {
            self.resume();
        }
        result
    }
}
