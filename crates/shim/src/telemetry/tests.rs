// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A collector on a real socket reads what a sandbox's phases become.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;
use tracing_subscriber::layer::SubscriberExt;

use super::*;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A collector that answers every request with `answer`; the requests' heads and bodies.
fn collector(answer: &'static str) -> (Endpoint, mpsc::Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, requests) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            let (head, body) = loop {
                let count = stream.read(&mut buffer).unwrap();
                assert!(count > 0, "the request breaks off");
                request.extend_from_slice(&buffer[..count]);
                let text = String::from_utf8_lossy(&request);
                let Some((head, body)) = text.split_once("\r\n\r\n") else {
                    continue;
                };
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("Content-Length: "))
                    .unwrap();
                if body.len() >= length.parse().unwrap() {
                    break (head.to_owned(), serde_json::from_str(body).unwrap());
                }
            };
            // Before the answer: what was answered, a test has got.
            let wanted = sender.send((head, body));
            stream.write_all(answer.as_bytes()).unwrap();
            if wanted.is_err() {
                return;
            }
        }
    });
    let path = "/v1/traces".to_owned();
    (Endpoint { address, path }, requests)
}

fn phase(name: &str, container: Option<&str>, ok: bool) {
    tracing::info!(
        sandbox_id = "pod1",
        container_id = container,
        phase = name,
        elapsed_us = 1500_u64,
        ok,
        "phase"
    );
}

/// Waits until everything is sent or dropped.
fn finish(telemetry: &Telemetry) {
    drop(telemetry.queue().take());
    let ended = telemetry.ended.lock().unwrap();
    ended.recv_timeout(PATIENCE).unwrap();
}

/// The spans of all requests, which are one on a node that is not busy.
fn spans(requests: &mpsc::Receiver<(String, Value)>) -> Vec<Value> {
    let mut spans = Vec::new();
    for (head, request) in requests.try_iter() {
        assert!(
            head.starts_with("POST /v1/traces HTTP/1.1\r\nHost: 127.0.0.1:"),
            "{head}"
        );
        assert!(
            head.contains("\r\nContent-Type: application/json"),
            "{head}"
        );
        let resource = &request["resourceSpans"][0]["resource"]["attributes"];
        assert_eq!(
            value(resource, "service.name"),
            Some("containerd-shim-coffer-v2")
        );
        assert_eq!(value(resource, "service.instance.id"), Some("pod1"));
        let scopes = &request["resourceSpans"][0]["scopeSpans"][0];
        assert_eq!(scopes["scope"]["name"], "coffer");
        spans.extend(scopes["spans"].as_array().unwrap().clone());
    }
    spans
}

fn value<'a>(attributes: &'a Value, key: &str) -> Option<&'a str> {
    let all = attributes.as_array().unwrap();
    let found = all.iter().find(|attribute| attribute["key"] == key)?;
    found["value"]["stringValue"].as_str()
}

fn number(text: &Value) -> u64 {
    text.as_str().unwrap().parse().unwrap()
}

