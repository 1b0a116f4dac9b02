// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The operator's tool on a node with sandboxes.

use std::io::{BufRead, BufReader};

use e2e::{Container, Node, eventually, run, spawn};
use serde_json::Value;

use crate::cri_client::Kubelet;

/// What a verb of `cofferctl` prints as JSON.
fn cofferctl(words: &[&str]) -> Value {
    let mut all = words.to_vec();
    all.extend(["-o", "json"]);
    serde_json::from_str(&run("cofferctl", &all).success().stdout).unwrap()
}

/// The row of `list` about a sandbox.
fn listed(sandbox: &str) -> Option<Value> {
    let rows = cofferctl(&["list"]);
    let mut rows = rows.as_array().unwrap().iter();
    rows.find(|row| row["sandbox_id"] == sandbox).cloned()
}

#[test]
fn operator_sees_a_container_without_a_pod() {
    let _node = Node::new("operator_sees_a_container_without_a_pod");
    let container = Container::start("seen", &["sleep", "infinity"]);
    let row = listed(container.id()).unwrap();
    assert_eq!(
        (&row["namespace"], &row["state"], &row["containers"]),
        (&"default".into(), &"ready".into(), &1.into()),
        "{row}"
    );
    let vmm = i64::from(e2e::named("coffer-vmm")[0]);
    assert_eq!(row["vmm_pid"], vmm, "{row}");

    let inside = cofferctl(&["inspect", "see"]);
    assert_eq!(inside["processes"][0]["container_id"], "seen", "{inside}");
    assert_eq!(inside["processes"][0]["status"], "running", "{inside}");
    assert!(inside["vm"]["vmm"].is_object(), "{inside}");
    assert!(inside["vm"]["agent"].is_object(), "{inside}");

    run("cofferctl", &["console", "seen"]).success();
    let log = run("cofferctl", &["logs", "seen"]).success().stdout;
    assert!(
        log.contains("msg=serving") && log.contains("phase=boot"),
        "{log}"
    );
    let events = run("cofferctl", &["events", "seen"]).success().stdout;
    let topics: Vec<&str> = events
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    assert_eq!(topics, ["/tasks/create", "/tasks/start"]);
    let figures = cofferctl(&["stats", "seen"]);
    assert_eq!(figures[0]["pids"], 1, "{figures}");
    assert!(
        figures[0]["cpu_usage_us"].as_u64().unwrap() > 0,
        "{figures}"
    );
}

#[test]
fn operator_sees_a_pod_with_its_containers() {
    let _node = Node::new("operator_sees_a_pod_with_its_containers");
    let mut kubelet = Kubelet::new("seen-pod");
    let pod = kubelet.run_pod("seen-pod");
    kubelet.run(&pod, "one", &["sleep", "infinity"]);
    kubelet.run(&pod, "two", &["sleep", "infinity"]);
    let row = listed(&pod.id).unwrap();
    assert_eq!(
        (&row["namespace"], &row["containers"]),
        (&"k8s.io".into(), &3.into()),
        "the sandbox container counts: {row}"
    );
    let figures = cofferctl(&["stats", &pod.id]);
    let figures = figures.as_array().unwrap();
    assert_eq!(figures.len(), 3, "{figures:?}");
    let memory = |of: &Value| of["memory_bytes"].as_u64().unwrap();
    let (whole, parts): (Vec<&Value>, Vec<&Value>) = figures
        .iter()
        .partition(|figures| figures["container_id"] == pod.id.as_str());
    let largest = parts.into_iter().map(memory).max().unwrap();
    assert!(memory(whole[0]) > largest, "{figures:?}");
    kubelet.stop_pod(&pod);
    assert_eq!(listed(&pod.id), None, "a stopped pod has no sandbox");
}

#[test]
fn events_are_followed_to_the_end_of_the_sandbox() {
    let _node = Node::new("events_are_followed_to_the_end_of_the_sandbox");
    let container = Container::start("followed", &["sleep", "infinity"]);
    let mut follower = spawn("cofferctl", &["events", "-f", "followed"]);
    let mut seen = BufReader::new(follower.stdout.take().unwrap()).lines();
    let first = seen.next().unwrap().unwrap();
    assert!(first.contains("/tasks/create"), "{first}");
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
    let status = eventually("the follower ends", || follower.try_wait().unwrap());
    let rest: Vec<String> = seen.map(Result::unwrap).collect();
    assert!(status.success(), "{rest:?}");
    assert!(
        rest.iter()
            .any(|line| line.contains("/tasks/exit") && line.ends_with("exit=137")),
        "{rest:?}"
    );
}
