// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a container uses and may use, while it runs: pause and resume, figures against the truth, limits that change.

use std::fs;
use std::io::{BufRead, BufReader};
use std::sync::mpsc::channel;
use std::thread;

use e2e::{Container, Node, eventually, metrics, named, run, spawn};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::{Kubelet, resources};

const MIB: u64 = 1 << 20;

/// Uses a processor for three seconds, and says in the form of POSIX's `time -p` how much of it.
const BURN: &str = "time -p timeout 3 sh -c 'while :; do :; done'";

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// The seconds on the processor of what `time -p` has timed: its lines "user 2.98" and "sys 0.01".
fn processor_seconds(timed: &str) -> f64 {
    let lines = timed.lines().filter_map(|line| line.split_once(' '));
    lines
        .filter(|(name, _)| ["user", "sys"].contains(name))
        .map(|(_, seconds)| seconds.trim().parse::<f64>().unwrap())
        .sum()
}

/// The seconds of one line of the shell's `times`: "0m1.25s 0m0.50s".
fn seconds(times: &str) -> f64 {
    let part = |text: &str| -> f64 {
        let (minutes, seconds) = text.trim_end_matches('s').split_once('m').unwrap();
        minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap()
    };
    times.split_whitespace().map(part).sum()
}

/// Whether `figure` is within 5 % of the truth.
#[track_caller]
pub(crate) fn assert_close(figure: f64, truth: f64, what: &str) {
    assert!(
        (figure / truth - 1.0).abs() <= 0.05,
        "{what}: {figure} is not within 5 % of {truth}"
    );
}

#[test]
fn paused_container_uses_no_processor_until_it_is_resumed() {
    let _node = Node::new("paused_container_uses_no_processor_until_it_is_resumed");
    let container = Container::start("paused", &sh("while :; do :; done"));
    let used = || container.metrics()["cpu.usage_usec"];
    let first = used();
    eventually("a busy container uses the processor", || {
        (used() > first).then_some(())
    });
    container.pause().success();
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    let frozen = used();
    assert_eq!(used(), frozen, "a frozen container uses nothing");
    let refused = container.exec("probe", &["true"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("paused"),
        "{refused:?}"
    );
    assert_ne!(container.pause().code, 0, "it is paused already");
    container.resume().success();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    eventually("a resumed container goes on", || {
        (used() > frozen).then_some(())
    });
    assert_eq!(container.exec("after", &sh("exit 7")).code, 7);
    assert_ne!(container.resume().code, 0, "it is not paused");
}

#[test]
fn paused_container_is_killed() {
    let _node = Node::new("paused_container_is_killed");
    let container = Container::start("paused-kill", &["sleep", "infinity"]);
    container.pause().success();
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
}

#[test]
fn pause_and_resume_are_told_to_whoever_listens() {
    let _node = Node::new("pause_and_resume_are_told_to_whoever_listens");
    let container = Container::start("paused-events", &["sleep", "infinity"]);
    let mut listener = spawn("ctr", &["events"]);
    let output = BufReader::new(listener.stdout.take().unwrap());
    let (sender, lines) = channel();
    let reader = thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            let _test_over = sender.send(line);
        }
    });
    // `ctr events` does not say from when on it listens: the pauses go on until it has heard of one.
    let mut topics = Vec::new();
    eventually("containerd tells of a pause and of its end", || {
        container.pause().success();
        container.resume().success();
        let heard = lines
            .try_iter()
            .filter(|line| line.contains(container.id()));
        topics.extend(heard.filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words
                .into_iter()
                .find(|word| word.starts_with("/tasks/"))
                .map(str::to_owned)
        }));
        topics
            .iter()
            .any(|topic| topic == "/tasks/resumed")
            .then_some(())
    });
    let paused = topics.iter().position(|topic| topic == "/tasks/paused");
    assert!(paused.is_some(), "{topics:?}");
    listener.kill().unwrap();
    listener.wait().unwrap();
    reader.join().unwrap();
}

#[test]
fn checkpoint_says_why_there_is_none_and_leaves_the_container_running() {
    let _node = Node::new("checkpoint_says_why_there_is_none_and_leaves_the_container_running");
    let container = Container::start("checkpoint", &["sleep", "infinity"]);
    let refused = run("ctr", &["task", "checkpoint", container.id()]);
    assert_ne!(refused.code, 0);
    assert!(
        refused
            .stderr
            .contains("a microVM's state cannot be saved yet"),
        "{refused:?}"
    );
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
}

#[test]
fn processor_time_is_what_the_process_itself_has_measured() {
    let _node = Node::new("processor_time_is_what_the_process_itself_has_measured");
    let mut kubelet = Kubelet::new("burn");
    let pod = kubelet.run_pod("burn");
    // An exec that starts it would be counted, and so would a program that times it; a signal and a builtin cost nothing.
    let script = "trap 'go=1' USR1; sleep infinity & echo ready; while [ -z \"$go\" ]; do wait; done; \
                  times; i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; times; echo done; wait";
    let container = kubelet.run(&pod, "burner", &sh(script));
    let log = || kubelet.log("burner", 0, "stdout");
    eventually("the container to be ready", || {
        log().contains("ready").then_some(())
    });
    let used = || metrics("k8s.io", &container)["cpu.usage_usec"];
    let before = used();
    let signal = ["-n", "k8s.io", "task", "kill", "-s", "SIGUSR1", &container];
    eventually("the container to begin", || {
        run("ctr", &signal).success();
        log().contains("0m").then_some(())
    });
    eventually("the container to be done", || {
        log().contains("done").then_some(())
    });
    let burnt = f64::from(u32::try_from(used() - before).unwrap()) / 1e6;
    let log = log();
    // Of each pair of lines, the first is the shell's own.
    let mut times = log.lines().filter(|line| line.starts_with("0m")).step_by(2);
    let begin = seconds(times.next().unwrap());
    let truth = seconds(times.next().unwrap()) - begin;
    assert!(truth > 1.0, "{log:?}");
    assert_close(burnt, truth, "seconds on the processor");
}