#[test]
fn phases_of_a_start_reach_the_collector_as_one_trace() {
    let (endpoint, requests) = collector("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    let telemetry = Telemetry::start(endpoint, "k8s.io", "pod1").unwrap();
    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
    tracing::subscriber::with_default(subscriber, || {
        phase("boot", None, true);
        tracing::info!("no phase");
        phase("create", Some("c1"), false);
        phase("start", Some("c1"), true);
        phase("exec", Some("c1"), true);
        phase("start", Some("c2"), true);
    });
    finish(&telemetry);
    let spans = spans(&requests);
    let names: Vec<&str> = spans
        .iter()
        .map(|span| span["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["boot", "create", "start", "pod start", "start"],
        "an exec is no part"
    );
    let trace = spans[0]["traceId"].as_str().unwrap();
    assert!(
        trace.len() == 32 && trace.bytes().all(|digit| digit.is_ascii_hexdigit()),
        "{trace}"
    );
    let root = &spans[3];
    assert_eq!(root["parentSpanId"], "");
    for span in &spans {
        assert_eq!(span["traceId"], trace);
        let id = span["spanId"].as_str().unwrap();
        assert!(id.len() == 16 && id != "0000000000000000", "{id}");
        assert_eq!(
            spans.iter().filter(|other| other["spanId"] == id).count(),
            1,
            "{id}"
        );
        assert_eq!(value(&span["attributes"], "sandbox_id"), Some("pod1"));
        assert_eq!(span["kind"], 1);
        let name = span["name"].as_str().unwrap();
        let (start, end) = (
            number(&span["startTimeUnixNano"]),
            number(&span["endTimeUnixNano"]),
        );
        if name == ROOT {
            assert!(start <= end && start > 0);
        } else {
            assert_eq!(end - start, 1_500_000, "{name}");
            assert_eq!(span["parentSpanId"], root["spanId"], "{name}");
        }
        let failed = span["status"]["code"] == 2;
        assert_eq!(failed, name == "create", "{name}");
    }
    assert_eq!(value(&spans[1]["attributes"], "container.id"), Some("c1"));
    assert_eq!(value(&spans[0]["attributes"], "container.id"), None);
    assert_eq!(
        telemetry.dump(),
        serde_json::json!({ "spans_sent": 5, "spans_dropped": 0 })
    );
}

#[test]
fn pod_whose_vm_fails_has_a_root_that_failed() {
    let (endpoint, requests) = collector("HTTP/1.1 202 Accepted\r\n\r\n");
    let telemetry = Telemetry::start(endpoint, "k8s.io", "pod1").unwrap();
    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
    tracing::subscriber::with_default(subscriber, || phase("launch", None, false));
    finish(&telemetry);
    let spans = spans(&requests);
    assert_eq!((spans.len(), &spans[1]["name"]), (2, &ROOT.into()));
    assert_eq!(spans[1]["status"]["code"], 2);
}

#[test]
fn collector_that_refuses_or_is_away_costs_the_spans_only() {
    let (refusing, _requests) = collector("HTTP/1.1 503 Service Unavailable\r\n\r\n");
    let away = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        Endpoint {
            address,
            path: "/".to_owned(),
        }
    };
    for endpoint in [refusing, away] {
        let telemetry = Telemetry::start(endpoint, "k8s.io", "pod1").unwrap();
        let subscriber = tracing_subscriber::registry().with(telemetry.layer());
        tracing::subscriber::with_default(subscriber, || phase("boot", None, true));
        finish(&telemetry);
        assert_eq!(
            telemetry.dump(),
            serde_json::json!({ "spans_sent": 0, "spans_dropped": 1 })
        );
    }
}

#[test]
fn collector_that_does_not_answer_holds_up_nobody_and_the_queue_has_an_end() {
    // Accepts by its backlog, and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let path = "/".to_owned();
    let telemetry = Telemetry::start(Endpoint { address, path }, "k8s.io", "pod1").unwrap();
    let begun = Instant::now();
    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
    let made = 4 * MAX_QUEUED;
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..made {
            phase("boot", None, true);
        }
    });
    telemetry.end();
    assert!(begun.elapsed() < PATIENCE);
    let dropped = telemetry.dump()["spans_dropped"].as_u64().unwrap();
    let kept = u64::try_from(MAX_QUEUED + MAX_BATCH).unwrap();
    assert!(dropped >= u64::try_from(made).unwrap() - kept, "{dropped}");
}

#[test]
fn traces_of_two_starts_differ() {
    let at = |seconds| Trace::new("k8s.io", "pod1", UNIX_EPOCH + Duration::from_secs(seconds));
    let id =
        |trace: &Trace| trace.request(&[])["resourceSpans"].to_string() + &format!("{trace:?}");
    assert_ne!(id(&at(1)), id(&at(2)));
}
