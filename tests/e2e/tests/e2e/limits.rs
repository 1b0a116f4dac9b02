// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Limits of a pod's traffic, measured from outside: bytes and the time they take.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use e2e::{DEADLINE, Node, eventually};

use crate::cri_client::{Kubelet, Pod};

/// The node's address on the CNI plugin's bridge.
const NODE: &str = "10.88.0.1";
const PORT: u16 = 7000;
/// What the test's config says besides limits.
const GUEST: &str = "[guest]\nready_timeout_s = 180\n";

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// Whether so many bytes in that time are the rate, to a tenth; the burst at the start is no part of it.
fn is_rate(bytes: usize, elapsed: Duration, per_second: f64) -> bool {
    let burst = per_second / 10.0;
    let found = (bytes as f64 - burst) / elapsed.as_secs_f64();
    println!("{bytes} bytes in {elapsed:?}: {found:.0} of {per_second:.0} bytes per second");
    (0.9..=1.1).contains(&(found / per_second))
}

/// How long the pod takes to get so many bytes from the node: until it has said that it has them.
fn to_pod(kubelet: &Kubelet, pod: &Pod, bytes: usize) -> Duration {
    let script = format!(
        "mkfifo /back; exec 3<>/back; nc -l -p {PORT} <&3 | (head -c {bytes} | wc -c; echo >&3)"
    );
    let container = kubelet.run(pod, "receiver", &sh(&script));
    let ip = kubelet.pod_ip(pod);
    let mut stream = eventually("the pod listens", || {
        TcpStream::connect((ip.as_str(), PORT)).ok()
    });
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let start = Instant::now();
    stream.write_all(&vec![7; bytes]).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    let elapsed = start.elapsed();
    drop(stream);
    assert_eq!(kubelet.exit_code(&container), 0);
    eventually("all has come", || {
        (kubelet.log("receiver", 0, "stdout").trim() == bytes.to_string()).then_some(())
    });
    kubelet.remove(&container);
    elapsed
}

/// How long the node takes to get so many bytes from the pod.
fn from_pod(kubelet: &Kubelet, container: &str, bytes: usize) -> Duration {
    let listener = TcpListener::bind((NODE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taker = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let start = Instant::now();
        let mut buffer = vec![0; 1 << 16];
        let mut total = 0;
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            total += len;
        }
        (total, start.elapsed())
    });
    let script = format!("head -c {bytes} /dev/zero | nc {NODE} {port}");
    assert_eq!(kubelet.exec(container, &sh(&script)).code, 0);
    let (total, elapsed) = taker.join().unwrap();
    assert_eq!(total, bytes);
    elapsed
}

#[test]
fn bandwidth_of_the_pods_annotations_holds_to_a_tenth() {
    let _node = Node::new("bandwidth_of_the_pods_annotations_holds_to_a_tenth");
    let mut kubelet = Kubelet::new("bandwidth");
    let pod = kubelet
        .run_pod_with("bandwidth", |config| {
            let annotations = [
                ("kubernetes.io/ingress-bandwidth", "8M"),
                ("kubernetes.io/egress-bandwidth", "16M"),
            ];
            for (key, value) in annotations {
                config.annotations.insert(key.to_owned(), value.to_owned());
            }
        })
        .unwrap();
    let idle = kubelet.run(&pod, "idle", &["sleep", "infinity"]);
    let elapsed = to_pod(&kubelet, &pod, 8_000_000);
    assert!(is_rate(8_000_000, elapsed, 1_000_000.0));
    let elapsed = from_pod(&kubelet, &idle, 16_000_000);
    assert!(is_rate(16_000_000, elapsed, 2_000_000.0));
}

#[test]
fn disk_limit_of_the_node_holds_to_a_tenth() {
    const BYTES: usize = 24 << 20;
    let node = Node::new("disk_limit_of_the_node_holds_to_a_tenth");
    let _config = node.change_config(&format!("{GUEST}[limits]\ndisk_mib = 1\n"));
    let mut kubelet = Kubelet::new("disk");
    let pod = kubelet.run_pod("disk");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    // Without the time that the exec takes.
    let script = "read -r start _ < /proc/uptime; dd if=/dev/zero of=/file bs=1M count=24 conv=fsync || exit 1; \
                  read -r end _ < /proc/uptime; echo $start $end";
    let written = kubelet.exec(&container, &sh(script));
    assert_eq!(written.code, 0, "{written:?}");
    let seconds: Vec<f64> = written
        .stdout
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    let elapsed = Duration::from_secs_f64(seconds[1] - seconds[0]);
    assert!(is_rate(BYTES, elapsed, f64::from(1 << 20)));
}
