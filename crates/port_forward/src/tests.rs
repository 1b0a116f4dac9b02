// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::io::{DuplexStream, duplex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work).await.unwrap()
}

/// Two ends of a TCP connection.
async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), accepted.unwrap().0)
}

/// A client and a server whose connection goes over a channel, and both relays.
async fn forwarded() -> (TcpStream, TcpStream, [JoinHandle<io::Result<Moved>>; 2]) {
    let (client, host) = tcp().await;
    let (guest, server) = tcp().await;
    let (host_end, guest_end) = duplex(4096);
    let relays = [
        tokio::spawn(relay(host, host_end)),
        tokio::spawn(relay(guest, guest_end)),
    ];
    (client, server, relays)
}

/// A relay with its TCP peer and the other end of its channel.
async fn half() -> (TcpStream, DuplexStream, JoinHandle<io::Result<Moved>>) {
    let (client, host) = tcp().await;
    let (host_end, channel) = duplex(64 << 10);
    (client, channel, tokio::spawn(relay(host, host_end)))
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at.wrapping_mul(31).wrapping_add(seed)) % 251).unwrap())
        .collect()
}

#[tokio::test]
async fn bytes_are_the_same_both_ways_at_once_and_each_way_ends_by_itself() {
    let (client, server, relays) = within(forwarded()).await;
    let both = [(client, 1, 2), (server, 2, 1)].map(|(end, sends, expects)| {
        tokio::spawn(async move {
            let (mut read, mut write) = end.into_split();
            let sending = tokio::spawn(async move {
                write.write_all(&pattern(5 << 20, sends)).await.unwrap();
                write.shutdown().await.unwrap();
                write
            });
            let mut received = Vec::new();
            read.read_to_end(&mut received).await.unwrap();
            assert!(received == pattern(5 << 20, expects));
            drop(sending.await.unwrap());
        })
    });
    for end in both {
        within(end).await.unwrap();
    }
    for relay in relays {
        let moved = within(relay).await.unwrap().unwrap();
        assert_eq!((moved.from_tcp, moved.to_tcp), (5 << 20, 5 << 20));
    }
}

#[tokio::test]
async fn answer_comes_after_the_question_has_ended() {
    let (mut client, mut server, _relays) = within(forwarded()).await;
    within(async {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
    })
    .await;
}

#[tokio::test]
async fn reset_of_one_end_reaches_the_other() {
    let (client, mut server, relays) = within(forwarded()).await;
    reset(client);
    let error = within(server.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    for relay in relays {
        within(relay).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn channel_that_breaks_off_is_a_reset_and_no_end() {
    let (mut client, mut channel, relay) = within(half()).await;
    channel.write_all(&[3, 0]).await.unwrap();
    channel.write_all(b"all").await.unwrap();
    let mut all = [0; 3];
    within(client.read_exact(&mut all)).await.unwrap();
    assert_eq!(&all, b"all");
    drop(channel);
    let error = within(client.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    within(relay).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn longest_frame_is_taken_and_one_past_it_is_not() {
    let longest = u16::try_from(MAX_FRAME_LEN).unwrap();
    let (mut client, mut channel, relay) = within(half()).await;
    channel.write_all(&longest.to_le_bytes()).await.unwrap();
    channel.write_all(&pattern(MAX_FRAME_LEN, 3)).await.unwrap();
    let mut data = vec![0; MAX_FRAME_LEN];
    within(client.read_exact(&mut data)).await.unwrap();
    assert!(data == pattern(MAX_FRAME_LEN, 3));
    let past = longest.checked_add(1).unwrap();
    channel.write_all(&past.to_le_bytes()).await.unwrap();
    let error = within(relay).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    within(client.read(&mut [0; 1])).await.unwrap_err();
}

#[tokio::test]
async fn dropped_relay_resets_its_client() {
    let (mut client, _channel, relay) = within(half()).await;
    relay.abort();
    let error = within(client.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn reader_that_stops_holds_the_writer_up() {
    let (mut client, channel, relay) = within(half()).await;
    let block = vec![0; 1 << 20];
    // Nobody reads the channel: the kernel's buffers and one frame are all that is taken.
    let endless = async {
        loop {
            client.write_all(&block).await.unwrap();
        }
    };
    assert!(timeout(Duration::from_millis(300), endless).await.is_err());
    drop(channel);
    within(relay).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn header_is_read_as_it_was_written_and_nothing_else_is() {
    let (mut host, mut guest) = duplex(64);
    write_header(&mut host, 65535).await.unwrap();
    host.write_all(b"data").await.unwrap();
    assert_eq!(within(read_header(&mut guest)).await.unwrap(), 65535);
    let mut data = [0; 4];
    guest.read_exact(&mut data).await.unwrap();
    assert_eq!(&data, b"data");
    host.write_all(b"GET / HTTP").await.unwrap();
    let error = within(read_header(&mut guest)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    drop(host);
    within(read_header(&mut guest)).await.unwrap_err();
}
