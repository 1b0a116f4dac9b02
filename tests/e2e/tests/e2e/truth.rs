// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Figures over CRI against what was measured by other means.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use e2e::{DEADLINE, Node, eventually, metrics, named};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::complaints::PodCgroup;
use crate::cri_client::Kubelet;
use crate::resources::assert_close;
use crate::volumes::{IDLE, PodDir, mount, output, run_with, sh};

const MIB: f64 = 1_048_576.0;
/// Bytes over the network in each direction.
const PAYLOAD: usize = 16 << 20;

fn float(number: u64) -> f64 {
    // Exact up to 2^53, far beyond any figure here.
    number.to_string().parse().unwrap()
}

/// Waits, uses the processor, and waits again, while it is the container's only process and says before and after what it
/// has used (POSIX `times`: a line of its own time, a line of its children's).
const BURN: &str = "read go < /s/begin; times; i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done; times; read go < /s/end";

/// The seconds in a line of `times`: "0m1.230s 0m0.040s".
fn seconds(line: &str) -> f64 {
    let time = |word: &str| -> f64 {
        let (minutes, seconds) = word.split_once('m').unwrap();
        let seconds: f64 = seconds.trim_end_matches('s').parse().unwrap();
        minutes.parse::<f64>().unwrap() * 60.0 + seconds
    };
    line.split_whitespace().map(time).sum()
}

#[test]
fn processor_time_over_cri_is_what_the_process_has_measured_and_never_falls() {
    let _node =
        Node::new("processor_time_over_cri_is_what_the_process_has_measured_and_never_falls");
    let dir = PodDir::new("truth-cpu");
    let mut kubelet = Kubelet::new("truth-cpu");
    let pod = kubelet.run_pod("truth-cpu");
    let shared = dir.empty_dir("shared");
    let with = |name: &str, command: &[&str]| {
        run_with(
            &kubelet,
            &pod,
            name,
            command,
            vec![mount(&shared, "/s", false)],
        )
    };
    let hand = with("hand", &IDLE);
    output(&kubelet, &hand, "mkfifo /s/begin /s/end");
    let main = with("main", &sh(BURN));
    let used = || kubelet.usage(&main).0;
    let settled = || {
        let mut last = used();
        eventually("it waits", || {
            let before = std::mem::replace(&mut last, used());
            (last == before).then_some(last)
        })
    };
    let before = settled();
    output(&kubelet, &hand, "echo > /s/begin");
    let mut samples = Vec::new();
    let log = eventually("it has used the processor", || {
        samples.push((used(), metrics("k8s.io", &main)["cpu.usage_usec"]));
        let log = kubelet.log("main", 0, "stdout");
        (log.lines().count() == 4).then_some(log)
    });
    let after = settled();
    let lines: Vec<f64> = log.lines().map(seconds).collect();
    let truth = lines[2] - lines[0];
    assert!(truth > 0.5, "{log}");
    assert_close(
        float(after - before) / 1e9,
        truth,
        "seconds on the processor",
    );
    assert!(
        samples.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1),
        "{samples:?}"
    );
    assert_eq!(kubelet.usages_in_list([&main]), [after], "it waits again");
    assert_eq!(metrics("k8s.io", &main)["cpu.usage_usec"], after / 1000);
    output(&kubelet, &hand, "echo > /s/end");
    assert_eq!(kubelet.exit_code(&main), 0);
}

#[test]
fn memory_over_cri_is_what_was_touched() {
    let _node = Node::new("memory_over_cri_is_what_was_touched");
    let mut kubelet = Kubelet::new("truth-memory");
    let pod = kubelet.run_pod("truth-memory");
    let main = kubelet.run(&pod, "main", &IDLE);
    output(&kubelet, &main, "echo > /dev/shm/small");
    let working_set = || kubelet.usage(&main).1;
    let before = working_set();
    output(
        &kubelet,
        &main,
        "dd if=/dev/zero of=/dev/shm/fill bs=1M count=60 2>&1",
    );
    let grown = working_set().saturating_sub(before);
    assert_close(float(grown) / MIB, 60.0, "MiB of the working set");
    output(&kubelet, &main, "rm /dev/shm/fill");
    eventually("freed memory is no longer counted", || {
        (working_set() < before + (3 << 20)).then_some(())
    });
}

