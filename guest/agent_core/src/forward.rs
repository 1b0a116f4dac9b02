// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! TCP connections that the host makes to the pod's loopback.
//!
//! The agent is in the pod's network namespace, so it reaches what the pod's processes listen on: 127.0.0.1 first, then ::1.
//! A connection that cannot be made is closed, which resets the one on the host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use port_forward::MAX_CONNECTIONS;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::stdio::{HEADER_LIMIT, Stream};

/// How long a process may take to let its listener take a connection: the kernel asks four times in that time.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// The connections of a pod's forwarded ports.
#[derive(Debug)]
pub struct ForwardedPorts {
    places: Semaphore,
}

impl Default for ForwardedPorts {
    fn default() -> Self {
        Self {
            places: Semaphore::new(MAX_CONNECTIONS),
        }
    }
}

impl ForwardedPorts {
    /// Carries one connection from its header to its end. Whatever is wrong with it, it is closed.
    pub async fn serve(&self, mut channel: Stream) {
        let Ok(_place) = self.places.try_acquire() else {
            return;
        };
        let header = timeout(HEADER_LIMIT, port_forward::read_header(&mut channel));
        let Ok(Ok(port)) = header.await else {
            return;
        };
        if let Ok(Ok(tcp)) = timeout(DIAL_LIMIT, dial(port)).await {
            // What breaks it off is the peers' affair, who hear of it.
            let _ = port_forward::relay(tcp, channel).await;
        }
    }

    /// How many connections there are.
    pub fn open(&self) -> usize {
        MAX_CONNECTIONS.saturating_sub(self.places.available_permits())
    }
}

async fn dial(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((IpAddr::from(Ipv4Addr::LOCALHOST), port)).await {
        Ok(tcp) => Ok(tcp),
        Err(_) => TcpStream::connect((IpAddr::from(Ipv6Addr::LOCALHOST), port)).await,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as StdUnixStream;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// The host's end of a connection that the agent serves.
    fn channel(ports: &std::sync::Arc<ForwardedPorts>) -> UnixStream {
        let (host, guest) = StdUnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let guest = Stream::new(guest.into()).unwrap();
        let ports = ports.clone();
        tokio::spawn(async move { ports.serve(guest).await });
        UnixStream::from_std(host).unwrap()
    }

    /// What the host gets before the connection ends.
    async fn rest(host: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        timeout(LIMIT, host.read_to_end(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        bytes
    }

    async fn greets(address: &str) {
        let listener = TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut server, _) = listener.accept().await.unwrap();
            server.write_all(b"hello").await.unwrap();
        });
        let mut host = channel(&std::sync::Arc::default());
        port_forward::write_header(&mut host, port).await.unwrap();
        // The client has nothing to say.
        host.write_all(&[0, 0]).await.unwrap();
        assert_eq!(rest(&mut host).await, b"\x05\0hello\0\0");
    }

    #[tokio::test]
    async fn listener_of_either_family_is_reached() {
        greets("127.0.0.1:0").await;
        greets("[::1]:0").await;
        greets("0.0.0.0:0").await;
    }

    #[tokio::test]
    async fn port_without_a_listener_is_closed_without_a_word() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = taken.local_addr().unwrap().port();
        drop(taken);
        let mut host = channel(&std::sync::Arc::default());
        port_forward::write_header(&mut host, port).await.unwrap();
        assert_eq!(rest(&mut host).await, b"");
    }

    #[tokio::test]
    async fn nonsense_for_a_header_is_closed() {
        let mut host = channel(&std::sync::Arc::default());
        host.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        // Bytes that were not read make it a reset.
        let _ = timeout(LIMIT, host.read(&mut [0; 1])).await.unwrap();
    }

    #[tokio::test]
    async fn one_connection_past_the_cap_is_closed() {
        let ports = std::sync::Arc::<ForwardedPorts>::default();
        let mut hosts: Vec<_> = (0..MAX_CONNECTIONS).map(|_| channel(&ports)).collect();
        while ports.open() < MAX_CONNECTIONS {
            tokio::task::yield_now().await;
        }
        let mut past = channel(&ports);
        assert_eq!(rest(&mut past).await, b"");
        hosts.clear();
        while ports.open() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
