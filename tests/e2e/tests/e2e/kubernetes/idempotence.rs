// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Calls that kubelet repeats, and calls about what is not there.

use std::time::Duration;

use tonic::Code;

use super::client::Running;
use super::shared::Shared;
use crate::cri_client::Kubelet;
use crate::volumes::IDLE;

/// An id of the right shape that nothing has.
const NOTHING: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

static POD: Shared<Running> = Shared::new(|| Running::new("idempotent"));

#[test]
fn container_that_has_ended_is_stopped_again() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run(&pod.pod, "stopped", &["sh", "-c", "exit 5"]);
    assert_eq!(pod.kubelet.exit_code(&id), 5);
    for _ in 0..2 {
        pod.kubelet.stop(&id, Duration::from_secs(10));
    }
    assert_eq!(pod.kubelet.exit_code(&id), 5, "its code stays");
    pod.kubelet.remove(&id);
}

#[test]
fn container_that_is_gone_is_removed_again() {
    let pod = POD.case();
    let id = pod.kubelet.create(&pod.pod, "gone", 0, &IDLE);
    for _ in 0..2 {
        pod.kubelet.try_remove(&id).unwrap();
    }
    pod.kubelet.try_remove(NOTHING).unwrap();
}

#[test]
fn pod_that_is_gone_is_removed_again() {
    let pod = POD.case();
    pod.kubelet.try_remove_pod(NOTHING).unwrap();
    let mut kubelet = Kubelet::new("gone-pod");
    let other = kubelet.run_pod("gone-pod");
    for _ in 0..2 {
        kubelet.try_stop_pod(&other.id).unwrap();
    }
    for _ in 0..2 {
        kubelet.try_remove_pod(&other.id).unwrap();
    }
    assert_eq!(pod.exec("exit 4").code, 4);
}

#[test]
fn pod_is_removed_while_it_runs() {
    let pod = POD.case();
    let mut kubelet = Kubelet::new("forced");
    let other = kubelet.run_pod("forced");
    let container = kubelet.run(&other, "main", &IDLE);
    kubelet.try_remove_pod(&other.id).unwrap();
    assert_eq!(
        kubelet.try_status(&container).unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(pod.exec("exit 4").code, 4);
}

#[test]
fn status_of_what_is_not_there_is_not_found() {
    let pod = POD.case();
    assert_eq!(
        pod.kubelet.try_status(NOTHING).unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        pod.kubelet.try_pod_status(NOTHING).unwrap_err().code(),
        Code::NotFound
    );
}

#[test]
fn exec_and_start_of_what_is_not_there_are_not_found() {
    let pod = POD.case();
    let exec = pod.kubelet.exec_within(NOTHING, &["true"], Duration::ZERO);
    assert_eq!(exec.unwrap_err().code(), Code::NotFound);
    assert_eq!(
        pod.kubelet.try_start(NOTHING).unwrap_err().code(),
        Code::NotFound
    );
}

#[test]
fn container_in_a_pod_that_is_not_there_is_refused() {
    let pod = POD.case();
    let mut elsewhere = pod.pod.clone();
    elsewhere.id = NOTHING.to_owned();
    let error = pod
        .kubelet
        .create_with(&elsewhere, "lost", 0, &IDLE, |_| ());
    assert!(error.unwrap_err().message().contains(NOTHING));
}

#[test]
fn container_in_a_pod_that_has_stopped_is_refused() {
    let _pod = POD.case();
    let mut kubelet = Kubelet::new("stopped-pod");
    let other = kubelet.run_pod("stopped-pod");
    let made = kubelet.create(&other, "early", 0, &IDLE);
    kubelet.stop_pod(&other);
    let message = kubelet.try_start(&made).unwrap_err().message().to_owned();
    assert!(message.contains("is not running"), "{message}");
}
