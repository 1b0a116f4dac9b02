// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a connection to a process's input.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use super::Stream;

const BUFFER_LEN: usize = 64 * 1024;

/// Moves what the host sends to the process, until the host's end is closed, or `close_after` says how many bytes there
/// are and so many have `passed`, or the process has closed its end. Dropping both streams afterwards tells both sides.
pub async fn pump_input(
    source: &mut Stream,
    sink: &mut Stream,
    close_after: &mut watch::Receiver<Option<u64>>,
    passed: &AtomicU64,
) {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        if close_after
            .borrow_and_update()
            .is_some_and(|bytes| passed.load(Ordering::Relaxed) >= bytes)
        {
            return;
        }
        let count = tokio::select! {
            read = source.read(&mut buffer) => match read {
                Ok(count @ 1..) => count,
                Ok(0) | Err(_) => return,
            },
            changed = close_after.changed() => match changed {
                Ok(()) => continue,
                // The process is forgotten; what the host still sends has no reader.
                Err(_) => return,
            },
        };
        // EPIPE: the process reads no more.
        if sink
            .write_all(buffer.get(..count).unwrap_or_default())
            .await
            .is_err()
        {
            return;
        }
        passed.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    fn streams() -> (UnixStream, Stream, Stream, std::fs::File) {
        let (host, guest) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        (
            host,
            Stream::new(guest.into()).unwrap(),
            Stream::new(writer).unwrap(),
            reader.into(),
        )
    }

    #[tokio::test]
    async fn input_closes_after_the_bytes_announced_and_not_before() {
        let (mut host, mut source, mut sink, mut process) = streams();
        let (close, mut close_after) = watch::channel(None);
        host.write_all(b"first ").unwrap();
        close.send_replace(Some(12));
        let pump = tokio::spawn(async move {
            pump_input(&mut source, &mut sink, &mut close_after, &AtomicU64::new(0)).await
        });
        tokio::task::yield_now().await;
        assert!(!pump.is_finished());
        host.write_all(b"second").unwrap();
        pump.await.unwrap();
        let mut text = String::new();
        process.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first second");
    }

    #[tokio::test]
    async fn input_closes_when_the_host_does() {
        let (mut host, mut source, mut sink, mut process) = streams();
        let (_close, mut close_after) = watch::channel(None);
        host.write_all(b"all").unwrap();
        drop(host);
        pump_input(&mut source, &mut sink, &mut close_after, &AtomicU64::new(0)).await;
        drop(sink);
        let mut text = String::new();
        process.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all");
    }

    #[tokio::test]
    async fn process_that_reads_no_more_does_not_stall_the_host() {
        let (mut host, mut source, mut sink, process) = streams();
        let (_close, mut close_after) = watch::channel(None);
        drop(process);
        host.write_all(b"x").unwrap();
        pump_input(&mut source, &mut sink, &mut close_after, &AtomicU64::new(0)).await;
        drop(source);
        assert!(host.write_all(&[0; 1000]).is_err());
    }
}
