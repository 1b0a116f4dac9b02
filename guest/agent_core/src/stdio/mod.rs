// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Stdio streams: which connection belongs to which process, and the bytes between them.
//!
//! The host opens one connection for each stream and says in a header whose it is. Connection and process may come in
//! either order. A connection that no process claims is closed after [`UNCLAIMED_LIMIT`]; at most [`MAX_UNCLAIMED`] wait.

mod input;
mod output;
mod stream;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_proto::{HeaderError, MAX_HEADER_LEN, ProcessKey, StreamHeader, StreamKind};
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;

pub use input::pump_input;
pub(crate) use output::discard;
pub use output::pump_output;
pub use stream::Stream;

/// How long a connection may take to say whose it is.
pub const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection waits for its process.
pub const UNCLAIMED_LIMIT: Duration = Duration::from_secs(60);

/// The most connections that wait for their processes: three for each of 85 processes being made at once.
pub const MAX_UNCLAIMED: usize = 256;

type Key = (ProcessKey, StreamKind);

/// Connections and processes that wait for each other.
#[derive(Debug, Default)]
pub struct Connections {
    waiting: Mutex<HashMap<Key, Waiting>>,
    /// The bytes that each open stream has moved, for [`Self::dump`].
    moved: Mutex<HashMap<Key, Arc<AtomicU64>>>,
}

#[derive(Debug)]
enum Waiting {
    Connection(Stream, u64),
    Process(oneshot::Sender<Stream>),
}

impl Connections {
    /// Reads a new connection's header and keeps the connection for its process. Whatever is wrong with it, it is closed.
    pub async fn accept(self: &Arc<Self>, mut stream: Stream) {
        let Ok(Some(header)) = tokio::time::timeout(HEADER_LIMIT, read_header(&mut stream)).await
        else {
            return;
        };
        let key = (header.process, header.kind);
        let Some(ticket) = self.offer(&key, stream) else {
            return;
        };
        tokio::time::sleep(UNCLAIMED_LIMIT).await;
        self.expire(&key, ticket);
    }

    /// The connection of a process's stream, now or when it comes.
    pub fn claim(&self, process: &ProcessKey, kind: StreamKind) -> oneshot::Receiver<Stream> {
        let (sender, receiver) = oneshot::channel();
        let key = (process.clone(), kind);
        let mut waiting = self.lock();
        match waiting.remove(&key) {
            Some(Waiting::Connection(stream, _)) => {
                // The receiver is right here.
                let _ = sender.send(stream);
            }
            _ => {
                waiting.insert(key, Waiting::Process(sender));
            }
        }
        receiver
    }

    /// Where a process's stream counts its bytes until it is released.
    pub fn counter(&self, process: &ProcessKey, kind: StreamKind) -> Arc<AtomicU64> {
        let counter = Arc::new(AtomicU64::new(0));
        self.moved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((process.clone(), kind), counter.clone());
        counter
    }

