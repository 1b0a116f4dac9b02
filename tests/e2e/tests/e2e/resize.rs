// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A pod whose limits change gets another VM without getting another VM: processors and memory come and go.

use std::fs;
use std::thread;

use e2e::{Node, eventually, named, parent_of};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::{Kubelet, Pod, resources};

const MIB: i64 = 1 << 20;

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A pod with one container of these limits, in a VM made for them.
fn start(kubelet: &mut Kubelet, name: &str, memory: i64, quota: i64) -> (Pod, String) {
    let pod = kubelet
        .run_pod_with(name, |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(memory, quota));
        })
        .unwrap();
    let container = kubelet
        .create_with(&pod, "main", 0, &["sleep", "infinity"], |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(memory, quota));
        })
        .unwrap();
    kubelet.start(&container);
    (pod, container)
}

fn number(kubelet: &Kubelet, container: &str, script: &str) -> i64 {
    let executed = kubelet.exec(container, &sh(script));
    assert_eq!(executed.code, 0, "{executed:?}");
    executed.stdout.trim().parse().unwrap()
}

fn processors(kubelet: &Kubelet, container: &str) -> i64 {
    number(kubelet, container, "nproc")
}

/// The memory of the guest's kernel in MiB: what the VM has, less what the kernel has taken for itself.
fn memory(kubelet: &Kubelet, container: &str) -> i64 {
    let script = "awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    number(kubelet, container, script)
}

fn resident_mib(pid: i32) -> i64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.unwrap().parse::<i64>().unwrap() / 1024
}

#[test]
fn processors_come_and_go_with_the_cpu_limit() {
    let _node = Node::new("processors_come_and_go_with_the_cpu_limit");
    let mut kubelet = Kubelet::new("resize-processors");
    let (_pod, container) = start(&mut kubelet, "resize-processors", 0, 100_000);
    assert_eq!(processors(&kubelet, &container), 1);
    kubelet.update(&container, resources(0, 150_000)).unwrap();
    assert_eq!(processors(&kubelet, &container), 2);
    let both = "for i in 0 1; do taskset -c $i sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done' || exit 1; done";
    let executed = kubelet.exec(&container, &sh(both));
    assert_eq!(executed.code, 0, "both run programs: {executed:?}");
    kubelet.update(&container, resources(0, 50_000)).unwrap();
    assert_eq!(processors(&kubelet, &container), 1);
    // It started with one, and has three spare ones.
    let refused = kubelet.update(&container, resources(0, 500_000));
    let message = refused.err().unwrap().message().to_owned();
    assert!(
        message.contains("make the pod anew with larger limits"),
        "{message}"
    );
    assert_eq!(processors(&kubelet, &container), 1);
}

#[test]
fn memory_comes_and_goes_with_the_memory_limit() {
    let _node = Node::new("memory_comes_and_goes_with_the_memory_limit");
    let mut kubelet = Kubelet::new("resize-vm-memory");
    // Grown by no more than three times what it starts with: all of that is movable, so all of it can come back.
    let (_pod, container) = start(&mut kubelet, "resize-vm-memory", 128 * MIB, 0);
    let vmm = named("coffer-vmm");
    let at_start = memory(&kubelet, &container);
    let allocate = sh("dd if=/dev/zero of=/dev/null bs=300M count=1");
    assert_ne!(kubelet.exec(&container, &allocate).code, 0);

    kubelet.update(&container, resources(512 * MIB, 0)).unwrap();
    let grown = memory(&kubelet, &container);
    assert!(
        (376..=392).contains(&(grown - at_start)),
        "{at_start} {grown}"
    );
    let executed = kubelet.exec(&container, &allocate);
    assert_eq!(
        executed.code, 0,
        "beyond what the VM had at all: {executed:?}"
    );

    let fill = sh("dd if=/dev/zero of=/fill bs=1M count=300 && sync");
    assert_eq!(kubelet.exec(&container, &fill).code, 0);
    let full = resident_mib(vmm[0]);
    assert!(full > 300, "{full}");
    kubelet.update(&container, resources(128 * MIB, 0)).unwrap();
    eventually("the guest gives its memory back", || {
        ((at_start - 8..=at_start + 8).contains(&memory(&kubelet, &container))).then_some(())
    });
    eventually("the host has it", || {
        (resident_mib(vmm[0]) < full - 200).then_some(())
    });
    assert_eq!(named("coffer-vmm"), vmm, "it is the same VM");
}

