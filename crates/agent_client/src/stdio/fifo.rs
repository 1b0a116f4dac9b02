// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Moves bytes between a pipe and a socket inside the kernel, without blocking.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most bytes that one splice moves; the pipe's capacity is the real limit.
const MAX_SPLICE: usize = 1 << 20;

/// Watches a non-blocking descriptor.
#[expect(
    unsafe_code,
    reason = "tokio's registration asks for a promise about the descriptor"
)]
pub(super) fn watch(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: an OwnedFd names one open descriptor, always the same, until it is dropped, and the AsyncFd has a share in it
    // for as long as it lives.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Moves what there is, at least one byte; 0 at the end of the stream. One end must be a pipe, both must be
/// non-blocking. Cancel-safe: nothing is moved unless it is counted.
pub(super) async fn splice(
    from: &AsyncFd<Arc<OwnedFd>>,
    to: &AsyncFd<Arc<OwnedFd>>,
) -> io::Result<usize> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::pipe::splice(from, None, to, None, MAX_SPLICE, flags) {
            Ok(moved) => return Ok(moved),
            Err(rustix::io::Errno::AGAIN) => {
                // One of the two was not ready after all, and only its readiness may be forgotten: an edge that was
                // dropped by mistake does not come back.
                let (input, output) = ready(from, to)?;
                if !input {
                    readable.clear_ready();
                }
                if !output {
                    writable.clear_ready();
                }
                if input && output {
                    tokio::task::yield_now().await;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn ready(from: impl AsFd, to: impl AsFd) -> io::Result<(bool, bool)> {
    let mut fds = [
        PollFd::new(&from, PollFlags::IN),
        PollFd::new(&to, PollFlags::OUT),
    ];
    poll(&mut fds, Some(&Timespec::default()))?;
    let [input, output] = fds.map(|fd| !fd.revents().is_empty());
    Ok((input, output))
}
