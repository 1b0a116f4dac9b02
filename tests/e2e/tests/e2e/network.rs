// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods' networks: what the CNI plugin gives, TCP to the node and between pods, and what is out of reach.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use e2e::{BUSYBOX, Container, DEADLINE, Node, RUNTIME, eventually, named, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::{Kubelet, Pod};

/// The node's address on the CNI plugin's bridge.
const NODE: &str = "10.88.0.1";
const METADATA: &str = "169.254.169.254";
/// Where pods listen.
const PORT: u16 = 7000;
/// Bytes that go through a connection: thousands of frames, most of them larger than the MTU until they are cut.
const BYTES: usize = 8 << 20;

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// Bytes that no two frames have in common.
fn payload() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(BYTES / 8).flatten().collect()
}

/// A container of the pod that writes what it gets on [`PORT`] into a file, and ends. Its input stays open: at its end nc
/// would close its sending half, upon which another nc at the far end stops in the middle of what it has to send.
fn receiver(kubelet: &Kubelet, pod: &Pod, name: &str) -> String {
    let script = format!(
        "mkfifo /open; exec 3<>/open; nc -l -p {PORT} <&3 > /got; wc -c < /got; sha256sum < /got"
    );
    kubelet.run(pod, name, &sh(&script))
}

/// How many bytes the receiver `name` has got, and their digest.
fn received(kubelet: &Kubelet, container: &str, name: &str) -> (usize, String) {
    assert_eq!(kubelet.exit_code(container), 0);
    let got = eventually("the digest is in the log", || {
        let log = kubelet.log(name, 0, "stdout");
        let (len, rest) = log.split_once('\n')?;
        let digest = rest.split_whitespace().next()?;
        Some((len.trim().parse().ok()?, digest.to_owned()))
    });
    kubelet.remove(container);
    got
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let sum = Sha256::digest(bytes);
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn pod_has_what_its_cni_plugin_has_given() {
    let _node = Node::new("pod_has_what_its_cni_plugin_has_given");
    let mut kubelet = Kubelet::new("given");
    let pod = kubelet.run_pod("given");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    let pod_ip = kubelet.pod_ip(&pod);
    let inside = |command: &[&str]| kubelet.exec(&container, command).stdout;

    let addresses = inside(&["ip", "-o", "addr", "show", "dev", "eth0"]);
    assert!(
        addresses.contains(&format!("inet {pod_ip}/16")),
        "{addresses}"
    );
    let route = inside(&["ip", "route"]);
    assert!(
        route.contains(&format!("default via {NODE} dev eth0")),
        "{route}"
    );
    assert!(inside(&["ip", "-o", "addr", "show", "dev", "lo"]).contains("127.0.0.1/8"));

    let namespace = std::fs::read_dir("/run/netns").unwrap().next().unwrap();
    let namespace = namespace.unwrap().file_name().into_string().unwrap();
    for field in ["address", "mtu"] {
        let path = format!("/sys/class/net/eth0/{field}");
        let of_the_cni = run("ip", &["netns", "exec", &namespace, "cat", &path]).success();
        assert_eq!(inside(&["cat", &path]), of_the_cni.stdout, "{field}");
    }
}

#[test]
fn bytes_arrive_whole_between_pods_and_the_node() {
    let _node = Node::new("bytes_arrive_whole_between_pods_and_the_node");
    let mut kubelet = Kubelet::new("bytes");
    let pod = kubelet.run_pod("bytes");
    let pod_ip = kubelet.pod_ip(&pod);
    let payload = payload();

    // As a kubelet's probe: the node dials the pod.
    let container = receiver(&kubelet, &pod, "from-node");
    let mut to_pod = eventually("the pod listens", || {
        TcpStream::connect((pod_ip.as_str(), PORT)).ok()
    });
    to_pod.set_write_timeout(Some(DEADLINE)).unwrap();
    to_pod.write_all(&payload).unwrap();
    drop(to_pod);
    let got = received(&kubelet, &container, "from-node");
    assert_eq!(got, (BYTES, digest(&payload)));

    // The pod dials the node.
    let listener = TcpListener::bind((NODE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taker = thread::spawn(move || {
        let (mut from_pod, _) = listener.accept().unwrap();
        from_pod.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut bytes = Vec::new();
        from_pod.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let sender = kubelet.run(&pod, "sender", &["sleep", "infinity"]);
    let made = kubelet.exec(
        &sender,
        &sh(&format!(
            "head -c {BYTES} /dev/urandom > /file; sha256sum < /file"
        )),
    );
    let of_file = made.stdout.split_whitespace().next().unwrap().to_owned();
    let sent = kubelet.exec(&sender, &sh(&format!("nc {NODE} {port} < /file")));
    assert_eq!(sent.code, 0, "{sent:?}");
    let bytes = taker.join().unwrap();
    assert_eq!((bytes.len(), digest(&bytes)), (BYTES, of_file.clone()));

    // And another pod.
    let other = kubelet.run_pod("bytes-other");
    let other_ip = kubelet.pod_ip(&other);
    let container = receiver(&kubelet, &other, "from-pod");
    eventually("the other pod listens", || {
        let sent = kubelet.exec(&sender, &sh(&format!("nc {other_ip} {PORT} < /file")));
        (sent.code == 0).then_some(())
    });
    let got = received(&kubelet, &container, "from-pod");
    assert_eq!(got, (BYTES, of_file));
}

/// An address of the node, until it is dropped.
struct NodeAddress(&'static str);

impl NodeAddress {
    fn add(address: &'static str) -> Self {
        run("ip", &["addr", "add", address, "dev", "lo"]).success();
        Self(address)
    }
}

impl Drop for NodeAddress {
    fn drop(&mut self) {
        run("ip", &["addr", "del", self.0, "dev", "lo"]);
    }
}

#[test]
fn metadata_service_is_out_of_reach_unless_it_is_allowed() {
    let node = Node::new("metadata_service_is_out_of_reach_unless_it_is_allowed");
    let _address = NodeAddress::add("169.254.169.254/32");
    let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        // Until the test's process ends.
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"credentials"));
        }
    });
    for (name, config, expected) in [
        ("denied", None, ""),
        (
            "allowed",
            Some("[guest]\nready_timeout_s = 180\n[network]\nmetadata_service = \"allowed\"\n"),
            "credentials",
        ),
    ] {
        let _config = config.map(|text| node.change_config(text));
        let mut kubelet = Kubelet::new(name);
        let pod = kubelet.run_pod(name);
        let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
        let ask = |host: &str| {
            let script = format!("nc -w 5 {host} {port} < /dev/null");
            kubelet.exec(&container, &sh(&script)).stdout
        };
        assert_eq!(ask(NODE), "credentials", "{name}");
        assert_eq!(ask(METADATA), expected, "{name}");
    }
}

/// A network namespace as another network plugin might leave it: two interfaces, IPv6, an MTU of its own.
struct Namespace(&'static str);

impl Namespace {
    fn new(name: &'static str) -> Self {
        let namespace = Self(name);
        run("ip", &["netns", "add", name]).success();
        for (interface, outside, mtu) in [("eth0", "out0", "1400"), ("net1", "out1", "9000")] {
            let veth = [
                "link", "add", outside, "mtu", mtu, "type", "veth", "peer", "name", interface,
                "mtu", mtu, "netns", name,
            ];
            run("ip", &veth).success();
            run("ip", &["link", "set", outside, "up"]).success();
            run("ip", &["-n", name, "link", "set", interface, "up"]).success();
        }
        for (side, interface, address) in [
            (None, "out0", "fd00:1::1/64"),
            (None, "out1", "10.77.0.1/24"),
            (Some(name), "eth0", "fd00:1::2/64"),
            (Some(name), "net1", "10.77.0.2/24"),
        ] {
            let mut arguments = Vec::new();
            arguments.extend(side.iter().flat_map(|name| ["-n", name]));
            arguments.extend(["addr", "add", address, "dev", interface]);
            if address.contains("::") {
                arguments.push("nodad");
            }
            run("ip", &arguments).success();
        }
        namespace
    }

    fn option(&self) -> String {
        format!("network:/run/netns/{}", self.0)
    }

    /// Its interfaces and the filters on them.
    fn contents(&self) -> String {
        let links = run("ip", &["-n", self.0, "-brief", "link"]).stdout;
        let qdiscs = run("tc", &["-n", self.0, "qdisc", "show"]).stdout;
        let names: Vec<&str> = links
            .lines()
            .chain(qdiscs.lines().filter(|line| line.contains("ingress")))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        names.join(" ")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        run("ip", &["link", "del", "out0"]);
        run("ip", &["link", "del", "out1"]);
        run("ip", &["netns", "del", self.0]);
    }
}

#[test]
fn several_interfaces_ipv6_and_other_mtus_are_carried_over() {
    let _node = Node::new("several_interfaces_ipv6_and_other_mtus_are_carried_over");
    let namespace = Namespace::new("several");
    let before = namespace.contents();
    let option = namespace.option();
    let container = Container::start_image(
        "several",
        BUSYBOX,
        &["--with-ns", &option],
        &["sleep", "infinity"],
    );
    let mtu = |name: &str| {
        let path = format!("/sys/class/net/{name}/mtu");
        container
            .exec(&format!("mtu-{name}"), &["cat", &path])
            .stdout
    };
    assert_eq!((mtu("eth0").trim(), mtu("net1").trim()), ("1400", "9000"));
    let payload = payload();
    for (number, address) in ["fd00:1::2", "10.77.0.2"].into_iter().enumerate() {
        let script = format!("nc -l -p {PORT} | sha256sum");
        let exec = format!("receiver-{number}");
        let receiver = container.spawn_exec(&exec, &sh(&script));
        let mut stream = eventually("the container listens", || {
            TcpStream::connect((address, PORT)).ok()
        });
        stream.write_all(&payload).unwrap();
        drop(stream);
        let output = receiver.wait_with_output().unwrap();
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.starts_with(&digest(&payload)), "{address}: {output}");
    }
    drop(container);
    assert_eq!(namespace.contents(), before, "of ours nothing is left");
}

#[test]
fn killed_shim_leaves_nothing_in_the_pods_network() {
    let _node = Node::new("killed_shim_leaves_nothing_in_the_pods_network");
    let namespace = Namespace::new("killed");
    let before = namespace.contents();
    let option = namespace.option();
    let container = Container::start_image(
        "killed-net",
        BUSYBOX,
        &["--with-ns", &option],
        &["sleep", "infinity"],
    );
    assert_ne!(namespace.contents(), before);
    let shim = named("containerd-shim-coffer-v2")[0];
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    container.wait_stopped();
    drop(container);
    eventually("the namespace is as it was", || {
        (namespace.contents() == before).then_some(())
    });
}

#[test]
fn container_without_network_has_loopback_alone() {
    let _node = Node::new("container_without_network_has_loopback_alone");
    let links = Container::run("no-network", &["ls", "/sys/class/net"]).success();
    assert_eq!(links.stdout, "lo\n");
    // A namespace with nothing in it is the same.
    run("ip", &["netns", "add", "empty"]).success();
    let options = ["--with-ns", "network:/run/netns/empty"];
    let links = Container::run_image("empty", BUSYBOX, &options, &["ls", "/sys/class/net"]);
    run("ip", &["netns", "del", "empty"]).success();
    assert_eq!(links.success().stdout, "lo\n");
}

#[test]
fn second_vm_in_one_network_namespace_is_refused() {
    let _node = Node::new("second_vm_in_one_network_namespace_is_refused");
    let namespace = Namespace::new("taken");
    let option = namespace.option();
    let first = Container::start_image(
        "taken-1",
        BUSYBOX,
        &["--with-ns", &option],
        &["sleep", "infinity"],
    );
    let joined = namespace.contents();
    let second = run(
        "ctr",
        &[
            "run",
            "--rm",
            "--runtime",
            RUNTIME,
            "--with-ns",
            &option,
            BUSYBOX,
            "taken-2",
            "true",
        ],
    );
    assert_ne!(second.code, 0);
    assert!(second.stderr.contains("another pod's VM"), "{second:?}");
    run("ctr", &["container", "delete", "taken-2"]);
    assert_eq!(namespace.contents(), joined, "the first is left alone");
    assert_eq!(first.exec("still", &["true"]).code, 0);
}
