// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Forwarded ports from a client in the pod's namespace on the host to a server in the guest's: the real program in the
//! kernel, both real ends; only the vsock device between them is a socket pair. Needs root; without it the tests say so and
//! pass.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use agent_client::StreamConnector;
use agent_core::stdio::Stream;
use async_trait::async_trait;
use ids::VsockPort;
use network_testbed::{Namespace, is_root};
use pod_network::{LoopbackGuard, LoopbackListener};
use port_forward::MAX_CONNECTIONS;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(120);

type Channels = mpsc::UnboundedSender<std::os::unix::net::UnixStream>;

/// Connections to the guest's agent.
struct ToGuest(Channels);

#[async_trait]
impl StreamConnector for ToGuest {
    async fn connect(&self, port: VsockPort) -> io::Result<UnixStream> {
        assert_eq!(port, agent_proto::FORWARD_PORT);
        let (host, guest) = std::os::unix::net::UnixStream::pair()?;
        let gone = |_| io::Error::from(ErrorKind::BrokenPipe);
        self.0.send(guest).map_err(gone)?;
        host.set_nonblocking(true)?;
        UnixStream::from_std(host)
    }
}

/// A pod: its namespace on the host, and its guest.
struct Pod {
    host: Namespace,
    guest: Arc<Namespace>,
    ports: Arc<agent_client::ForwardedPorts>,
    shim: Option<Runtime>,
    _redirection: LoopbackGuard,
}

impl Pod {
    fn new() -> Self {
        let (host, guest) = (Namespace::new(), Arc::new(Namespace::new()));
        for namespace in [&host, guest.as_ref()] {
            namespace.ip("link set lo up");
        }
        let (channels, mut connected) = mpsc::unbounded_channel::<std::os::unix::net::UnixStream>();
        let inside = Arc::clone(&guest);
        // The agent; it ends with the shim, which has the other end.
        std::thread::spawn(move || {
            inside.inside(move || {
                let agent = Builder::new_current_thread().enable_all().build().unwrap();
                agent.block_on(async move {
                    let ports = Arc::<agent_core::ForwardedPorts>::default();
                    while let Some(channel) = connected.recv().await {
                        let ports = Arc::clone(&ports);
                        let channel = Stream::new(channel.into()).unwrap();
                        tokio::spawn(async move { ports.serve(channel).await });
                    }
                });
            });
        });
        let LoopbackListener { listener, guard } = LoopbackListener::open(&host.path()).unwrap();
        let ports = Arc::<agent_client::ForwardedPorts>::default();
        let shim = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        shim.spawn(Arc::clone(&ports).serve(listener, Arc::new(ToGuest(channels))));
        Self {
            host,
            guest,
            ports,
            shim: Some(shim),
            _redirection: guard,
        }
    }

    /// A connection as containerd makes it.
    fn dial(&self, address: &str) -> io::Result<TcpStream> {
        let address: SocketAddr = address.parse().unwrap();
        self.host.inside(move || {
            let client = TcpStream::connect_timeout(&address, LIMIT)?;
            client.set_read_timeout(Some(LIMIT))?;
            client.set_write_timeout(Some(LIMIT))?;
            Ok(client)
        })
    }

    /// A connection there is reset, by its first read at the latest.
    fn is_reset(&self, address: &str) {
        let read = self
            .dial(address)
            .and_then(|mut client| client.read(&mut [0; 1]));
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    /// A server in the guest, which does `each` with every connection, on a thread for each.
    fn serve(&self, address: &'static str, each: fn(TcpStream)) {
        let listener = self
            .guest
            .inside(move || TcpListener::bind(address).unwrap());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                std::thread::spawn(move || each(connection.unwrap()));
            }
        });
    }

    fn dump(&self, what: &str) -> u64 {
        self.ports.dump()[what].as_u64().unwrap()
    }

    /// Waits until a counter says `value`.
    fn await_count(&self, what: &str, value: u64) {
        let since = std::time::Instant::now();
        while self.dump(what) != value {
            assert!(since.elapsed() < LIMIT, "{}", self.ports.dump());
            std::thread::yield_now();
        }
    }
}

