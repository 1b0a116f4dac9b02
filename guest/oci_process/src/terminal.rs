// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The terminal of a process: a pair from the container's own devpts, its controlling end handed to the agent.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, fstatfs, open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt};

use crate::Error;
use crate::error::Context as _;
use crate::rootfs::{bind_over, open_in_new_root};

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Both ends of a terminal.
pub(crate) struct Terminal {
    /// For the agent.
    pub(crate) controller: OwnedFd,
    /// The process's standard input, output and error.
    pub(crate) user: OwnedFd,
}

/// Opens a terminal of the container whose root this is.
///
/// # Errors
/// [`Error::Step`], also where `/dev/pts` is no devpts: an image must not choose what the agent reads from.
pub(crate) fn open_terminal() -> Result<Terminal, Error> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let controller = open("/dev/pts/ptmx", flags, Mode::empty())
        .step(|| "opening a terminal (/dev/pts/ptmx)".to_owned())?;
    let magic = fstatfs(&controller)
        .step(|| "looking at /dev/pts/ptmx".to_owned())?
        .f_type;
    if magic != DEVPTS_MAGIC {
        return Err(Error::invalid(
            "mounts",
            "have no devpts at /dev/pts, which a terminal needs",
        ));
    }
    unlockpt(&controller).step(|| "unlocking the terminal".to_owned())?;
    let user = ioctl_tiocgptpeer(
        &controller,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .step(|| "opening the terminal's other end".to_owned())?;
    Ok(Terminal { controller, user })
}

impl Terminal {
    /// Makes the terminal the container's `/dev/console`.
    ///
    /// # Errors
    /// [`Error::Step`].
    pub(crate) fn become_console(&self) -> Result<(), Error> {
        let step = || "making the terminal /dev/console".to_owned();
        let name = ptsname(&self.controller, Vec::new()).step(step)?;
        let create =
            OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
        match open("/dev/console", create, Mode::from_raw_mode(0o620)) {
            Ok(_) => {}
            Err(error) => return Err(error).step(step),
        }
        let place = open_in_new_root(Path::new("/dev/console")).step(step)?;
        let name = name
            .to_str()
            .map_err(|_| Error::Protocol("the terminal's name"))?;
        let terminal = open_in_new_root(Path::new(name)).step(step)?;
        bind_over(terminal, place, false).step(step)
    }
}
