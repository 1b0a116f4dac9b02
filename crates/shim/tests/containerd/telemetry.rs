// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A shim whose node has a collector.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use containerd_shim_protos::api::{CreateTaskRequest, StartRequest};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use serde_json::Value;
use ttrpc::context::with_duration;

use crate::support::{Containerd, PATIENCE, address};

/// Takes every request and gives its body.
fn collector() -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, bodies) = mpsc::channel();
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
            reader
                .get_mut()
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                .unwrap();
            if sender.send(serde_json::from_slice(&body).unwrap()).is_err() {
                return;
            }
        }
    });
    (endpoint, bodies)
}

#[tokio::test]
async fn start_of_a_container_is_a_trace_at_the_collector() {
    let (endpoint, bodies) = collector();
    let containerd = Containerd::new();
    let config = format!("[telemetry]\notlp_endpoint = {endpoint:?}\n");
    fs::write(containerd.path("config.toml"), config).unwrap();
    let bundle = containerd.plain_bundle("c1");
    let socket = address(&containerd.start("c1", &bundle));
    let socket = format!("unix://{}", socket.trim_start_matches("unix://"));
    let task = TaskClient::new(Client::connect(&socket).await.unwrap());
    let create = CreateTaskRequest {
        id: "c1".to_owned(),
        bundle: bundle.to_str().unwrap().to_owned(),
        ..Default::default()
    };
    task.create(with_duration(PATIENCE), &create).await.unwrap();
    let start = StartRequest {
        id: "c1".to_owned(),
        ..Default::default()
    };
    task.start(with_duration(PATIENCE), &start).await.unwrap();

    let (mut names, mut traces) = (BTreeSet::new(), BTreeSet::new());
    while !names.contains("pod start") {
        let body = bodies.recv_timeout(PATIENCE).unwrap();
        let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"].clone();
        for span in spans.as_array().unwrap() {
            names.insert(span["name"].as_str().unwrap().to_owned());
            traces.insert(span["traceId"].as_str().unwrap().to_owned());
        }
    }
    for phase in ["plan", "launch", "boot", "configure", "create", "start"] {
        assert!(names.contains(phase), "{phase}: {names:?}");
    }
    assert_eq!(traces.len(), 1);
}