#[test]
fn bytes_of_the_network_are_what_both_ends_have_counted() {
    let _node = Node::new("bytes_of_the_network_are_what_both_ends_have_counted");
    // containerd has figures of a pod only where the kubelet has made a cgroup for it.
    let _cgroup = PodCgroup::new("truth-network", 1 << 30);
    let mut kubelet = Kubelet::new("truth-network");
    let pod = kubelet
        .run_pod_with("truth-network", |config| {
            config.linux.as_mut().unwrap().cgroup_parent = "/truth-network".to_owned();
        })
        .unwrap();
    let address = kubelet.pod_ip(&pod);
    let main = kubelet.run(
        &pod,
        "main",
        &sh("nc -l -p 7000 > /dev/null; sleep infinity"),
    );
    let in_the_guest = || -> (u64, u64) {
        let files = "cd /sys/class/net/eth0/statistics; cat rx_bytes tx_bytes";
        let text = output(&kubelet, &main, files);
        let mut lines = text.lines().map(|line| line.parse().unwrap());
        (lines.next().unwrap(), lines.next().unwrap())
    };
    let before = (kubelet.network(&pod), in_the_guest());

    let mut to_pod = eventually("the pod listens", || {
        TcpStream::connect((address.as_str(), 7000)).ok()
    });
    to_pod.set_write_timeout(Some(DEADLINE)).unwrap();
    to_pod.write_all(&vec![1; PAYLOAD]).unwrap();
    drop(to_pod);
    let listener = TcpListener::bind(("10.88.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taker = thread::spawn(move || {
        let (mut from_pod, _) = listener.accept().unwrap();
        from_pod.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut bytes = Vec::new();
        from_pod.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    output(
        &kubelet,
        &main,
        &format!("head -c {PAYLOAD} /dev/zero | nc 10.88.0.1 {port}"),
    );
    assert_eq!(taker.join().unwrap(), PAYLOAD);

    let payload = float(u64::try_from(PAYLOAD).unwrap()) / MIB;
    let after = (kubelet.network(&pod), in_the_guest());
    let both = [
        ("over CRI", before.0, after.0),
        ("in the guest", before.1, after.1),
    ];
    for (what, before, after) in both {
        assert_close(
            float(after.0 - before.0) / MIB,
            payload,
            &format!("MiB received, {what}"),
        );
        assert_close(
            float(after.1 - before.1) / MIB,
            payload,
            &format!("MiB sent, {what}"),
        );
    }
}

#[test]
fn figures_over_cri_of_a_guest_that_hangs_come_within_a_second() {
    let _node = Node::new("figures_over_cri_of_a_guest_that_hangs_come_within_a_second");
    let mut kubelet = Kubelet::new("truth-hang");
    let pod = kubelet.run_pod("truth-hang");
    let containers = ["main", "side", "log"].map(|name| kubelet.run(&pod, name, &IDLE));
    // One call for all containers of the pod, as a kubelet makes it.
    let timed = || {
        let begun = Instant::now();
        let ids = containers.each_ref().map(String::as_str);
        (kubelet.usages_in_list(ids), begun.elapsed())
    };
    let (known, usual) = timed();
    let vmm = Pid::from_raw(named("coffer-vmm")[0]);
    kill(vmm, Signal::SIGSTOP).unwrap();
    let answers: Vec<_> = (0..3).map(|_| timed()).collect();
    kill(vmm, Signal::SIGCONT).unwrap();
    println!("{usual:?} of a guest that is well, then {answers:?}");
    for (figures, took) in answers {
        assert_eq!(figures, known, "the last known");
        assert!(took < Duration::from_secs(1), "{took:?}, usually {usual:?}");
    }
    assert_eq!(output(&kubelet, &containers[0], "echo well"), "well\n");
}
