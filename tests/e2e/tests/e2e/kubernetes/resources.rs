// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Requests and limits: what is set in the container's cgroup, and that it holds.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use e2e::named;
use k8s_cri::v1;

use super::client::{Ended, Running};
use super::shared::Shared;
use crate::cri_client::{Kubelet, resources};
use crate::volumes::{IDLE, PodDir, mount, sh};

static POD: Shared<Running> = Shared::new(|| Running::new("resources"));

/// A script's end under these limits.
fn limited(pod: &Running, name: &str, limits: v1::LinuxContainerResources, script: &str) -> Ended {
    pod.script(name, script, |config| {
        config.linux.as_mut().unwrap().resources = Some(limits);
    })
}

#[test]
fn cpu_limit_is_the_containers_quota() {
    let pod = POD.case();
    let ended = limited(
        &pod,
        "quota",
        resources(0, 50_000),
        "cat /sys/fs/cgroup/cpu.max",
    );
    assert_eq!(ended.stdout, "50000 100000\n");
}

#[test]
fn cpu_request_is_the_containers_weight() {
    let pod = POD.case();
    // As runc and crun convert: 1 + (shares - 2) * 9999 / 262142.
    for (name, shares, weight) in [("least", 2, 1), ("half", 512, 20), ("two", 2048, 79)] {
        let limits = v1::LinuxContainerResources {
            cpu_shares: shares,
            ..Default::default()
        };
        let ended = limited(&pod, name, limits, "cat /sys/fs/cgroup/cpu.weight");
        assert_eq!(ended.stdout, format!("{weight}\n"), "{shares} shares");
    }
}

#[test]
fn memory_limit_is_the_containers_maximum() {
    let pod = POD.case();
    let ended = limited(
        &pod,
        "maximum",
        resources(48 << 20, 0),
        "cat /sys/fs/cgroup/memory.max",
    );
    assert_eq!(ended.stdout, format!("{}\n", 48 << 20));
}

#[test]
fn container_without_limits_has_none() {
    let pod = POD.case();
    assert_eq!(
        pod.output("cd /sys/fs/cgroup && cat cpu.max memory.max"),
        "max 100000\nmax\n"
    );
}

#[test]
fn cpuset_is_the_containers() {
    let pod = POD.case();
    let limits = v1::LinuxContainerResources {
        cpuset_cpus: "0".to_owned(),
        ..Default::default()
    };
    let script = "cat /sys/fs/cgroup/cpuset.cpus; grep Cpus_allowed_list /proc/self/status";
    let ended = limited(&pod, "cpuset", limits, script);
    assert_eq!(ended.stdout, "0\nCpus_allowed_list:\t0\n");
}

#[test]
fn oom_score_adjustment_is_the_processs() {
    let pod = POD.case();
    let limits = v1::LinuxContainerResources {
        oom_score_adj: 999,
        ..Default::default()
    };
    let ended = limited(&pod, "score", limits, "cat /proc/self/oom_score_adj");
    assert_eq!(ended.stdout, "999\n");
}

/// A process's `oom_score_adj`, which is as before at the end.
struct OomScore {
    file: PathBuf,
    before: String,
}

impl OomScore {
    fn set(pid: i32, value: &str) -> Self {
        let file = oom_score_file(pid);
        let before = fs::read_to_string(&file).unwrap();
        fs::write(&file, value).unwrap();
        Self { file, before }
    }
}

impl Drop for OomScore {
    fn drop(&mut self) {
        fs::write(&self.file, self.before.trim()).unwrap();
    }
}

fn oom_score_file(pid: i32) -> PathBuf {
    format!("/proc/{pid}/oom_score_adj").into()
}

#[test]
fn vmm_is_to_the_nodes_oom_killer_what_the_pods_most_precious_container_is() {
    let _pod = POD.case();
    // The suite's containerd gives no container a lower value than its own.
    let _containerd = OomScore::set(named("containerd")[0], "-999");
    let dir = PodDir::new("precious");
    let claim = dir.claim("data");
    let mut kubelet = Kubelet::new("precious");
    let pod = kubelet.run_pod("precious");
    let of_the_pod = |program: &str| -> Vec<String> {
        let cgroup = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let mine = named(program).into_iter();
        mine.filter(|pid| cgroup(pid).contains(&pod.id))
            .map(|pid| fs::read_to_string(oom_score_file(pid)).unwrap())
            .collect()
    };
    assert_eq!(
        of_the_pod("coffer-vmm"),
        ["0\n"],
        "not the pause container's"
    );
    // BestEffort, Guaranteed and Burstable, as kubelet numbers them.
    for (name, value, expected) in [
        ("best-effort", 1000, "1000\n"),
        ("guaranteed", -997, "-997\n"),
        ("burstable", 500, "-997\n"),
    ] {
        let id = kubelet.run_with(&pod, name, &IDLE, |config| {
            config.mounts.push(mount(&claim, "/data", false));
            config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
                oom_score_adj: value,
                ..Default::default()
            });
        });
        let inside = kubelet.exec(&id, &sh("cat /proc/1/oom_score_adj")).stdout;
        assert_eq!(inside, format!("{value}\n"));
        for program in ["coffer-vmm", "coffer-virtiofsd"] {
            assert_eq!(of_the_pod(program), [expected], "{program} after {name}");
        }
    }
    assert_eq!(of_the_pod("containerd-shim-coffer-v2"), ["-1000\n"]);
}

