// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods' networks on the kernel that runs the tests, in network namespaces of their own: a pod's, as a CNI plugin leaves
//! it, and its neighbour's at the other end of the veth pairs. Needs root; without it the tests say so and pass.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod frames;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use network_testbed::{Namespace, is_root};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_network::{Address, Metadata, Neighbour, NetError, PodNetwork, Route, Rule, sweep};

use frames::{ACK, Packet, SYN, Segment, arp_request, checksum_left_to_the_host, tcp, whole};

const POD_MAC: &str = "02:00:00:00:00:07";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const NEIGHBOUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const POD: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 3);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 1);
/// Bytes of a tap's `virtio_net_hdr` unless it is told otherwise.
const HEADER: usize = 10;
/// How long a frame may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// A pod's namespace with an `eth0`, and its neighbour's.
fn pair() -> (Namespace, Namespace) {
    let (pod, neighbour) = (Namespace::new(), Namespace::new());
    pod.ip(&format!(
        "link add eth0 address {POD_MAC} mtu 1400 type veth peer name veth0 address 02:00:00:00:00:01"
    ));
    pod.give("veth0", &neighbour);
    neighbour.ip("link set veth0 mtu 1400 up");
    neighbour.ip("addr add 10.1.2.1/24 dev veth0");
    neighbour.ip("-6 addr add fd00:1::1/64 dev veth0 nodad");
    pod.ip("link set lo up");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.1.2.3/24 dev eth0");
    pod.ip("-6 addr add fd00:1::3/64 dev eth0 nodad");
    pod.ip("route add default via 10.1.2.1");
    (pod, neighbour)
}

/// What of ours is in a namespace.
fn ours(pod: &Namespace) -> String {
    let links = pod.ip("-o link show");
    let taps = links.lines().filter(|line| line.contains("coffer"));
    let qdiscs = pod.run("tc", "qdisc show");
    let ingress = qdiscs.lines().filter(|line| line.contains("ingress"));
    taps.chain(ingress)
        .map(|line| format!("{line}\n"))
        .collect()
}

fn attach(pod: &Namespace) -> (PodNetwork, pod_network::NetworkPlan) {
    PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap()
}

/// Waits until something can be read from `from`.
fn await_input(from: &impl AsFd) {
    let limit = PollTimeout::try_from(DEADLINE).unwrap();
    let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, limit).unwrap(), 1, "nothing in time");
}

/// The guest's end of a tap.
struct Guest(File);

impl Guest {
    fn new(tap: OwnedFd) -> Self {
        Self(File::from(tap))
    }

    /// Sends a frame with its `virtio_net_hdr`.
    fn send(&mut self, bytes: &[u8]) {
        let written = self.0.write(bytes).unwrap();
        assert_eq!(written, bytes.len());
    }