#[test]
fn memory_is_what_was_allocated() {
    let _node = Node::new("memory_is_what_was_allocated");
    let container = Container::start("allocate", &["sleep", "infinity"]);
    let used = || container.metrics()["memory.usage"];
    container
        .exec("warm", &sh("echo > /dev/shm/small"))
        .success();
    let before = used();
    let fill = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=48";
    container.exec("fill", &sh(fill)).success();
    let grown = used().saturating_sub(before);
    let mib = f64::from(u32::try_from(grown >> 10).unwrap()) / 1024.0;
    assert_close(mib, 48.0, "MiB");
    container.exec("free", &["rm", "/dev/shm/fill"]).success();
    eventually("freed memory is no longer counted", || {
        (used() < before + 5 * MIB).then_some(())
    });
}

#[test]
fn processes_are_counted() {
    let _node = Node::new("processes_are_counted");
    let script = "for i in 1 2 3 4; do sleep infinity & done; wait";
    let container = Container::start("count", &sh(script));
    eventually("a shell and four children are five", || {
        (container.metrics()["pids.current"] == 5).then_some(())
    });
}

#[test]
fn figures_of_a_vm_that_stands_still_are_the_last_known() {
    let _node = Node::new("figures_of_a_vm_that_stands_still_are_the_last_known");
    let container = Container::start("still", &["sleep", "infinity"]);
    let before = container.metrics();
    let vmm = Pid::from_raw(named("coffer-vmm")[0]);
    kill(vmm, Signal::SIGSTOP).unwrap();
    let still = container.metrics();
    kill(vmm, Signal::SIGCONT).unwrap();
    assert_eq!(still, before);
    assert_eq!(container.exec("after", &sh("exit 5")).code, 5);
}

#[test]
fn figures_of_the_sandbox_are_those_of_the_pods_host_processes() {
    let _node = Node::new("figures_of_the_sandbox_are_those_of_the_pods_host_processes");
    let mut kubelet = Kubelet::new("pod-stats");
    let pod = kubelet.run_pod("pod-stats");
    kubelet.run(&pod, "main", &["sleep", "infinity"]);
    let vmm = named("coffer-vmm")[0];
    let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.unwrap().parse().unwrap()
    };
    let own = field("RssAnon:") + field("RssShmem:");
    let figures = metrics("k8s.io", &pod.id);
    assert!(
        figures["memory.usage"] >> 10 >= own * 9 / 10,
        "{own} KiB of the VMM alone: {figures:?}"
    );
    assert!(
        figures["pids.current"] > field("Threads:"),
        "the VMM's threads and the shim: {figures:?}"
    );
    assert!(figures["cpu.usage_usec"] > 0, "{figures:?}");
}

#[test]
fn memory_limit_changes_in_place() {
    let _node = Node::new("memory_limit_changes_in_place");
    let mut kubelet = Kubelet::new("resize-memory");
    let pod = kubelet
        .run_pod_with("resize-memory", |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(256 << 20, 0));
        })
        .unwrap();
    let container = kubelet
        .create_with(&pod, "main", 0, &["sleep", "infinity"], |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(32 << 20, 0));
        })
        .unwrap();
    kubelet.start(&container);
    let vmm = named("coffer-vmm");
    let use_80_mib = sh("dd if=/dev/zero of=/dev/null bs=80M count=1");
    assert_ne!(kubelet.exec(&container, &use_80_mib).code, 0);
    kubelet.update(&container, resources(128 << 20, 0)).unwrap();
    let executed = kubelet.exec(&container, &use_80_mib);
    assert_eq!(executed.code, 0, "{executed:?}");
    kubelet.update(&container, resources(32 << 20, 0)).unwrap();
    assert_ne!(kubelet.exec(&container, &use_80_mib).code, 0);

    let refused = kubelet.update(&container, resources(1 << 40, 0));
    let message = refused.err().unwrap().message().to_owned();
    assert!(
        message.contains("make the pod anew with larger limits"),
        "{message}"
    );
    assert_eq!(kubelet.exec(&container, &["true"]).code, 0);
    assert_eq!(
        named("coffer-vmm"),
        vmm,
        "neither VM nor container restarts"
    );
}

#[test]
fn processor_limit_changes_in_place() {
    let _node = Node::new("processor_limit_changes_in_place");
    let mut kubelet = Kubelet::new("resize-cpu");
    let pod = kubelet.run_pod("resize-cpu");
    let container = kubelet
        .create_with(&pod, "main", 0, &["sleep", "infinity"], |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(0, 20_000));
        })
        .unwrap();
    kubelet.start(&container);
    let burnt = || processor_seconds(&kubelet.exec(&container, &sh(BURN)).stderr);
    let limited = burnt();
    assert!(limited < 1.2, "a fifth of a processor: {limited} s of 3 s");
    kubelet.update(&container, resources(0, 100_000)).unwrap();
    let free = burnt();
    assert!(free > 2.0, "a whole processor: {free} s of 3 s");
}
