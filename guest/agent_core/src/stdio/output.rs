// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a process's output to its connection.
//!
//! Pipes are spliced, so that the bytes are copied once, into the socket's packets. A terminal cannot be spliced to a
//! socket (splice(2) wants a pipe), and is read and written.

use std::io;
use std::os::fd::AsFd as _;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Stream;

/// The most bytes moved by one splice: a pipe of the default size.
const SPLICE_LEN: usize = 64 * 1024;

/// The buffer for what cannot be spliced.
const BUFFER_LEN: usize = 16 * 1024;

/// Moves everything that `source` gives to `sink`, and says how many bytes `sink` took. If the host's end goes away the
/// rest is read and thrown away: the process must not stall.
///
/// A terminal's end (`EIO`, when all processes have left it) is an end like any other.
pub async fn pump_output(source: &mut Stream, sink: &mut Stream, terminal: bool) -> u64 {
    let mut sent = 0_u64;
    let result = if terminal {
        copy(source, sink, &mut sent).await
    } else {
        match splice(source, sink, &mut sent).await {
            // This kind of socket cannot be spliced to; nothing was moved by the call.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                copy(source, sink, &mut sent).await
            }
            other => other,
        }
    };
    if result.is_err() {
        discard(source).await;
    }
    sent
}

async fn splice(source: &Stream, sink: &Stream, sent: &mut u64) -> io::Result<()> {
    loop {
        let step = source
            .when_readable(|pipe| {
                match rustix::pipe::splice(
                    pipe,
                    None,
                    sink.as_fd(),
                    None,
                    SPLICE_LEN,
                    SpliceFlags::NONBLOCK,
                ) {
                    Ok(count) => Ok(Some(count)),
                    // Either the pipe is empty or the socket is full: only then is there something to wait for elsewhere.
                    Err(Errno::AGAIN) if has_data(source) => Ok(None),
                    Err(error) => Err(error.into()),
                }
            })
            .await?;
        match step {
            Some(0) => return Ok(()),
            Some(count) => *sent = sent.saturating_add(u64::try_from(count).unwrap_or(u64::MAX)),
            None => {
                // Clears the readiness if the socket is in truth still full.
                sink.when_writable(|socket| {
                    if is_full(socket) {
                        Err(io::ErrorKind::WouldBlock.into())
                    } else {
                        Ok(())
                    }
                })
                .await?;
            }
        }
    }
}

fn has_data(pipe: &Stream) -> bool {
    ready_for(pipe.as_fd(), PollFlags::IN)
}

fn is_full(socket: std::os::fd::BorrowedFd<'_>) -> bool {
    !ready_for(socket, PollFlags::OUT)
}

/// Whether the descriptor has one of `wanted`, or an error that the next call will tell, at this moment.
fn ready_for(descriptor: std::os::fd::BorrowedFd<'_>, wanted: PollFlags) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(descriptor, wanted)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut polled, Some(&now)), Ok(1..))
}

async fn copy(source: &mut Stream, sink: &mut Stream, sent: &mut u64) -> io::Result<()> {
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
        *sent = sent.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
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
        assert_eq!(pump_output(&mut source, &mut sink, false).await, 3_000_000);
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
        pump_output(&mut source, &mut sink, false).await;
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
        assert_eq!(pump_output(&mut source, &mut sink, true).await, 5);
        drop(sink);
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bye\r\n");
    }
}
