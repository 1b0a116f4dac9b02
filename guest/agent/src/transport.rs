// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How the agent and the host reach each other: vsock in a VM, unix sockets in tests.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use agent_core::log;
use agent_core::stdio::Stream;
use agent_proto::CONTROL_PORT;
use ids::VsockPort;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// vsock(7): the host, and any of the guest's own addresses.
const CID_HOST: u32 = 2;
const CID_ANY: u32 = u32::MAX;

/// The kernel's own limit of 2 s is too short on a node whose processors are all taken; the host has a limit for the boot as a
/// whole.
const DIAL_TIMEOUT_SECONDS: i64 = 3600;

/// `linux/vm_sockets.h`: a level of its own, and on 64-bit processors the option that takes a `timeval`.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// As many streams as may come at once: three for each process of a large pod.
const BACKLOG: i32 = 128;

/// One of the two ways.
pub(crate) enum Transport {
    /// AF_VSOCK.
    Vsock,
    /// `control.sock`, where the other end listens, and `<port>.sock`, where the agent does, in this folder.
    Unix(PathBuf),
}

impl Transport {
    /// Listens on a port.
    pub(crate) fn listen(&self, port: VsockPort) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock => {
                let listener = vsock()?;
                bind(listener.as_raw_fd(), &VsockAddr::new(CID_ANY, port.0))?;
                listen(&listener, Backlog::new(BACKLOG)?)?;
                Ok(listener)
            }
            Self::Unix(folder) => {
                Ok(UnixListener::bind(folder.join(format!("{port}.sock")))?.into())
            }
        }
    }

    /// Connects to the host.
    pub(crate) fn dial(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock => {
                let connection = vsock()?;
                be_patient(&connection)?;
                connect(
                    connection.as_raw_fd(),
                    &VsockAddr::new(CID_HOST, CONTROL_PORT.0),
                )?;
                Ok(connection)
            }
            Self::Unix(folder) => Ok(UnixStream::connect(folder.join("control.sock"))?.into()),
        }
    }
}

fn vsock() -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Lets a connection take [`DIAL_TIMEOUT_SECONDS`] to come about.
#[expect(unsafe_code, reason = "no library knows this option")]
fn be_patient(socket: &OwnedFd) -> io::Result<()> {
    let timeout = libc::timeval {
        tv_sec: DIAL_TIMEOUT_SECONDS,
        tv_usec: 0,
    };
    let size = libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap_or(0);
    // SAFETY: the pointer and the size are those of `timeout`, which outlives the call; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls `accepted` with each new connection, for ever.
pub(crate) async fn accept(listener: OwnedFd, mut accepted: impl FnMut(Stream)) -> io::Result<()> {
    let listener = Stream::new(listener)?;
    loop {
        let connection = listener
            .when_readable(|listener| {
                accept_with(listener, SocketFlags::CLOEXEC).map_err(Into::into)
            })
            .await
            .and_then(Stream::new);
        match connection {
            Ok(connection) => accepted(connection),
            // The peer's fault, or a shortage that passes: the next connection has its own chance.
            Err(error) => {
                log::warn(&format!("accepting a stream: {error}"));
                tokio::task::yield_now().await;
            }
        }
    }
}

/// The control connection, which tells when the host closes it.
pub(crate) struct Connection {
    stream: Stream,
    closed: Option<oneshot::Sender<()>>,
}

impl Connection {
    pub(crate) fn new(descriptor: OwnedFd) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let (sender, closed) = oneshot::channel();
        Ok((
            Self {
                stream: Stream::new(descriptor)?,
                closed: Some(sender),
            },
            closed,
        ))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        let end = buffer.remaining() > 0 && buffer.filled().len() == before;
        if (end || result.is_err())
            && let Some(closed) = self.closed.take()
        {
            // The receiver lives as long as the agent serves.
            let _ = closed.send(());
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A listener with this one connection and no other.
pub(crate) fn once(connection: Connection) -> ttrpc::r#async::transport::Listener {
    ttrpc::r#async::transport::Listener::new(futures::stream::iter([Ok(connection)]))
}