fn echo(connection: TcpStream) {
    let (mut from, mut to) = (&connection, &connection);
    // A client that resets is no fault here.
    let _ = io::copy(&mut from, &mut to);
    let _ = connection.shutdown(Shutdown::Write);
}

fn asks(client: &mut TcpStream, text: &[u8]) {
    client.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len / 8).flatten().collect()
}

#[test]
fn servers_of_both_families_are_reached_from_both() {
    if !is_root() {
        return;
    }
    let pod = Pod::new();
    pod.serve("127.0.0.1:80", echo);
    pod.serve("[::1]:81", echo);
    pod.serve("0.0.0.0:82", echo);
    for address in [
        "127.0.0.1:80",
        "127.0.0.1:81",
        "127.0.0.1:82",
        "[::1]:80",
        "[::1]:81",
    ] {
        asks(&mut pod.dial(address).unwrap(), address.as_bytes());
    }
    pod.await_count("served", 5);
    assert_eq!(pod.dump("open"), 0);
}

#[test]
fn port_without_a_server_resets_its_client() {
    if !is_root() {
        return;
    }
    let pod = Pod::new();
    pod.is_reset("127.0.0.1:9");
    pod.await_count("broken_off", 1);
}

#[test]
fn hundred_connections_at_once_have_each_its_own_bytes() {
    if !is_root() {
        return;
    }
    let pod = Pod::new();
    pod.serve("127.0.0.1:80", echo);
    let mut clients: Vec<_> = (0..100)
        .map(|_| pod.dial("127.0.0.1:80").unwrap())
        .collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(format!("{number:08}").as_bytes()).unwrap();
    }
    pod.await_count("open", 100);
    for (number, client) in clients.iter_mut().enumerate() {
        let mut answer = [0; 8];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, format!("{number:08}").as_bytes());
    }
    drop(clients);
    pod.await_count("open", 0);
}

#[test]
fn connection_past_the_cap_is_reset_and_the_others_live() {
    if !is_root() {
        return;
    }
    let pod = Pod::new();
    pod.serve("127.0.0.1:80", echo);
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| pod.dial("127.0.0.1:80").unwrap())
        .collect();
    pod.await_count("open", u64::try_from(MAX_CONNECTIONS).unwrap());
    pod.is_reset("127.0.0.1:80");
    pod.await_count("refused", 1);
    for client in &mut clients {
        asks(client, b"alive");
    }
    clients.pop();
    pod.await_count("served", 1);
    asks(&mut pod.dial("127.0.0.1:80").unwrap(), b"again");
}

#[test]
fn bulk_is_the_same_both_ways_and_each_way_ends_by_itself() {
    const LEN: usize = 16 << 20;
    if !is_root() {
        return;
    }
    let pod = Pod::new();
    // Sends all of its own before it answers with the sum of what it got.
    pod.serve("127.0.0.1:80", |connection| {
        let mut writer = connection.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            writer.write_all(&pattern(LEN, 7)).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        (&connection).read_to_end(&mut got).unwrap();
        assert!(got == pattern(LEN, 9));
        sending.join().unwrap();
    });
    let client = pod.dial("127.0.0.1:80").unwrap();
    let mut writer = client.try_clone().unwrap();
    let sending: JoinHandle<()> = std::thread::spawn(move || {
        writer.write_all(&pattern(LEN, 9)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    (&client).read_to_end(&mut got).unwrap();
    assert!(got == pattern(LEN, 7));
    sending.join().unwrap();
    pod.await_count("bytes", u64::try_from(2 * LEN).unwrap());
    assert_eq!(pod.dump("served"), 1);
}

#[test]
fn end_of_the_pod_resets_what_is_open_and_refuses_what_comes() {
    if !is_root() {
        return;
    }
    let mut pod = Pod::new();
    pod.serve("127.0.0.1:80", echo);
    let mut client = pod.dial("127.0.0.1:80").unwrap();
    asks(&mut client, b"alive");
    pod.shim.take().unwrap().shutdown_timeout(LIMIT);
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = pod.dial("127.0.0.1:80").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}
