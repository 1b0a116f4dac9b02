// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers that end and are made again in the same pod, and pods whose containers are all done.

use std::time::Duration;

use k8s_cri::v1;

use super::client::{Running, until};
use super::shared::Shared;
use crate::cri_client::resources;
use crate::volumes::sh;

static POD: Shared<Running> = Shared::new(|| Running::new("restarts"));

#[test]
fn container_whose_liveness_probe_fails_is_killed_and_made_again() {
    let pod = POD.case();
    let script = sh("echo started; touch /healthy; sleep infinity");
    let mut previous = String::new();
    for attempt in 0..2 {
        let id = pod.kubelet.create(&pod.pod, "live", attempt, &script);
        pod.kubelet.start(&id);
        let probe = || pod.kubelet.exec(&id, &["test", "-e", "/healthy"]).code;
        until("the container is healthy", || probe() == 0);
        pod.kubelet.exec(&id, &["rm", "/healthy"]);
        assert_eq!(probe(), 1);
        pod.kubelet.stop(&id, Duration::ZERO);
        assert_eq!(pod.kubelet.exit_code(&id), 137);
        assert_ne!(id, previous);
        pod.kubelet.logs("live", attempt, "started\n");
        pod.kubelet.remove(&id);
        previous = id;
    }
}

#[test]
fn crash_loop_gives_every_attempts_own_code() {
    let pod = POD.case();
    for attempt in 0..6 {
        let code = i32::try_from(attempt).unwrap() + 10;
        let id = pod
            .kubelet
            .create(&pod.pod, "loop", attempt, &sh(&format!("exit {code}")));
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), code);
        pod.kubelet.remove(&id);
    }
    assert_eq!(pod.exec("exit 8").code, 8, "the neighbour has run on");
}

#[test]
fn container_that_ran_out_of_memory_runs_again_with_more() {
    let pod = POD.case();
    let run = |attempt: u32, limit: i64| {
        let command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=40M", "count=1"];
        let change = |config: &mut v1::ContainerConfig| {
            config.linux.as_mut().unwrap().resources = Some(resources(limit, 0));
        };
        let id = pod
            .kubelet
            .create_with(&pod.pod, "hungry", attempt, &command, change)
            .unwrap();
        pod.kubelet.start(&id);
        let code = pod.kubelet.exit_code(&id);
        let reason = pod.kubelet.status(&id).reason;
        pod.kubelet.remove(&id);
        (code, reason)
    };
    assert_eq!(run(0, 16 << 20), (137, "OOMKilled".to_owned()));
    assert_eq!(run(1, 64 << 20), (0, "Completed".to_owned()));
}

#[test]
fn restarted_container_has_the_pods_address_and_name() {
    let pod = POD.case();
    let mut seen = Vec::new();
    for attempt in 0..2 {
        let script =
            sh("hostname; ip -o -4 addr show dev eth0 | tr -s ' ' | cut -d' ' -f4; echo @end");
        let id = pod.kubelet.create(&pod.pod, "same", attempt, &script);
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), 0);
        pod.kubelet.logs("same", attempt, "@end");
        seen.push(pod.kubelet.log("same", attempt, "stdout"));
        pod.kubelet.remove(&id);
    }
    assert_eq!(
        seen[0],
        format!("restarts\n{}/16\n@end\n", pod.kubelet.pod_ip(&pod.pod))
    );
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn restarted_container_has_none_of_the_firsts_files_and_processes() {
    let pod = POD.case();
    for attempt in 0..2 {
        let script = sh(
            "ls /left /tmp/left 2>/dev/null; cat /proc/[0-9]*/comm | grep -c '^sleep$'; \
                         touch /left /tmp/left; sleep 1000 & exit 1",
        );
        let id = pod.kubelet.create(&pod.pod, "fresh", attempt, &script);
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), 1);
        pod.kubelet.logs("fresh", attempt, "0\n");
        assert_eq!(pod.kubelet.log("fresh", attempt, "stdout"), "0\n");
        pod.kubelet.remove(&id);
    }
}

#[test]
fn job_that_is_done_leaves_its_pod_ready() {
    let pod = POD.case();
    let ended = pod.script(
        "job",
        "seq 1 100 | awk '{ sum += $1 } END { print sum }'",
        |_| (),
    );
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "5050\n"));
    let ready = i32::from(v1::PodSandboxState::SandboxReady);
    assert_eq!(pod.kubelet.pod_state(&pod.pod), ready);
}

#[test]
fn container_restarts_with_what_its_spec_has_become() {
    let pod = POD.case();
    for (attempt, colour) in [(0, "red"), (1, "blue")] {
        let change = |config: &mut v1::ContainerConfig| {
            config.envs = vec![v1::KeyValue {
                key: "COLOUR".to_owned(),
                value: colour.to_owned(),
            }];
        };
        let id = pod
            .kubelet
            .create_with(&pod.pod, "changed", attempt, &sh("echo $COLOUR"), change)
            .unwrap();
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), 0);
        pod.kubelet.logs("changed", attempt, &format!("{colour}\n"));
        pod.kubelet.remove(&id);
    }
}