    /// Forgets a process's stream and what waits for it, on either side.
    pub fn release(&self, process: &ProcessKey, kind: StreamKind) {
        let key = (process.clone(), kind);
        self.lock().remove(&key);
        self.moved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&key);
    }

    /// The open streams and their bytes, for people.
    pub fn dump(&self) -> serde_json::Value {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.lock();
        moved
            .iter()
            .map(|(key, bytes)| {
                serde_json::json!({
                    "container": key.0.container.as_str(),
                    "exec": key.0.exec.as_ref().map(ids::ExecId::as_str),
                    "kind": format!("{:?}", key.1),
                    "bytes": bytes.load(Ordering::Relaxed),
                    "connected": !waiting.contains_key(key),
                })
            })
            .collect()
    }

    /// How many connections and how many processes wait.
    pub fn state(&self) -> (usize, usize) {
        let waiting = self.lock();
        let connections = waiting
            .values()
            .filter(|one| matches!(one, Waiting::Connection(..)))
            .count();
        (connections, waiting.len().saturating_sub(connections))
    }

    fn offer(&self, key: &Key, stream: Stream) -> Option<u64> {
        let mut waiting = self.lock();
        match waiting.remove(key) {
            Some(Waiting::Process(sender)) => {
                // A pump that has gone meanwhile drops the connection, which is what is due.
                let _ = sender.send(stream);
                None
            }
            // A second connection for one stream is refused; the first stays.
            Some(first @ Waiting::Connection(..)) => {
                waiting.insert(key.clone(), first);
                None
            }
            None if waiting
                .values()
                .filter(|one| matches!(one, Waiting::Connection(..)))
                .count()
                < MAX_UNCLAIMED =>
            {
                let ticket = stream.ticket();
                waiting.insert(key.clone(), Waiting::Connection(stream, ticket));
                Some(ticket)
            }
            None => None,
        }
    }

    fn expire(&self, key: &Key, expired: u64) {
        let mut waiting = self.lock();
        if matches!(waiting.get(key), Some(Waiting::Connection(_, ticket)) if *ticket == expired) {
            waiting.remove(key);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads no byte past the header: what follows is the stream's.
async fn read_header(stream: &mut Stream) -> Option<StreamHeader> {
    let mut bytes = Vec::with_capacity(MAX_HEADER_LEN);
    loop {
        match StreamHeader::decode(&bytes) {
            Ok((header, _)) => return Some(header),
            Err(HeaderError::Incomplete) if bytes.len() < MAX_HEADER_LEN => {
                bytes.push(stream.read_u8().await.ok()?);
            }
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    fn header(exec: &str) -> StreamHeader {
        StreamHeader {
            process: ProcessKey {
                container: "c".parse().unwrap(),
                exec: Some(exec.parse().unwrap()),
                generation: ids::Generation(1),
            },
            kind: StreamKind::Stdout,
        }
    }

    fn connection(header: &StreamHeader) -> (UnixStream, Stream) {
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(&header.encode()).unwrap();
        host.write_all(b"data").unwrap();
        (host, Stream::new(guest.into()).unwrap())
    }

    async fn data(receiver: oneshot::Receiver<Stream>) -> Vec<u8> {
        let mut stream = receiver.await.unwrap();
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).await.unwrap();
        bytes.to_vec()
    }

    #[tokio::test]
    async fn connection_and_process_meet_in_either_order() {
        let connections = Arc::new(Connections::default());
        let early = connections.claim(&header("early").process, StreamKind::Stdout);
        let (_host, stream) = connection(&header("early"));
        connections.accept(stream).await;
        assert_eq!(data(early).await, b"data");

        let (_host, stream) = connection(&header("late"));
        let accepting = tokio::spawn({
            let connections = connections.clone();
            async move { connections.accept(stream).await }
        });
        while connections.state().0 == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(
            data(connections.claim(&header("late").process, StreamKind::Stdout)).await,
            b"data"
        );
        accepting.abort();
        assert_eq!(connections.state(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn unclaimed_connection_is_closed_after_its_time() {
        let connections = Arc::new(Connections::default());
        let (_host, stream) = connection(&header("a"));
        let ticket = connections.offer(&(header("a").process, StreamKind::Stdout), stream);
        assert_eq!(connections.state(), (1, 0));
        connections.expire(&(header("a").process, StreamKind::Stdout), ticket.unwrap());
        assert_eq!(connections.state(), (0, 0));
    }

    #[tokio::test]
    async fn one_connection_past_the_cap_is_closed() {
        let connections = Arc::new(Connections::default());
        let mut hosts = Vec::new();
        for number in 0..=MAX_UNCLAIMED {
            let header = header(&format!("e{number}"));
            let (host, stream) = connection(&header);
            let kept = connections
                .offer(&(header.process, header.kind), stream)
                .is_some();
            assert_eq!(kept, number < MAX_UNCLAIMED);
            hosts.push(host);
        }
    }

    #[tokio::test]
    async fn connection_that_says_nonsense_is_closed() {
        let connections = Arc::new(Connections::default());
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        connections.accept(Stream::new(guest.into()).unwrap()).await;
        assert_eq!(connections.state(), (0, 0));
    }
}