#[test]
fn memory_below_what_the_pod_started_with_is_given_back() {
    let _node = Node::new("memory_below_what_the_pod_started_with_is_given_back");
    let mut kubelet = Kubelet::new("resize-balloon");
    let (_pod, container) = start(&mut kubelet, "resize-balloon", 448 * MIB, 0);
    let at_start = memory(&kubelet, &container);
    kubelet.update(&container, resources(192 * MIB, 0)).unwrap();
    eventually("the guest does with 256 MiB less", || {
        ((250..=258).contains(&(at_start - memory(&kubelet, &container)))).then_some(())
    });
    kubelet.update(&container, resources(448 * MIB, 0)).unwrap();
    eventually("the guest has all of it again", || {
        (memory(&kubelet, &container) == at_start).then_some(())
    });
}

#[test]
fn ten_resizes_in_a_row_do_not_drift() {
    let _node = Node::new("ten_resizes_in_a_row_do_not_drift");
    let mut kubelet = Kubelet::new("resize-often");
    let (_pod, container) = start(&mut kubelet, "resize-often", 128 * MIB, 100_000);
    let vmm = named("coffer-vmm");
    let at_start = memory(&kubelet, &container);
    for round in 0..5 {
        let larger = resources((200 + 70 * round) * MIB, 200_000);
        kubelet.update(&container, larger).unwrap();
        assert_eq!(processors(&kubelet, &container), 2);
        kubelet
            .update(&container, resources(128 * MIB, 100_000))
            .unwrap();
        assert_eq!(processors(&kubelet, &container), 1);
    }
    eventually("the guest is as it was", || {
        ((at_start - 8..=at_start + 8).contains(&memory(&kubelet, &container))).then_some(())
    });
    assert_eq!(named("coffer-vmm"), vmm);
}

#[test]
fn vm_that_is_killed_while_it_is_resized_leaves_nothing() {
    let _node = Node::new("vm_that_is_killed_while_it_is_resized_leaves_nothing");
    let mut kubelet = Kubelet::new("resize-kill");
    let (_pod, container) = start(&mut kubelet, "resize-kill", 64 * MIB, 0);
    let vmm = Pid::from_raw(named("coffer-vmm")[0]);
    // A VMM that stands still holds the resize up.
    kill(vmm, Signal::SIGSTOP).unwrap();
    let resized = container.clone();
    let update = thread::spawn(move || {
        Kubelet::new("resize-kill-update").update(&resized, resources(512 * MIB, 0))
    });
    kill(vmm, Signal::SIGKILL).unwrap();
    assert!(update.join().unwrap().is_err());
    assert_eq!(kubelet.exit_code(&container), 137);
}

#[test]
fn every_thread_of_a_pod_is_in_the_pods_cgroup() {
    let _node = Node::new("every_thread_of_a_pod_is_in_the_pods_cgroup");
    let mut kubelet = Kubelet::new("threads");
    let (pod, container) = start(&mut kubelet, "threads", 0, 100_000);
    kubelet.update(&container, resources(0, 200_000)).unwrap();
    let vmm = named("coffer-vmm")[0];
    let shim = parent_of(vmm).unwrap();
    for process in [vmm, shim] {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
        for task in tasks.flatten() {
            // A thread may end meanwhile.
            let Ok(cgroup) = fs::read_to_string(task.path().join("cgroup")) else {
                continue;
            };
            assert!(
                cgroup.contains(&pod.id),
                "{}: {cgroup}",
                task.path().display()
            );
        }
    }
}
