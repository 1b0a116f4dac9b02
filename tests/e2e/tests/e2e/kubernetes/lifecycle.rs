// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container from its creation to its removal, and what kubelet is told of it on the way.

use std::collections::HashMap;
use std::time::Duration;

use k8s_cri::v1;
use tonic::Code;

use super::client::{Running, until};
use super::shared::Shared;
use crate::volumes::{IDLE, PodDir, mount, sh};

const LABEL: &str = "io.kubernetes.container.name";

static POD: Shared<Running> = Shared::new(|| Running::new("life"));

fn state(pod: &Running, container: &str) -> v1::ContainerState {
    pod.kubelet.status(container).state()
}

#[test]
fn created_container_has_not_run() {
    let pod = POD.case();
    let id = pod.kubelet.create(&pod.pod, "created", 0, &["echo", "ran"]);
    let status = pod.kubelet.status(&id);
    assert_eq!(status.state(), v1::ContainerState::ContainerCreated);
    assert!(status.created_at > 0);
    assert_eq!((status.started_at, status.finished_at), (0, 0));
    assert_eq!(pod.kubelet.log("created", 0, "stdout"), "");
    pod.kubelet.remove(&id);
    assert_eq!(
        pod.kubelet.try_status(&id).unwrap_err().code(),
        Code::NotFound
    );
}

#[test]
fn attributes_of_a_container_are_kept() {
    let pod = POD.case();
    let map = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
    let change = |config: &mut v1::ContainerConfig| {
        config.labels = map(LABEL, "kept");
        config.annotations = map("io.kubernetes.container.hash", "9f8e7d");
    };
    let id = pod
        .kubelet
        .create_with(&pod.pod, "kept", 3, &IDLE, change)
        .unwrap();
    pod.kubelet.start(&id);
    let status = pod.kubelet.status(&id);
    assert_eq!(
        status.metadata.unwrap(),
        v1::ContainerMetadata {
            name: "kept".to_owned(),
            attempt: 3
        }
    );
    assert_eq!(status.labels, map(LABEL, "kept"));
    assert_eq!(
        status.annotations,
        map("io.kubernetes.container.hash", "9f8e7d")
    );
    assert_eq!(status.image.unwrap().image, e2e::BUSYBOX);
    assert!(
        status.log_path.ends_with("/life/kept_3.log"),
        "{}",
        status.log_path
    );
    pod.discard(&id);
}

#[test]
fn times_of_a_container_are_in_order() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "times", &["true"]);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    let status = pod.kubelet.status(&id);
    assert!(0 < status.created_at, "{status:?}");
    assert!(status.created_at < status.started_at, "{status:?}");
    assert!(status.started_at < status.finished_at, "{status:?}");
    pod.kubelet.remove(&id);
}

#[test]
fn container_that_succeeds_is_completed_and_one_that_fails_is_in_error() {
    let pod = POD.case();
    for (name, code, reason) in [("succeeds", 0, "Completed"), ("fails", 42, "Error")] {
        let id = pod
            .kubelet
            .run(&pod.pod, name, &sh(&format!("exit {code}")));
        assert_eq!(pod.kubelet.exit_code(&id), code);
        assert_eq!(pod.kubelet.status(&id).reason, reason);
        pod.kubelet.remove(&id);
    }
}

#[test]
fn container_whose_command_is_missing_does_not_start_and_says_why() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .create(&pod.pod, "missing", 0, &["/no/such/program"]);
    let message = pod.kubelet.try_start(&id).unwrap_err().message().to_owned();
    assert!(message.contains("/no/such/program"), "{message}");
    let status = pod.kubelet.status(&id);
    assert_eq!(status.state(), v1::ContainerState::ContainerExited);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );
    assert!(status.message.contains("/no/such/program"), "{status:?}");
    pod.kubelet.remove(&id);
}

#[test]
fn container_that_runs_is_not_started_again() {
    let pod = POD.case();
    let message = pod
        .kubelet
        .try_start(&pod.main)
        .unwrap_err()
        .message()
        .to_owned();
    assert!(message.contains("CONTAINER_RUNNING"), "{message}");
    assert_eq!(pod.exec("exit 6").code, 6);
}

#[test]
fn name_and_attempt_of_a_container_are_taken_once() {
    let pod = POD.case();
    let again = pod.kubelet.create_with(&pod.pod, "main", 0, &IDLE, |_| ());
    let message = again.unwrap_err().message().to_owned();
    assert!(message.contains("is reserved for"), "{message}");
    let other = pod.kubelet.create(&pod.pod, "main", 1, &IDLE);
    pod.kubelet.remove(&other);
}

#[test]
fn container_is_removed_created_running_or_ended() {
    let pod = POD.case();
    let created = pod.kubelet.create(&pod.pod, "removed", 0, &IDLE);
    let running = pod.kubelet.create(&pod.pod, "removed", 1, &IDLE);
    pod.kubelet.start(&running);
    let ended = pod.kubelet.create(&pod.pod, "removed", 2, &["true"]);
    pod.kubelet.start(&ended);
    assert_eq!(pod.kubelet.exit_code(&ended), 0);
    for id in [created, running, ended] {
        pod.kubelet.remove(&id);
        assert_eq!(
            pod.kubelet.try_status(&id).unwrap_err().code(),
            Code::NotFound
        );
    }
    assert_eq!(pod.exec("exit 5").code, 5, "the neighbour runs on");
}

