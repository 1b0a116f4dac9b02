// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The operator's tool on a node with sandboxes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use e2e::{ConfigChange, Container, Node, eventually, run, run_with_input, spawn};
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

/// A directory with the tools of a debugging shell, and a config that allows one, until both are dropped.
fn allow_shells(node: &Node) -> (PathBuf, ConfigChange) {
    let tools = PathBuf::from("/tmp/debug-tools");
    fs::create_dir_all(tools.join("bin")).unwrap();
    fs::copy("/bin/busybox", tools.join("bin/busybox")).unwrap();
    let _there = symlink("busybox", tools.join("bin/sh"));
    let config = fs::read_to_string("/etc/coffer/config.toml").unwrap_or_default();
    let change = node.change_config(&format!(
        "{config}\n[debug]\nrootfs = {:?}\n",
        tools.display().to_string()
    ));
    (tools, change)
}

#[test]
fn shell_is_refused_where_the_config_does_not_allow_it() {
    let _node = Node::new("shell_is_refused_where_the_config_does_not_allow_it");
    let container = Container::start("no-shell", &["sleep", "infinity"]);
    let refused = run("cofferctl", &["exec", container.id()]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("set debug.rootfs"), "{refused:?}");
}

#[test]
fn shell_sees_the_guest_and_leaves_nothing() {
    let node = Node::new("shell_sees_the_guest_and_leaves_nothing");
    let (tools, _config) = allow_shells(&node);
    let container = Container::start("shell", &["sleep", "31415"]);
    let script = b"busybox ps\nbusybox cat /proc/1/root/proc/sys/kernel/random/boot_id\necho oops >&2\nexit 7\n";
    let output = run_with_input("cofferctl", &["exec", "shell"], script);
    assert_eq!(output.code, 7, "{output:?}");
    assert!(output.stdout.contains("sleep 31415"), "{output:?}");
    assert_eq!(output.stderr, "oops\n");
    let boot_id = container.exec("boot", &["cat", "/proc/sys/kernel/random/boot_id"]);
    assert!(output.stdout.ends_with(&boot_id.stdout), "{output:?}");
    // Once more: the first has left its name and its disk's slot.
    assert_eq!(
        run("cofferctl", &["exec", "shell", "/bin/sh", "-c", "exit 3"]).code,
        3
    );
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    fs::remove_dir_all(tools).unwrap();
}

#[test]
fn shell_that_is_open_keeps_no_sandbox_alive() {
    let node = Node::new("shell_that_is_open_keeps_no_sandbox_alive");
    let (tools, _config) = allow_shells(&node);
    let container = Container::start("open-shell", &["sleep", "infinity"]);
    let mut shell = spawn(
        "cofferctl",
        &[
            "exec",
            "open-shell",
            "/bin/sh",
            "-c",
            "echo begun; exec busybox sleep 100000",
        ],
    );
    let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "begun");
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
    let status = eventually("the shell ends with its sandbox", || {
        shell.try_wait().unwrap()
    });
    assert!(!status.success());
    fs::remove_dir_all(tools).unwrap();
}
