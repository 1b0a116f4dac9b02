// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a process's output to its connection.
//!
//! Read and written, not spliced: virtio-vsock copies the bytes into its packets in either case.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Stream;

/// A pipe of the default size in one read.
const BUFFER_LEN: usize = 64 * 1024;

/// Moves everything that `source` gives to `sink`, counting in `sent` the bytes that `sink` took. If the host's end goes
/// away the rest is read and thrown away: the process must not stall.
///
/// A terminal's end (`EIO`, when all processes have left it) is an end like any other.
pub async fn pump_output(source: &mut Stream, sink: &mut Stream, sent: &AtomicU64) {
    if copy(source, sink, sent).await.is_err() {
        discard(source).await;
    }
}

async fn copy(source: &mut Stream, sink: &mut Stream, sent: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let count = match source.read(&mut buffer).await {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        sink.write_all(buffer.get(..count).unwrap_or_default())
            .await?;
        sent.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Reads to the end.
pub(crate) async fn discard(source: &mut Stream) {
    let mut buffer = vec![0; BUFFER_LEN];
    while matches!(source.read(&mut buffer).await, Ok(1..)) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    fn pipe() -> (Stream, std::fs::File) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        (Stream::new(reader).unwrap(), writer.into())
    }

    fn socket() -> (Stream, UnixStream) {
        let (guest, host) = UnixStream::pair().unwrap();
        (Stream::new(guest.into()).unwrap(), host)
    }

    #[tokio::test]
    async fn slow_reader_gets_every_byte() {
        let (mut source, mut writer) = pipe();
        let (mut sink, mut host) = socket();
        let expected: Vec<u8> = (0..3_000_000_u32)
            .map(|number| number.to_le_bytes()[0] ^ number.to_le_bytes()[1])
            .collect();
        let bytes = expected.clone();
        let process = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            let mut part = vec![0; 1000];
            while let Ok(count @ 1..) = host.read(&mut part) {
                received.extend_from_slice(&part[..count]);
            }
            received
        });
        let sent = AtomicU64::new(0);
        pump_output(&mut source, &mut sink, &sent).await;
        assert_eq!(sent.into_inner(), 3_000_000);
        drop(sink);
        process.join().unwrap();
        assert!(reader.join().unwrap() == expected);
    }

    #[tokio::test]
    async fn host_that_goes_away_does_not_stall_the_process() {
        let (mut source, mut writer) = pipe();
        let (mut sink, host) = socket();
        drop(host);
        let process = std::thread::spawn(move || writer.write_all(&vec![7; 1_000_000]).unwrap());
        pump_output(&mut source, &mut sink, &AtomicU64::new(0)).await;
        process.join().unwrap();
    }

    #[tokio::test]
    async fn terminal_ends_with_its_last_user() {
        let controller =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY)
                .unwrap();
        rustix::pty::unlockpt(&controller).unwrap();
        let user =
            rustix::pty::ioctl_tiocgptpeer(&controller, rustix::pty::OpenptFlags::RDWR).unwrap();
        let mut user = std::fs::File::from(user);
        user.write_all(b"bye\n").unwrap();
        drop(user);
        let (mut sink, mut host) = socket();
        let mut source = Stream::new(controller).unwrap();
        let sent = AtomicU64::new(0);
        pump_output(&mut source, &mut sink, &sent).await;
        assert_eq!(sent.into_inner(), 5);
        drop(sink);
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bye\r\n");
    }
}
