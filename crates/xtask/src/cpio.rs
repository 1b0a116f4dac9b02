// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Writes initramfs archives: cpio, format "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same input gives the same bytes: no times, no inode numbers of the build machine, all owned by root.

use std::io::{self, Write};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
pub(crate) struct Archive<W> {
    to: W,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub(crate) fn new(to: W) -> Self {
        Self { to, next_inode: 1 }
    }

    /// Adds a folder, mode 0755. Parents come first.
    ///
    /// # Errors
    /// Those of the writer, for this and the methods below.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a character device, mode 0600.
    pub(crate) fn character_device(
        &mut self,
        path: &str,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// Writes the end mark and returns the writer.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.to)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_big = |_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                "cpio holds files of less than 4 GiB",
            )
        };
        let size = u32::try_from(content.len()).map_err(too_big)?;
        let name_size = u32::try_from(path.len().saturating_add(1)).map_err(too_big)?;
        let links = 1;
        // magic, inode, mode, uid, gid, links, mtime, size, device of the file (2), device it is (2), name's size, check
        write!(
            self.to,
            "070701{:08X}{mode:08X}{:08X}{:08X}{links:08X}{:08X}{size:08X}",
            self.next_inode, 0, 0, 0
        )?;
        write!(
            self.to,
            "{:08X}{:08X}{:08X}{:08X}{name_size:08X}{:08X}",
            0, 0, device.0, device.1, 0
        )?;
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad(110_usize.saturating_add(path.len()).saturating_add(1))?;
        self.to.write_all(content)?;
        self.pad(content.len())?;
        self.next_inode = self.next_inode.saturating_add(1);
        Ok(())
    }

    /// Fields of `written` bytes end on a multiple of 4.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        let missing = written.next_multiple_of(4).saturating_sub(written);
        self.to.write_all([0; 4].get(..missing).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"#!/bin/true\n").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn archive_is_read_by_busybox_cpio() {
        let folder = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-t", "-v"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&sample()).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        assert!(
            listing.contains("crw-------") && listing.contains("dev/console"),
            "{listing}"
        );
        assert!(
            listing.contains("-rwxr-xr-x") && listing.contains("12 ") && listing.contains("init"),
            "{listing}"
        );
    }

    #[test]
    fn same_input_gives_same_bytes() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % 4, 0);
    }
}
