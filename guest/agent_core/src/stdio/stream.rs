// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A descriptor on the event loop: a socket of any family, a pipe's end, or a terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Where tickets come from.
static NEXT_TICKET: AtomicU64 = AtomicU64::new(0);

/// The most bytes in one write. The guest's kernel puts a vsock packet of up to 32 KiB, headers included, into one piece of
/// memory, and a larger one into several; there are VMMs that drop a packet of more than two descriptors.
const MAX_WRITE_LEN: usize = 28 * 1024;

/// A non-blocking descriptor with its place in epoll. AF_VSOCK, AF_UNIX, pipes and terminals all read and write alike.
#[derive(Debug)]
pub struct Stream {
    inner: AsyncFd<OwnedFd>,
    ticket: u64,
}

impl Stream {
    /// Makes `descriptor` non-blocking and watches it. Needs the runtime.
    ///
    /// # Errors
    /// Those of `fcntl(2)` and `epoll_ctl(2)`.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        let ticket = NEXT_TICKET.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            inner: register(descriptor)?,
            ticket,
        })
    }

    /// A number that no other stream of this process has.
    pub fn ticket(&self) -> u64 {
        self.ticket
    }

    /// Waits until there may be something to read, then does `step`; repeated while `step` says `WouldBlock`.
    ///
    /// # Errors
    /// Those of `step`.
    pub async fn when_readable<T>(
        &self,
        mut step: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut guard = self.inner.readable().await?;
            if let Ok(result) = guard.try_io(|inner| step(inner.get_ref().as_fd())) {
                return result;
            }
        }
    }

    /// Says that nothing more is written.
    ///
    /// # Errors
    /// Those of `shutdown(2)`.
    pub fn finish(&self) -> io::Result<()> {
        rustix::net::shutdown(self.inner.get_ref(), rustix::net::Shutdown::Write)
            .map_err(Into::into)
    }
}

#[expect(
    unsafe_code,
    reason = "tokio leaves the life of a descriptor to its caller"
)]
fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the AsyncFd and only ever lent out, so it stays open and the same for its life.
    unsafe { AsyncFd::register(descriptor) }.map_err(Into::into)
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.get_ref().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.inner.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|inner| {
                rustix::io::read(inner.get_ref(), &mut *unfilled).map_err(Into::into)
            }) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let bytes = bytes.get(..MAX_WRITE_LEN).unwrap_or(bytes);
        loop {
            let mut guard = ready!(self.inner.poll_write_ready(context))?;
            if let Ok(result) =
                guard.try_io(|inner| rustix::io::write(inner.get_ref(), bytes).map_err(Into::into))
            {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}
