// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The socket through which the host reaches ports of the guest, without a file that could be left behind.
//!
//! A listening unix socket needs a name for a moment. It gets one in a private folder, is then opened as a descriptor
//! (`O_PATH`), and the name is removed: from then on the only way to it is the descriptor, through `/proc/self/fd`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hypervisor::{DriverError, DriverErrorKind};
use ids::VsockPort;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the guest may take to accept a connection: longer than the VMM waits for it, which then says why not.
const CONNECT_DEADLINE: Duration = Duration::from_secs(25);
/// The longest answer: `OK 4294967295` and its end of line.
const MAX_ANSWER_BYTES: usize = 14;

/// Names sockets of this process apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The way to the guest's ports.
#[derive(Debug)]
pub(crate) struct GuestSocket {
    node: OwnedFd,
}

impl GuestSocket {
    /// A listener for the VMM, and the way to it.
    ///
    /// # Errors
    /// [`DriverErrorKind::Failed`] if the folder is not usable.
    pub(crate) fn create(folder: &Path) -> Result<(UnixListener, Self), DriverError> {
        let failed = |source: io::Error| {
            let text = format!("cannot make a socket in {}", folder.display());
            DriverError::new(DriverErrorKind::Failed, text).because(source)
        };
        // The folder's path may be longer than a socket's address can be.
        let directory = std::fs::File::open(folder).map_err(failed)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vsock-{}-{number}", std::process::id());
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let node = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        std::fs::remove_file(&path).map_err(failed)?;
        let node = node.map_err(|error| failed(error.into()))?;
        Ok((listener, Self { node }))
    }

    /// A stream to `port` of the guest.
    ///
    /// # Errors
    /// [`DriverErrorKind::Refused`] if nobody listens, [`DriverErrorKind::Timeout`] after five seconds.
    pub(crate) async fn connect(&self, port: VsockPort) -> Result<UnixStream, DriverError> {
        match timeout(CONNECT_DEADLINE, self.try_connect(port)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => {
                let text = format!("nobody in the guest listens on vsock port {port}");
                Err(DriverError::new(DriverErrorKind::Refused, text).because(source))
            }
            Err(_) => {
                let text = format!("the guest does not answer on vsock port {port}");
                Err(DriverError::new(DriverErrorKind::Timeout, text))
            }
        }
    }

    async fn try_connect(&self, port: VsockPort) -> io::Result<UnixStream> {
        let path = format!("/proc/self/fd/{}", self.node.as_raw_fd());
        let mut stream = UnixStream::connect(path).await?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        // Byte by byte: what follows the line belongs to the caller.
        let mut answer = Vec::with_capacity(MAX_ANSWER_BYTES);
        loop {
            let byte = stream.read_u8().await?;
            if byte == b'\n' {
                break;
            }
            if answer.len() >= MAX_ANSWER_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            answer.push(byte);
        }
        match answer.strip_prefix(b"OK ") {
            Some(_) => Ok(stream),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[tokio::test]
    async fn socket_is_reachable_although_its_name_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, socket) = GuestSocket::create(folder.path()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 12];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 512\n");
            stream.write_all(b"OK 1073741824\nhello").unwrap();
        });
        let mut stream = socket.connect(VsockPort(512)).await.unwrap();
        let mut rest = [0; 5];
        stream.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"hello");
        server.join().unwrap();
    }

    #[tokio::test]
    async fn closed_or_chatty_peer_is_a_refusal() {
        for answer in [&b""[..], b"NO\n", b"OK 12345678901234567890\n"] {
            let folder = tempfile::tempdir().unwrap();
            let (listener, socket) = GuestSocket::create(folder.path()).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = [0; 10];
                stream.read_exact(&mut line).unwrap();
                stream.write_all(answer).unwrap();
            });
            let error = socket.connect(VsockPort(1)).await.unwrap_err();
            assert_eq!(error.kind(), DriverErrorKind::Refused);
            server.join().unwrap();
        }
    }

    #[tokio::test]
    async fn listener_gone_is_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let (listener, socket) = GuestSocket::create(folder.path()).unwrap();
        drop(listener);
        let error = socket.connect(VsockPort(1)).await.unwrap_err();
        assert_eq!(error.kind(), DriverErrorKind::Refused);
    }
}
