// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Children that cannot outlive the thread that started them, and that inherit chosen descriptors.

#![expect(unsafe_code, reason = "both are set between fork and exec")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;

/// Starts a program that is killed when the calling thread ends, and that has `inherited` under the same numbers.
///
/// # Errors
/// When it cannot be run.
pub(crate) fn spawn(command: &mut Command, inherited: &[BorrowedFd]) -> Result<Child> {
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only prctl and fcntl are called, which are async-signal-safe, and no memory is
    // allocated. The child has copies of `inherited`, which are open until this function returns.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            numbers.iter().try_for_each(|number| keep_at_exec(*number))
        });
    }
    command
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// Clears the close-on-exec flag.
fn keep_at_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: `spawn`'s caller lends these descriptors for longer than the fork takes, so the child has them open.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn inherited_descriptor_is_open_in_the_child() {
        let (mut read, write) = io::pipe().unwrap();
        let script = format!("echo heard > /proc/self/fd/{}", write.as_raw_fd());
        let mut child = spawn(Command::new("sh").args(["-c", &script]), &[write.as_fd()]).unwrap();
        drop(write);
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(said, "heard\n");
    }

    #[test]
    fn child_dies_with_the_thread_that_started_it() {
        let thread = std::thread::spawn(|| spawn(Command::new("sleep").arg("1000"), &[]).unwrap());
        let status = thread.join().unwrap().wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    }
}
