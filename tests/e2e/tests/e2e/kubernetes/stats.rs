// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Figures as kubelet, and through it the metrics server, asks for them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use containerd_shim_protos::api::StatsRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use e2e::DEADLINE;
use k8s_cri::v1;
use ttrpc::context::with_duration;

use super::client::{Running, until};
use super::shared::Shared;
use crate::cri_client::resources;
use crate::volumes::{IDLE, PodDir, mount, sh};

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

/// All figures of a container, as its shim gives them to containerd: CRI and `ctr` have room for the fewest.
fn figures(pod: &Running, container: &str) -> Metrics {
    let bundle = Path::new("/run/containerd/io.containerd.runtime.v2.task/k8s.io");
    let address = fs::read_to_string(bundle.join(&pod.pod.id).join("address")).unwrap();
    let request = StatsRequest {
        id: container.to_owned(),
        ..Default::default()
    };
    let answer = pod.kubelet.runtime.block_on(async {
        let client = TaskClient::new(Client::connect(address.trim()).await.unwrap());
        client.stats(with_duration(DEADLINE), &request).await
    });
    Metrics::parse_from_bytes(&answer.unwrap().stats.value).unwrap()
}

/// The number behind a name in a file of the container's cgroup.
fn number(text: &str, name: &str) -> u64 {
    let mut words = text.split([' ', '=', '\n']);
    words.find(|word| *word == name);
    words.next().unwrap().parse().unwrap()
}

#[test]
fn throttling_written_bytes_and_pressure_are_the_cgroups() {
    const WRITTEN: u64 = 4 << 20;
    let pod = POD.case();
    let dir = PodDir::new("stats-pod");
    let volume = dir.empty_dir("written");
    // A fifth of a processor: for each second on it, four of waiting.
    let script = "i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done; \
                  dd if=/dev/zero of=/v/file bs=1M count=4 conv=fsync 2>/dev/null; echo done; exec sleep infinity";
    let id = pod
        .kubelet
        .run_with(&pod.pod, "throttled", &sh(script), |config| {
            config.mounts = vec![mount(&volume, "/v", false)];
            config.linux.as_mut().unwrap().resources = Some(resources(0, 20_000));
        });
    pod.kubelet.logs("throttled", 0, "done");
    let read = |file: &str| {
        let path = format!("/sys/fs/cgroup/{file}");
        pod.kubelet.exec(&id, &["cat", &path]).stdout
    };
    // The kernel adds pressure up every two seconds.
    until("there is pressure", || {
        number(&read("cpu.pressure"), "total") > 0
    });
    let cgroup = || (read("cpu.stat"), read("cpu.pressure"));
    let (before, seen, after) = (cgroup(), figures(&pod, &id), cgroup());
    for (name, seen) in [
        ("nr_periods", seen.cpu.nr_periods),
        ("nr_throttled", seen.cpu.nr_throttled),
        ("throttled_usec", seen.cpu.throttled_usec),
    ] {
        let bounds = number(&before.0, name)..=number(&after.0, name);
        assert!(
            bounds.contains(&seen),
            "{name}: {seen} is not in {bounds:?}"
        );
    }
    let bounds = number(&before.1, "total")..=number(&after.1, "total");
    let pressure = seen.cpu.psi.some.total;
    assert!(
        bounds.contains(&pressure),
        "{pressure} is not in {bounds:?}"
    );
    assert!(
        seen.cpu.throttled_usec > 2 * seen.cpu.usage_usec,
        "{:?}",
        seen.cpu
    );
    let written: u64 = seen.io.usage.iter().map(|disk| disk.wbytes).sum();
    assert!(
        (WRITTEN..=WRITTEN + WRITTEN / 4).contains(&written),
        "{written} bytes: {:?}",
        seen.io
    );
    pod.discard(&id);
}