    /// The next frame that `wanted` wants, with its header.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            await_input(&self.0);
            let mut bytes = vec![0; 1 << 17];
            let len = self.0.read(&mut bytes).unwrap();
            bytes.truncate(len);
            if wanted(&bytes[HEADER..]) {
                return bytes;
            }
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Address {
    let (address, prefix) = text.split_once('/').unwrap();
    Address {
        ip: ip(address),
        prefix: prefix.parse().unwrap(),
    }
}

#[test]
fn everything_that_the_cni_has_left_is_read() {
    if !is_root() {
        return;
    }
    let (pod, neighbour) = pair();
    pod.ip("link add net1 address 02:00:00:00:01:07 mtu 9000 type veth peer name veth1");
    pod.give("veth1", &neighbour);
    neighbour.ip("link set veth1 up");
    pod.ip("link set net1 up");
    pod.ip("addr add 172.16.0.5/32 dev net1");
    pod.ip("neigh add 10.1.2.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    pod.ip("route add 10.9.0.0/16 via 10.1.2.2 src 10.1.2.3 metric 7 mtu 1300 advmss 1200");
    pod.ip("route add 192.168.0.0/16 via 169.254.1.1 dev net1 onlink table 100");
    pod.ip("rule add from 172.16.0.5 lookup 100 priority 500");
    let (_network, plan) = attach(&pod);

    let [eth0, net1] = plan.taps.as_slice() else {
        panic!("{plan:?}")
    };
    let (eth0, net1) = (&eth0.interface, &net1.interface);
    assert_eq!(
        (eth0.name.as_str(), eth0.mac, eth0.mtu),
        ("eth0", MAC, 1400)
    );
    assert_eq!((net1.name.as_str(), net1.mtu), ("net1", 9000));
    for address in ["10.1.2.3/24", "fd00:1::3/64", "fe80::ff:fe00:7/64"] {
        assert!(eth0.addresses.contains(&prefix(address)), "{eth0:?}");
    }
    assert_eq!(eth0.addresses.len(), 3);
    assert!(
        net1.addresses.contains(&prefix("172.16.0.5/32")),
        "{net1:?}"
    );
    let mac = [2, 0, 0, 0, 0, 9];
    assert_eq!(
        eth0.neighbours,
        [Neighbour {
            ip: ip("10.1.2.9"),
            mac
        }]
    );
    let plain = Route {
        destination: prefix("0.0.0.0/0"),
        gateway: Some(ip("10.1.2.1")),
        source: None,
        metric: 0,
        scope: 0,
        onlink: false,
        table: 254,
        mtu: 0,
        advmss: 0,
    };
    for route in [
        plain.clone(),
        Route {
            destination: prefix("10.1.2.0/24"),
            gateway: None,
            source: Some(ip("10.1.2.3")),
            scope: 253,
            ..plain.clone()
        },
        Route {
            destination: prefix("10.9.0.0/16"),
            gateway: Some(ip("10.1.2.2")),
            source: Some(ip("10.1.2.3")),
            metric: 7,
            mtu: 1300,
            advmss: 1200,
            ..plain.clone()
        },
        Route {
            destination: prefix("fd00:1::/64"),
            gateway: None,
            metric: 256,
            ..plain.clone()
        },
    ] {
        assert!(eth0.routes.contains(&route), "{route:?} in {eth0:#?}");
    }
    assert!(
        net1.routes.contains(&Route {
            destination: prefix("192.168.0.0/16"),
            gateway: Some(ip("169.254.1.1")),
            onlink: true,
            table: 100,
            ..plain
        }),
        "{net1:#?}"
    );
    let rule = Rule {
        priority: 500,
        table: 100,
        source: prefix("172.16.0.5/32"),
        destination: prefix("0.0.0.0/0"),
    };
    assert_eq!(plan.rules, [rule]);
}

#[test]
fn what_cannot_be_carried_over_is_refused_by_name_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    for (command, expected) in [
        ("route add blackhole 10.7.0.0/16", "not unicast"),
        ("rule add fwmark 5 lookup 100", "a routing rule by more"),
        ("route add 10.7.0.0/16 dev lo", "through loopback"),
        (
            "route add 10.7.0.0/16 nexthop via 10.1.2.1 nexthop via 10.1.2.2",
            "over several paths",
        ),
    ] {
        let (pod, _neighbour) = pair();
        pod.ip(command);
        let error = PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap_err();
        assert!(matches!(error, NetError::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(ours(&pod), "");
    }
}

#[test]
fn namespace_without_interfaces_gives_no_tap() {
    if !is_root() {
        return;
    }
    let pod = Namespace::new();
    pod.ip("link set lo up");
    let (network, plan) = attach(&pod);
    assert!(plan.taps.is_empty() && plan.rules.is_empty(), "{plan:?}");
    drop(network);
    assert_eq!(ours(&pod), "");
}

#[test]
fn own_namespace_and_no_namespace_are_refused() {
    if !is_root() {
        return;
    }
    let refused = |path: &str| PodNetwork::attach(Path::new(path), Metadata::Denied).unwrap_err();
    assert!(matches!(
        refused("/proc/self/ns/net"),
        NetError::NodeNamespace(_)
    ));
    assert!(matches!(refused("/nowhere"), NetError::Namespace { .. }));
    // There is nothing of ours in any of these.
    for path in ["/nowhere", "/proc/self/ns/net", "/etc/passwd"] {
        sweep(Path::new(path)).unwrap();
    }
}

#[test]
fn nothing_is_left_after_the_end_however_it_comes() {
    if !is_root() {
        return;
    }
    let (pod, _neighbour) = pair();
    // In order: the tap's descriptor goes first, or the network does.
    for tap_first in [true, false] {
        let (network, plan) = attach(&pod);
        assert_eq!(ours(&pod).lines().count(), 3, "{}", ours(&pod));
        let tap = format!("coffer{}", plan.taps[0].interface.index);
        let addresses = pod.ip(&format!("-o addr show dev {tap}"));
        assert_eq!(addresses, "", "a tap speaks for the guest alone");
        assert!(pod.ip(&format!("link show dev {tap}")).contains("mtu 1400"));
        if tap_first {
            drop(plan);
            drop(network);
        } else {
            drop(network);
            drop(plan);
        }
        assert_eq!(ours(&pod), "");
    }
    // A process that is killed drops nothing, but its descriptors are closed.
    let (network, plan) = attach(&pod);
    std::mem::forget(network);
    drop(plan);
    assert_eq!(ours(&pod).lines().count(), 1, "{}", ours(&pod));
    sweep(&pod.path()).unwrap();
    sweep(&pod.path()).unwrap();
    assert_eq!(ours(&pod), "");
    // And without anybody to sweep, the next one is not in the way of what is left.
    let (network, plan) = attach(&pod);
    std::mem::forget(network);
    drop(plan);
    let (network, plan) = attach(&pod);
    drop((plan, network));
    assert_eq!(ours(&pod), "");
}

#[test]
fn namespace_of_another_pod_is_refused_and_left_alone() {
    if !is_root() {
        return;
    }
    let (pod, _neighbour) = pair();
    let (_network, _plan) = attach(&pod);
    let before = ours(&pod);
    let error = PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap_err();
    assert!(error.to_string().contains("another pod's VM"), "{error}");
    sweep(&pod.path()).unwrap();
    assert_eq!(ours(&pod), before);
}

#[test]
fn datagrams_pass_both_ways_with_the_checksum_left_to_the_host() {
    if !is_root() {
        return;
    }
    let (pod, neighbour) = pair();
    let server = neighbour.inside(|| UdpSocket::bind("10.1.2.1:7000").unwrap());
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let (_network, plan) = attach(&pod);
    let mut guest = Guest::new(plan.taps.into_iter().next().unwrap().tap);

    guest.send(&whole(&arp_request(MAC, POD, NEIGHBOUR)));
    let reply = guest.receive(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
    assert_eq!(reply[HEADER + 22..HEADER + 28], NEIGHBOUR_MAC);

    let packet = Packet {
        macs: (MAC, NEIGHBOUR_MAC),
        from: (POD, 5000),
        to: (NEIGHBOUR, 7000),
    };
    guest.send(&checksum_left_to_the_host(&packet, b"ping"));
    let mut bytes = [0; 64];
    let (len, from) = server.recv_from(&mut bytes).unwrap();
    assert_eq!(
        (&bytes[..len], from.to_string().as_str()),
        (&b"ping"[..], "10.1.2.3:5000")
    );

    server.send_to(b"pong", from).unwrap();
    let answer = guest.receive(|frame| frame.ends_with(b"pong"));
    assert_eq!(answer[HEADER..HEADER + 6], MAC);
    // What arrives does not go to the namespace's own stack as well, which would answer "port unreachable".
    server.send_to(b"again", from).unwrap();
    guest.receive(|frame| frame.ends_with(b"again"));
    assert_eq!(server.take_error().unwrap().map(|error| error.kind()), None);
}

#[test]
fn large_segment_of_a_guest_is_cut_by_the_host_and_arrives_whole() {
    const ISN: u32 = 1000;
    if !is_root() {
        return;
    }
    let (pod, neighbour) = pair();
    let listener = neighbour.inside(|| TcpListener::bind("10.1.2.1:7000").unwrap());
    let (_network, plan) = attach(&pod);
    let mut guest = Guest::new(plan.taps.into_iter().next().unwrap().tap);
    let packet = Packet {
        macs: (MAC, NEIGHBOUR_MAC),
        from: (POD, 5000),
        to: (NEIGHBOUR, 7000),
    };
    let mut segment = Segment {
        sequence: ISN,
        acknowledged: 0,
        flags: SYN,
    };
    guest.send(&tcp(&packet, segment, &[], 0));
    guest.receive(|frame| frame[12..14] == [8, 6]); // who has the pod's address?
    guest.send(&whole(&arp_request(MAC, POD, NEIGHBOUR))); // which tells where it is
    let is_accepted = |frame: &[u8]| frame[12..14] == [8, 0] && frame[14 + 20 + 13] == SYN | ACK;
    let accepted = guest.receive(is_accepted);
    let at = HEADER + 14 + 20 + 4;
    let theirs = u32::from_be_bytes(accepted[at..at + 4].try_into().unwrap());
    segment = Segment {
        sequence: ISN + 1,
        acknowledged: theirs.wrapping_add(1),
        flags: ACK,
    };
    let sent: Vec<u8> = (0..40_000u32).map(|i| i.to_le_bytes()[1] ^ 0x5a).collect();
    // Larger than any MTU on the way, 1400.
    guest.send(&tcp(&packet, segment, &sent, 1360));
    await_input(&listener);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received).unwrap();
    assert!(received == sent, "what arrives is what was sent");
}

#[test]
fn spoofed_frames_and_the_metadata_service_are_dropped() {
    if !is_root() {
        return;
    }
    let (pod, neighbour) = pair();
    neighbour.ip("addr add 169.254.169.254/32 dev veth0");
    let server = neighbour.inside(|| UdpSocket::bind("0.0.0.0:7000").unwrap());
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    // What the pod may not say must be dropped by us, not by the neighbour's kernel.
    neighbour.write("/proc/sys/net/ipv4/conf/all/rp_filter", "0");
    neighbour.write("/proc/sys/net/ipv4/conf/veth0/rp_filter", "0");
    let own = Packet {
        macs: (MAC, NEIGHBOUR_MAC),
        from: (POD, 5000),
        to: (NEIGHBOUR, 7000),
    };
    let foreign_mac = Packet {
        macs: ([2, 0, 0, 0, 0, 8], NEIGHBOUR_MAC),
        ..own
    };
    let foreign_ip = Packet {
        from: (Ipv4Addr::new(10, 1, 2, 4), 5000),
        ..own
    };
    let metadata = Packet {
        to: (Ipv4Addr::new(169, 254, 169, 254), 7000),
        ..own
    };
    for (allowed, expected) in [
        (Metadata::Denied, vec!["own"]),
        (Metadata::Allowed, vec!["metadata", "own"]),
    ] {
        let (_network, plan) = PodNetwork::attach(&pod.path(), allowed).unwrap();
        let mut guest = Guest::new(plan.taps.into_iter().next().unwrap().tap);
        guest.send(&checksum_left_to_the_host(&foreign_mac, b"foreign MAC"));
        guest.send(&checksum_left_to_the_host(&foreign_ip, b"foreign IP"));
        guest.send(&checksum_left_to_the_host(&metadata, b"metadata"));
        // Frames keep their order: what comes before this one came, or never will.
        guest.send(&checksum_left_to_the_host(&own, b"own"));
        let mut heard = Vec::new();
        while heard.last().is_none_or(|last| last != "own") {
            let mut bytes = [0; 64];
            let (len, _) = server.recv_from(&mut bytes).unwrap();
            heard.push(String::from_utf8_lossy(&bytes[..len]).into_owned());
        }
        assert_eq!(heard, expected);
    }
}
