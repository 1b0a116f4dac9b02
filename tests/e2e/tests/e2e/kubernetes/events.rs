// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What containerd is told while a container lives: kubelet's own events come of it.

use std::io::{BufRead, BufReader};
use std::ops::Deref;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::thread;

use e2e::spawn;
use serde_json::Value;

use super::client::{Running, until};
use super::shared::Shared;
use crate::cri_client::resources;
use crate::volumes::{IDLE, sh};

static POD: Shared<Heard> = Shared::new(Heard::new);

/// A pod, and what containerd has told of it.
struct Heard {
    running: Running,
    lines: Arc<Mutex<Vec<String>>>,
    listener: Child,
}

impl Heard {
    fn new() -> Self {
        let mut listener = spawn("ctr", &["-n", "k8s.io", "events"]);
        let output = BufReader::new(listener.stdout.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&lines);
        // Ends with the listener.
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                to.lock().unwrap().push(line);
            }
        });
        let heard = Self {
            running: Running::new("events"),
            lines,
            listener,
        };
        // `ctr events` does not say from when on it listens.
        until("the listener hears", || {
            heard.exec("true");
            !heard.lines.lock().unwrap().is_empty()
        });
        heard
    }

    /// Topics and contents of the events of a container's tasks, in the order in which they came.
    fn of(&self, container: &str) -> Vec<(String, Value)> {
        let lines = self.lines.lock().unwrap();
        let of_container = lines.iter().filter(|line| line.contains(container));
        let parsed = of_container.filter_map(|line| {
            let (topic, content) = line.split_once(" /tasks/")?.1.split_once(' ')?;
            Some((topic.to_owned(), serde_json::from_str(content).unwrap()))
        });
        parsed.collect()
    }

    /// The same, once there are as many as these topics.
    #[track_caller]
    fn expect(&self, container: &str, topics: &[&str]) -> Vec<Value> {
        until(&format!("{topics:?} are told"), || {
            self.of(container).len() >= topics.len()
        });
        let (heard, contents): (Vec<String>, Vec<Value>) = self.of(container).into_iter().unzip();
        assert_eq!(heard, topics, "{contents:?}");
        contents
    }
}

impl Deref for Heard {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        let ended = self.listener.kill().and_then(|()| self.listener.wait());
        if let Err(error) = ended {
            eprintln!("the listener is not ended: {error}");
        }
    }
}

#[test]
fn life_of_a_container_is_told_in_order_with_its_code() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "life", &sh("exit 11"));
    assert_eq!(pod.kubelet.exit_code(&id), 11);
    pod.kubelet.remove(&id);
    let told = pod.expect(&id, &["create", "start", "exit", "delete"]);
    assert_eq!(told[2]["exit_status"], 11);
    assert_eq!(told[3]["exit_status"], 11);
    assert_eq!(told[2]["id"], told[2]["container_id"]);
    assert_eq!(told[1]["pid"], told[2]["pid"]);
}

#[test]
fn exec_is_told_apart_from_its_container() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "exec", &IDLE);
    assert_eq!(pod.kubelet.exec(&id, &sh("exit 12")).code, 12);
    let told = pod.expect(
        &id,
        &["create", "start", "exec-added", "exec-started", "exit"],
    );
    assert_eq!(told[4]["exit_status"], 12);
    assert_eq!(told[4]["id"], told[3]["exec_id"]);
    assert_ne!(told[4]["id"], told[4]["container_id"]);
    pod.discard(&id);
    let told = pod.expect(
        &id,
        &[
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "exit",
            "delete",
        ],
    );
    assert_eq!(told[5]["exit_status"], 137);
}

#[test]
fn container_that_runs_out_of_memory_is_told_before_its_end() {
    let pod = POD.case();
    let command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1"];
    let id = pod.kubelet.run_with(&pod.pod, "oom", &command, |config| {
        config.linux.as_mut().unwrap().resources = Some(resources(24 << 20, 0));
    });
    assert_eq!(pod.kubelet.exit_code(&id), 137);
    pod.kubelet.remove(&id);
    pod.expect(&id, &["create", "start", "oom", "exit", "delete"]);
}

#[test]
fn container_that_does_not_start_is_not_told_as_started() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .create(&pod.pod, "missing", 0, &["/no/such/program"]);
    assert!(pod.kubelet.try_start(&id).is_err());
    pod.kubelet.remove(&id);
    let topics: Vec<String> = pod.of(&id).into_iter().map(|(topic, _)| topic).collect();
    assert!(!topics.contains(&"start".to_owned()), "{topics:?}");
}
