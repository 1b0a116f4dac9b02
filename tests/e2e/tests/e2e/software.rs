// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Servers from Debian packages: they start, answer through an exec, and stop on SIGTERM with their own exit code.

use e2e::{Container, Node, eventually};

fn answers(container: &Container, command: &[&str], wanted: &str) {
    let mut attempt = 0;
    eventually(&format!("{} answers", container.id()), || {
        attempt += 1;
        let output = container.exec(&format!("ask-{attempt}"), command);
        output.stdout.contains(wanted).then_some(())
    });
}

fn stops_with(container: &Container, signal: &str, code: i32) {
    container.kill(signal).success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), code);
}

#[test]
fn nginx_serves_and_stops() {
    let _node = Node::new("nginx_serves_and_stops");
    let container = Container::start_image("nginx", "coffer.test/nginx:latest", &[], &[]);
    answers(
        &container,
        &["wget", "-q", "-O", "-", "http://127.0.0.1/"],
        "served by nginx",
    );
    stops_with(&container, "SIGTERM", 0);
}

#[test]
fn redis_keeps_what_it_is_given_and_stops() {
    let _node = Node::new("redis_keeps_what_it_is_given_and_stops");
    let container = Container::start_image("redis", "coffer.test/redis:latest", &[], &[]);
    answers(&container, &["redis-cli", "ping"], "PONG");
    let set = container
        .exec("set", &["redis-cli", "set", "key", "value"])
        .success();
    assert_eq!(set.stdout.trim(), "OK");
    let get = container
        .exec("get", &["redis-cli", "get", "key"])
        .success();
    assert_eq!(get.stdout.trim(), "value");
    stops_with(&container, "SIGTERM", 0);
}

#[test]
fn python_serves_and_stops_with_the_code_of_its_handler() {
    let _node = Node::new("python_serves_and_stops_with_the_code_of_its_handler");
    let container = Container::start_image("python", "coffer.test/python:latest", &[], &[]);
    answers(
        &container,
        &["wget", "-q", "-O", "-", "http://127.0.0.1:8000/"],
        "Directory listing",
    );
    stops_with(&container, "SIGTERM", 3);
}
