// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

use std::net::{IpAddr, TcpStream, UdpSocket};

use network_testbed::{Namespace, is_root};

use super::*;

const LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

fn pod() -> Namespace {
    let pod = Namespace::new();
    pod.ip("link set lo up");
    pod.ip("link add eth0 type veth peer name eth0p");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.1.2.3/24 dev eth0");
    pod.ip("-6 addr add fd00:1::3/64 dev eth0 nodad");
    pod
}

fn dial(pod: &Namespace, address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().unwrap();
    pod.inside(move || TcpStream::connect_timeout(&address, LIMIT))
}

fn accept(loopback: &LoopbackListener) -> (IpAddr, u16) {
    loopback.listener.set_nonblocking(false).unwrap();
    let (connection, _) = loopback.listener.accept().unwrap();
    let local = connection.local_addr().unwrap();
    (local.ip().to_canonical(), local.port())
}

#[test]
fn every_port_of_loopback_is_the_listeners_in_both_families() {
    if !is_root() {
        return;
    }
    let pod = pod();
    let loopback = LoopbackListener::open(&pod.path()).unwrap();
    for address in [
        "127.0.0.1:80",
        "127.0.0.1:1",
        "127.0.0.1:65535",
        "127.5.6.7:8080",
        "[::1]:443",
    ] {
        let client = dial(&pod, address).unwrap();
        let dialled: SocketAddr = address.parse().unwrap();
        assert_eq!(accept(&loopback), (dialled.ip(), dialled.port()));
        drop(client);
    }
}

#[test]
fn what_is_not_loopback_is_left_to_the_kernel() {
    if !is_root() {
        return;
    }
    let pod = pod();
    let loopback = LoopbackListener::open(&pod.path()).unwrap();
    for address in ["10.1.2.3:80", "[fd00:1::3]:80"] {
        let refused = dial(&pod, address).unwrap_err();
        assert_eq!(
            refused.kind(),
            io::ErrorKind::ConnectionRefused,
            "{address}"
        );
    }
    // UDP has no part in it.
    pod.inside(|| {
        let receiver = UdpSocket::bind("127.0.0.1:53").unwrap();
        receiver.set_read_timeout(Some(LIMIT)).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"x", "127.0.0.1:53").unwrap();
        assert_eq!(receiver.recv(&mut [0; 2]).unwrap(), 1);
    });
    assert_eq!(
        loopback.listener.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn nothing_is_left_when_it_is_dropped() {
    if !is_root() {
        return;
    }
    let pod = pod();
    drop(LoopbackListener::open(&pod.path()).unwrap());
    let refused = |address| {
        let error = dial(&pod, address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    };
    refused("127.0.0.1:80");
    // A guard without its listener, as when the VM has just ended.
    let LoopbackListener { listener, guard } = LoopbackListener::open(&pod.path()).unwrap();
    drop(listener);
    refused("127.0.0.1:80");
    refused("[::1]:80");
    drop(guard);
    refused("127.0.0.1:80");
    // And it can be had again, twice.
    let first = LoopbackListener::open(&pod.path()).unwrap();
    drop(first);
    let again = LoopbackListener::open(&pod.path()).unwrap();
    let _client = dial(&pod, "127.0.0.1:80").unwrap();
    assert_eq!(accept(&again).1, 80);
}

#[test]
fn pod_without_ipv6_has_its_ports_of_ipv4() {
    if !is_root() {
        return;
    }
    let pod = pod();
    pod.write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let loopback = LoopbackListener::open(&pod.path()).unwrap();
    let _client = dial(&pod, "127.0.0.1:80").unwrap();
    assert_eq!(accept(&loopback).1, 80);
}

#[test]
fn namespace_of_the_node_is_refused() {
    let own = Path::new("/proc/thread-self/ns/net");
    let error = LoopbackListener::open(own).unwrap_err();
    assert!(matches!(error, NetError::NodeNamespace(_)), "{error}");
}

#[test]
fn program_passes_the_verifier_at_its_whole_length() {
    if !is_root() {
        return;
    }
    let table = bpf::SocketTable::new().unwrap();
    let program = bpf::loopback_to_listener(&table);
    // It refuses jumps to nowhere and instructions that are never reached.
    bpf::load(&program).unwrap();
    assert_eq!(program.len(), 33);
}