#[test]
fn pids_limit_stops_a_fork_bomb_and_not_its_neighbour() {
    let pod = POD.case();
    let limits = v1::LinuxContainerResources {
        unified: HashMap::from([("pids.max".to_owned(), "16".to_owned())]),
        ..Default::default()
    };
    let script = "cat /sys/fs/cgroup/pids.max; (for i in $(seq 1 40); do sleep 100 >/dev/null 2>&1 & done) 2>&1 | grep -c -i 'resource'; \
                  cat /sys/fs/cgroup/pids.events";
    let ended = limited(&pod, "bomb", limits, script);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.first(), Some(&"16"), "{ended:?}");
    let refused: u32 = lines
        .last()
        .unwrap()
        .trim_start_matches("max ")
        .parse()
        .unwrap();
    assert!(refused > 0, "{ended:?}");
    assert_eq!(
        pod.output("for i in $(seq 1 40); do sleep 0.2 & done; wait; echo all"),
        "all\n"
    );
}

#[test]
fn allocation_within_the_limit_succeeds_and_beyond_it_is_killed() {
    let pod = POD.case();
    let allocate =
        |mib: u32| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null; echo $?");
    let within = limited(&pod, "within", resources(96 << 20, 0), &allocate(60));
    assert_eq!(within.stdout, "0\n");
    let beyond = limited(&pod, "beyond", resources(32 << 20, 0), &allocate(60));
    assert_eq!(beyond.stdout, "137\n");
}

#[test]
fn container_whose_first_process_runs_out_of_memory_is_oom_killed() {
    let pod = POD.case();
    let command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1"];
    let id = pod.kubelet.run_with(&pod.pod, "oom", &command, |config| {
        config.linux.as_mut().unwrap().resources = Some(resources(24 << 20, 0));
    });
    assert_eq!(pod.kubelet.exit_code(&id), 137);
    assert_eq!(pod.kubelet.status(&id).reason, "OOMKilled");
    assert_eq!(pod.exec("exit 2").code, 2, "the neighbour runs on");
    pod.kubelet.remove(&id);
}

#[test]
fn memory_of_an_emptydir_in_memory_counts_for_who_writes_it() {
    let pod = POD.case();
    let limits = resources(32 << 20, 0);
    let script =
        "dd if=/dev/zero of=/dev/shm/fill bs=1M count=48 2>/dev/null; echo $?; rm -f /dev/shm/fill";
    let ended = limited(&pod, "writer", limits, script);
    assert_eq!(ended.stdout, "137\n");
}

#[test]
fn container_has_a_cgroup_of_its_own_for_its_root() {
    let pod = POD.case();
    assert_eq!(pod.output("cat /proc/self/cgroup"), "0::/\n");
    let inside = pod.output("cat /sys/fs/cgroup/cgroup.procs | head -1");
    assert_eq!(inside, "1\n");
}

#[test]
fn limits_that_change_are_told_by_the_status_and_hold() {
    let pod = POD.case();
    let id = pod.kubelet.run_with(&pod.pod, "changed", &IDLE, |config| {
        config.linux.as_mut().unwrap().resources = Some(resources(40 << 20, 30_000));
    });
    pod.kubelet
        .update(&id, resources(56 << 20, 70_000))
        .unwrap();
    let read = "cd /sys/fs/cgroup && cat memory.max cpu.max";
    let seen = pod.kubelet.exec(&id, &sh(read)).stdout;
    assert_eq!(seen, format!("{}\n70000 100000\n", 56 << 20));
    let weight = v1::LinuxContainerResources {
        cpu_shares: 2048,
        ..Default::default()
    };
    pod.kubelet.update(&id, weight).unwrap();
    let seen = pod
        .kubelet
        .exec(&id, &sh("cd /sys/fs/cgroup && cat cpu.weight memory.max"))
        .stdout;
    assert_eq!(
        seen,
        format!("79\n{}\n", 56 << 20),
        "what is not named stays"
    );
    pod.discard(&id);
}

#[test]
fn processors_of_a_pod_are_its_containers_limits_together() {
    let _pod = POD.case();
    let mut kubelet = Kubelet::new("processors");
    // Two containers with 500m and 1200m: kubelet gives the sum.
    let change = |config: &mut v1::PodSandboxConfig| {
        config.linux.as_mut().unwrap().resources = Some(resources(128 << 20, 170_000));
    };
    let pod = kubelet.run_pod_with("processors", change).unwrap();
    for (name, quota) in [("one", 50_000), ("two", 120_000)] {
        let id = kubelet.run_with(&pod, name, &IDLE, |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(64 << 20, quota));
        });
        let seen = kubelet
            .exec(&id, &sh("nproc; cat /sys/fs/cgroup/cpu.max"))
            .stdout;
        assert_eq!(seen, format!("2\n{quota} 100000\n"));
    }
}
