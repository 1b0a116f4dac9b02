// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's end: where streams come from, the line a caller opens with, and one epoll descriptor for all of it.
//!
//! Everything is registered edge-triggered: a stream that has bytes the guest has no credit for causes one event for
//! each write of the host, and none after; with level-triggered input it would keep the thread busy until the
//! guest reads. What an edge said is remembered in the stream until the socket says that it would block.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use ids::VsockPort;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Where connections of the guest to the host end up.
///
/// The embedded VMM resolves no path after its start, so it cannot connect to `<socket>_<port>` as other hybrid vsock
/// devices do; see `docs/decisions/0003-vsock-by-descriptor.md`. Its implementation makes a socket pair and
/// hands one end to the process that listens.
///
/// Caller: the vsock worker, for a port on its allow-list only, once per connection request of the guest.
pub trait HostPorts: Send {
    /// A connected stream to whoever serves `port`. Must not block.
    ///
    /// # Errors
    /// Nobody serves it, or not now; the guest's connection is then refused.
    fn open(&mut self, port: VsockPort) -> io::Result<UnixStream>;
}

/// The longest line a host process opens with, in bytes: `CONNECT 4294967295` and its end of line.
pub(super) const MAX_GREETING: usize = 19;

/// What a host process has said so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Greeting {
    /// A whole line: it wants this port of the guest. The line's length in bytes.
    Connect(VsockPort, usize),
    /// No end of line yet.
    Partial,
    /// Something else.
    Bad,
}

impl Greeting {
    /// Reads what has come so far: `CONNECT <port>\n`, the port in decimal. Pure.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let line = bytes.get(..MAX_GREETING).unwrap_or(bytes);
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
            let more_may_come = bytes.len() < MAX_GREETING;
            return if more_may_come {
                Self::Partial
            } else {
                Self::Bad
            };
        };
        let digits = line.get(..end).and_then(|l| l.strip_prefix(b"CONNECT "));
        let port = digits
            .filter(|digits| digits.iter().all(u8::is_ascii_digit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok());
        match port {
            Some(port) => Self::Connect(VsockPort(port), end.saturating_add(1)),
            None => Self::Bad,
        }
    }

    /// Looks at what has come on `socket`; takes the line, and no byte behind it, if it is whole.
    ///
    /// # Errors
    /// The socket's own; [`io::ErrorKind::UnexpectedEof`] if the line will never be whole.
    pub(super) fn receive(socket: &UnixStream) -> io::Result<Self> {
        let mut line = [0; MAX_GREETING];
        let fd = socket.as_raw_fd();
        let n = match recv(fd, &mut line, MsgFlags::MSG_PEEK) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Self::Partial),
            Err(error) => return Err(error.into()),
        };
        let greeting = Self::parse(line.get(..n).unwrap_or(&line));
        if let Self::Connect(_, len) = greeting
            && let Some(taken) = line.get_mut(..len)
        {
            recv(fd, taken, MsgFlags::empty())?;
        }
        Ok(greeting)
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A host process connects.
    Listener,
    /// A deadline has come.
    Timer,
    /// A stream, by its token.
    Stream(u64),
}

const LISTENER_TOKEN: u64 = u64::MAX;
const TIMER_TOKEN: u64 = u64::MAX - 1;

/// What has happened to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edges {
    /// There are bytes, or the end of them.
    pub(super) readable: bool,
    /// There is room.
    pub(super) writable: bool,
    /// Neither direction works any more.
    pub(super) hung_up: bool,
}

/// Most events taken from the kernel in one go.
const EVENTS_PER_WAIT: usize = 64;

/// Watches the listener, the timer and all streams; one descriptor to the outside.
pub(super) struct Poller {
    epoll: Epoll,
    timer: TimerFd,
}