#[test]
fn containers_are_listed_by_id_state_pod_and_label() {
    let pod = POD.case();
    let labelled = |name: &str, value: &str| {
        let value = value.to_owned();
        let change = |config: &mut v1::ContainerConfig| {
            config.labels = HashMap::from([("colour".to_owned(), value)]);
        };
        pod.kubelet
            .create_with(&pod.pod, name, 0, &IDLE, change)
            .unwrap()
    };
    let red = labelled("red", "red");
    let blue = labelled("blue", "blue");
    pod.kubelet.start(&blue);
    let of_pod = || v1::ContainerFilter {
        pod_sandbox_id: pod.pod.id.clone(),
        ..Default::default()
    };
    assert_eq!(pod.kubelet.list(of_pod()), ["blue", "main", "red"]);
    let by_id = v1::ContainerFilter {
        id: red.clone(),
        ..Default::default()
    };
    assert_eq!(pod.kubelet.list(by_id), ["red"]);
    let running = v1::ContainerStateValue {
        state: i32::from(v1::ContainerState::ContainerRunning),
    };
    let by_state = v1::ContainerFilter {
        state: Some(running),
        ..of_pod()
    };
    assert_eq!(pod.kubelet.list(by_state), ["blue", "main"]);
    let by_label = v1::ContainerFilter {
        label_selector: HashMap::from([("colour".to_owned(), "red".to_owned())]),
        ..of_pod()
    };
    assert_eq!(pod.kubelet.list(by_label), ["red"]);
    pod.kubelet.remove(&red);
    pod.discard(&blue);
}

#[test]
fn stop_sends_sigterm_exactly_once_and_waits_for_the_end() {
    let pod = POD.case();
    let script = "trap 'echo terminated' TERM; echo ready; \
                  while [ ! -e /finish ]; do sleep 0.1; done; sleep 1; echo finished; exit 3";
    let id = pod.kubelet.run(&pod.pod, "graceful", &sh(script));
    pod.kubelet.logs("graceful", 0, "ready");
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| pod.kubelet.stop(&id, Duration::from_secs(100)));
        pod.kubelet.logs("graceful", 0, "terminated");
        pod.kubelet.exec(&id, &["touch", "/finish"]);
        stop.join().unwrap();
    });
    assert_eq!(
        state(&pod, &id),
        v1::ContainerState::ContainerExited,
        "stop has waited"
    );
    assert_eq!(pod.kubelet.exit_code(&id), 3);
    pod.kubelet.logs("graceful", 0, "finished");
    assert_eq!(
        pod.kubelet.log("graceful", 0, "stdout"),
        "ready\nterminated\nfinished\n"
    );
    pod.kubelet.remove(&id);
}

#[test]
fn grace_period_of_zero_kills_at_once() {
    let pod = POD.case();
    let script = "trap 'echo terminated' TERM; echo ready; while :; do sleep 0.1; done";
    let id = pod.kubelet.run(&pod.pod, "graceless", &sh(script));
    pod.kubelet.logs("graceless", 0, "ready");
    pod.kubelet.stop(&id, Duration::ZERO);
    assert_eq!(pod.kubelet.exit_code(&id), 137);
    assert_eq!(pod.kubelet.log("graceless", 0, "stdout"), "ready\n");
    pod.kubelet.remove(&id);
}

#[test]
fn processes_of_a_container_die_with_its_first() {
    let pod = POD.case();
    let dir = PodDir::new("life");
    let volume = dir.empty_dir("beats");
    // A child in a session of its own, deaf to what kills the first.
    let child = "trap '' TERM HUP; i=0; while :; do i=\\$((i + 1)); echo \\$i > /beats/child; sleep 0.05; done";
    let script = format!(
        "setsid sh -c \"{child}\" & while [ ! -s /beats/child ]; do sleep 0.05; done; exit 7"
    );
    let with_volume = |config: &mut v1::ContainerConfig| {
        config.mounts = vec![mount(&volume, "/beats", false)];
    };
    let watcher = pod
        .kubelet
        .run_with(&pod.pod, "watcher", &IDLE, with_volume);
    let parent = pod
        .kubelet
        .run_with(&pod.pod, "parent", &sh(&script), with_volume);
    assert_eq!(pod.kubelet.exit_code(&parent), 7);
    let beats = sh("cat /beats/child; sleep 1; cat /beats/child");
    let seen = pod.kubelet.exec(&watcher, &beats).stdout;
    let (one, two) = seen.trim().split_once('\n').unwrap();
    assert_eq!(one, two, "the child has gone on");
    pod.kubelet.remove(&parent);
    pod.discard(&watcher);
}

#[test]
fn container_has_pids_of_its_own_from_one() {
    let pod = POD.case();
    let ended = pod.script("first", "echo $$; ls -d /proc/[0-9]* | wc -l", |_| ());
    // The shell and the two that it runs.
    assert_eq!(ended.stdout.lines().next(), Some("1"));
    let count: u32 = ended.stdout.lines().nth(1).unwrap().trim().parse().unwrap();
    assert!((2..=4).contains(&count), "{count} processes");
}

#[test]
fn orphan_goes_to_the_containers_first_process() {
    let pod = POD.case();
    let script = "sh -c 'sleep 1000 & echo $! > /orphan'; cut -d' ' -f4 /proc/$(cat /orphan)/stat";
    let ended = pod.script("orphan", script, |_| ());
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "1\n"));
}

#[test]
fn eight_containers_run_beside_each_other() {
    let pod = POD.case();
    let ids: Vec<String> = (0..8)
        .map(|number| {
            let script = format!("echo container {number}; exec sleep infinity");
            pod.kubelet
                .run(&pod.pod, &format!("many-{number}"), &sh(&script))
        })
        .collect();
    for number in 0..8 {
        pod.kubelet.logs(
            &format!("many-{number}"),
            0,
            &format!("container {number}\n"),
        );
    }
    until("all of them run", || {
        ids.iter()
            .all(|id| state(&pod, id) == v1::ContainerState::ContainerRunning)
    });
    for id in &ids {
        pod.discard(id);
    }
}
