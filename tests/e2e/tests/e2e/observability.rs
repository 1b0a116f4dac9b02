// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What an operator sees and allows: annotations, figures of the network, spans, the config in effect.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use e2e::{BUSYBOX, ConfigChange, Container, DEADLINE, Node, run};
use serde_json::Value;

use crate::cri_client::Kubelet;

/// The node's address on the CNI plugin's bridge.
const NODE: &str = "10.88.0.1";

/// Bytes through a connection whose frames' own headers are within the twentieth by which figures may differ.
const BYTES: u64 = 8 << 20;

pub(crate) const VCPUS: &str = "io.coffer.vm.vcpus";

/// Adds to the node's config. A test's own sections must not be in it.
pub(crate) fn add_config(node: &Node, text: &str) -> ConfigChange {
    let config = std::fs::read_to_string("/etc/coffer/config.toml").unwrap_or_default();
    node.change_config(&format!("{config}\n{text}"))
}

fn annotated(id: &str, annotation: &str) -> e2e::Output {
    Container::run_image(id, BUSYBOX, &["--annotation", annotation], &["nproc"])
}

#[test]
fn annotation_that_the_node_does_not_allow_is_refused_with_what_to_do() {
    let _node = Node::new("annotation_that_the_node_does_not_allow_is_refused_with_what_to_do");
    let refused = annotated("refused", &format!("{VCPUS}=2"));
    assert_ne!(refused.code, 0);
    assert!(
        refused
            .stderr
            .contains("annotations.allow in the node's config"),
        "{refused:?}"
    );
    let unknown = annotated("unknown", "io.coffer.vm.vcpu=2");
    assert!(
        unknown.stderr.contains("did you mean io.coffer.vm.vcpus?"),
        "{unknown:?}"
    );
}

#[test]
fn bytes_of_a_pod_are_in_its_figures() {
    let _node = Node::new("bytes_of_a_pod_are_in_its_figures");
    let mut kubelet = Kubelet::new("counted");
    let pod = kubelet.run_pod("counted");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    let network = || -> (u64, u64) {
        let all = run("cofferctl", &["stats", &pod.id, "-o", "json"]).success();
        let all: Value = serde_json::from_str(&all.stdout).unwrap();
        let rows = all.as_array().unwrap();
        let of_the_pod = rows
            .iter()
            .find(|row| row["container_id"] == pod.id.as_str());
        let of_the_pod = of_the_pod.unwrap();
        for row in rows.iter().filter(|row| *row != of_the_pod) {
            assert!(
                row["network_receive_bytes"].is_null(),
                "the pod's alone: {row}"
            );
        }
        let number = |name: &str| of_the_pod[name].as_u64().unwrap();
        (
            number("network_receive_bytes"),
            number("network_transmit_bytes"),
        )
    };
    let before = network();
    let listener = TcpListener::bind((NODE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taker = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
    });
    let send = format!("head -c {BYTES} /dev/zero | nc {NODE} {port}");
    let sent = kubelet.exec(&container, &["sh", "-c", &send]);
    assert_eq!(sent.code, 0, "{sent:?}");
    assert_eq!(taker.join().unwrap(), BYTES);
    let after = network();
    let transmitted = after.1 - before.1;
    assert!(
        (BYTES..=BYTES + BYTES / 20).contains(&transmitted),
        "{BYTES} bytes became {transmitted}: {before:?} {after:?}"
    );
    assert!(
        after.0 > before.0,
        "what acknowledges them: {before:?} {after:?}"
    );
}

/// Takes every request, and gives the names and traces of its spans.
fn collector() -> (String, mpsc::Receiver<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, spans) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(text) = line.strip_prefix("Content-Length: ") {
                    length = text.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
            reader.get_mut().write_all(answer).unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let all = &body["resourceSpans"][0]["scopeSpans"][0]["spans"];
            for span in all.as_array().unwrap() {
                let text = |name: &str| span[name].as_str().unwrap().to_owned();
                if sender.send((text("name"), text("traceId"))).is_err() {
                    return;
                }
            }
        }
    });
    (endpoint, spans)
}

#[test]
fn start_of_a_container_is_one_trace_at_the_nodes_collector() {
    let node = Node::new("start_of_a_container_is_one_trace_at_the_nodes_collector");
    let (endpoint, spans) = collector();
    let _config = add_config(
        &node,
        &format!("[telemetry]\notlp_endpoint = {endpoint:?}\n"),
    );
    let _container = Container::start("traced", &["sleep", "infinity"]);
    let (mut names, mut traces) = (BTreeSet::new(), BTreeSet::new());
    while !names.contains("pod start") {
        let (name, trace) = spans.recv_timeout(DEADLINE).unwrap();
        names.insert(name);
        traces.insert(trace);
    }
    for phase in ["plan", "launch", "boot", "configure", "create", "start"] {
        assert!(names.contains(phase), "{phase}: {names:?}");
    }
    assert_eq!(traces.len(), 1);
}

#[test]
fn console_of_a_guest_is_shown_from_its_first_line() {
    let node = Node::new("console_of_a_guest_is_shown_from_its_first_line");
    // All that the kernel says, which is more than the 4 KiB that errors have room for.
    let _config = node.change_config(
        "[guest]\nready_timeout_s = 180\nkernel_arguments = [\"ignore_loglevel\"]\n",
    );
    let _container = Container::start("printing", &["sleep", "infinity"]);
    let console = run("cofferctl", &["console", "printing"]).success();
    assert_eq!(console.stderr, "", "nothing is lost");
    let text = console.stdout;
    assert!(text.len() > 4096, "{} bytes", text.len());
    let first = text.lines().next().unwrap();
    assert!(first.contains("Linux version"), "{first}");
}

#[test]
fn config_in_effect_is_the_nodes() {
    let node = Node::new("config_in_effect_is_the_nodes");
    let _config = node.change_config("[guest]\ndefault_vcpus = 2\n");
    let printed = run("containerd-shim-coffer-v2", &["-print-config"]).success();
    assert!(
        printed
            .stdout
            .contains("default_vcpus = 2 # /etc/coffer/config.toml"),
        "{printed:?}"
    );
    let same = run("cofferctl", &["config"]).success();
    assert_eq!(same.stdout, printed.stdout);
}
