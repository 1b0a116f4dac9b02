// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Figures as kubelet, and through it the metrics server, asks for them.

use std::collections::HashMap;

use k8s_cri::v1;

use super::client::{Running, until};
use super::shared::Shared;
use crate::volumes::{IDLE, sh};

static POD: Shared<Running> = Shared::new(|| Running::new("stats-pod"));

fn labelled(pod: &Running, name: &str, value: &str) -> String {
    pod.kubelet.run_with(&pod.pod, name, &IDLE, |config| {
        config.labels = HashMap::from([("tier".to_owned(), value.to_owned())]);
    })
}

#[test]
fn figures_name_their_container() {
    let pod = POD.case();
    let id = labelled(&pod, "named", "front");
    let attributes = pod.kubelet.stats(&id).attributes.unwrap();
    assert_eq!(attributes.id, id);
    assert_eq!(attributes.metadata.unwrap().name, "named");
    assert_eq!(attributes.labels["tier"], "front");
    pod.discard(&id);
}

#[test]
fn figures_are_listed_by_pod_id_and_label() {
    let pod = POD.case();
    let front = labelled(&pod, "front", "front");
    let back = labelled(&pod, "back", "back");
    let of_pod = || v1::ContainerStatsFilter {
        pod_sandbox_id: pod.pod.id.clone(),
        ..Default::default()
    };
    assert_eq!(pod.kubelet.list_stats(of_pod()), ["back", "front", "main"]);
    let by_id = v1::ContainerStatsFilter {
        id: back.clone(),
        ..Default::default()
    };
    assert_eq!(pod.kubelet.list_stats(by_id), ["back"]);
    let by_label = v1::ContainerStatsFilter {
        label_selector: HashMap::from([("tier".to_owned(), "front".to_owned())]),
        ..of_pod()
    };
    assert_eq!(pod.kubelet.list_stats(by_label), ["front"]);
    pod.discard(&front);
    pod.discard(&back);
}

#[test]
fn container_that_has_ended_has_no_figures() {
    let pod = POD.case();
    let ended = pod.kubelet.run(&pod.pod, "ended", &["true"]);
    assert_eq!(pod.kubelet.exit_code(&ended), 0);
    assert_eq!(pod.kubelet.measured(&pod.pod), [pod.main.as_str()]);
    pod.kubelet.remove(&ended);
}

#[test]
fn processor_time_of_a_container_only_grows() {
    let pod = POD.case();
    let used = || pod.kubelet.stats(&pod.main).cpu.unwrap();
    let mut last = used();
    for _ in 0..3 {
        pod.output("i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done");
        let now = used();
        let time = |cpu: &v1::CpuUsage| cpu.usage_core_nano_seconds.unwrap().value;
        assert!(time(&now) > time(&last), "{now:?} after {last:?}");
        assert!(now.timestamp > last.timestamp, "{now:?} after {last:?}");
        last = now;
    }
}

#[test]
fn working_set_is_usage_without_the_cache_that_can_go() {
    let pod = POD.case();
    // Twice what the container itself needs, once read and not used again.
    pod.output("dd if=/dev/zero of=/file bs=1M count=16 2>/dev/null; sync; cat /file > /dev/null");
    let memory = pod.kubelet.stats(&pod.main).memory.unwrap();
    let stat = pod.output("cat /sys/fs/cgroup/memory.stat");
    let of_stat = |name: &str| -> u64 {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().parse().unwrap()
    };
    let usage = memory.usage_bytes.unwrap().value;
    let working = memory.working_set_bytes.unwrap().value;
    let inactive = of_stat("inactive_file");
    assert!(inactive >= 12 << 20, "{stat}");
    let cache = usage - working;
    assert!(
        cache.abs_diff(inactive) < 2 << 20,
        "{cache} is not {inactive}"
    );
    pod.output("rm /file");
}

#[test]
fn figures_are_there_while_the_container_is_busy() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run(&pod.pod, "busy", &sh("while :; do :; done"));
    let used = || {
        pod.kubelet
            .stats(&id)
            .cpu
            .unwrap()
            .usage_core_nano_seconds
            .unwrap()
            .value
    };
    let first = used();
    until("they grow by half a second of processor", || {
        used() > first + 500_000_000
    });
    pod.discard(&id);
}