impl Poller {
    /// Watches `listener`.
    ///
    /// # Errors
    /// The host has no descriptors or memory left.
    pub(super) fn new(listener: &UnixListener) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(listener, EpollEvent::new(edge, LISTENER_TOKEN))?;
        epoll.add(&timer, EpollEvent::new(edge, TIMER_TOKEN))?;
        Ok(Self { epoll, timer })
    }

    /// Watches a stream for bytes and for its end. The kernel stops by itself when the stream is closed.
    ///
    /// # Errors
    /// The host has no memory left.
    pub(super) fn watch(&self, socket: &UnixStream, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(socket, EpollEvent::new(INPUT, token))?)
    }

    /// Also watches a stream for room to write, or no more; room that is there already counts as an edge.
    ///
    /// # Errors
    /// The host has no memory left.
    pub(super) fn watch_room(&self, socket: &UnixStream, token: u64, on: bool) -> io::Result<()> {
        let output = if on {
            EpollFlags::EPOLLOUT
        } else {
            EpollFlags::empty()
        };
        let mut event = EpollEvent::new(INPUT | output, token);
        Ok(self.epoll.modify(socket, &mut event)?)
    }

    /// Sets the timer to go off once, `after` from now.
    ///
    /// # Errors
    /// None that a valid timer has.
    pub(super) fn set_timer(&self, after: Duration) -> io::Result<()> {
        // A timer of zero would be no timer.
        let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        let flags = TimerSetTimeFlags::empty();
        Ok(self.timer.set(Expiration::OneShot(after), flags)?)
    }

    /// Events so far, without waiting; at most a bounded number, the rest the next time.
    ///
    /// # Errors
    /// None that a valid epoll descriptor has.
    pub(super) fn events(&self) -> io::Result<Vec<(Source, Edges)>> {
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAIT];
        let n = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(n) => n,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(events.iter().take(n).map(decode).collect())
    }
}

const INPUT: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);

fn decode(event: &EpollEvent) -> (Source, Edges) {
    let source = match event.data() {
        LISTENER_TOKEN => Source::Listener,
        TIMER_TOKEN => Source::Timer,
        token => Source::Stream(token),
    };
    let flags = event.events();
    let over = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
    let edges = Edges {
        readable: flags.intersects(INPUT | over),
        writable: flags.intersects(EpollFlags::EPOLLOUT | over),
        hung_up: flags.intersects(over),
    };
    (source, edges)
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn greeting_whole_gives_the_port() {
        let greeting = Greeting::parse(b"CONNECT 5000\nand data");
        assert_eq!(greeting, Greeting::Connect(VsockPort(5000), 13));
        let largest = Greeting::parse(b"CONNECT 4294967295\n");
        assert_eq!(
            largest,
            Greeting::Connect(VsockPort(u32::MAX), MAX_GREETING)
        );
    }

    #[test]
    fn greeting_cut_anywhere_is_partial() {
        let line = b"CONNECT 4294967295\n";
        for n in 0..line.len() {
            assert_eq!(Greeting::parse(&line[..n]), Greeting::Partial);
        }
    }

    #[test]
    fn greeting_of_another_form_is_bad() {
        for line in [
            &b"\n"[..],
            b"CONNECT \n",
            b"CONNECT\n",
            b"connect 1\n",
            b"CONNECT 1 \n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 0x10\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1\r\n",
            b"GET / HTTP/1.1\r\nHost: \xff\n",
            b"CONNECT 0000000000000001\n",
            &[b'x'; MAX_GREETING],
        ] {
            assert_eq!(Greeting::parse(line), Greeting::Bad, "{line:?}");
        }
    }

    #[test]
    fn greeting_received_leaves_the_bytes_behind_it() {
        let (mut host, mut ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        assert_eq!(Greeting::receive(&ours).unwrap(), Greeting::Partial);
        host.write_all(b"CONNECT").unwrap();
        assert_eq!(Greeting::receive(&ours).unwrap(), Greeting::Partial);
        host.write_all(b" 7\nhello").unwrap();
        let greeting = Greeting::receive(&ours).unwrap();
        assert_eq!(greeting, Greeting::Connect(VsockPort(7), 10));
        let mut rest = [0; 5];
        ours.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn greeting_never_finished_is_an_error() {
        let (mut host, ours) = UnixStream::pair().unwrap();
        host.write_all(b"CONN").unwrap();
        drop(host);
        assert_eq!(Greeting::receive(&ours).unwrap(), Greeting::Partial);
        let (host, ours) = UnixStream::pair().unwrap();
        drop(host);
        let error = Greeting::receive(&ours).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
