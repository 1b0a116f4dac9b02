// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What users of runtimes with a VM per pod complain about most, each complaint a test. Those about volumes (sizeLimit,
//! subPath, inotify) are with [`volumes`](crate::volumes), those about images and disks with
//! [`bad_input`](crate::bad_input), those about networks with [`network`](crate::network), that about limits of pids with
//! [`kubernetes`](crate::kubernetes).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use e2e::{Container, ContainerdDown, Node, count, eventually, kill_9, named, parent_of, run};
use k8s_cri::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::{Kubelet, resources};
use crate::volumes::{IDLE, output, sh};

const MIB: u64 = 1 << 20;
const VMM: &str = "coffer-vmm";
const SHIM: &str = "containerd-shim-coffer-v2";

/// A field of `/proc/<pid>/status`, the first number in it.
fn status_field(pid: i32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap_or_default().parse().unwrap()
}

#[test]
fn last_output_before_a_fast_exit_is_not_lost() {
    let _node = Node::new("last_output_before_a_fast_exit_is_not_lost");
    let mut kubelet = Kubelet::new("fast-exit");
    let pod = kubelet.run_pod("fast-exit");
    for attempt in 0..count(10, 200) {
        let script = format!("seq 1 2000; echo the last words of {attempt}");
        let container = kubelet.create(&pod, "main", attempt, &sh(&script));
        kubelet.start(&container);
        assert_eq!(kubelet.exit_code(&container), 0);
        // Who removes a container waits for no log.
        kubelet.remove(&container);
        let log = kubelet.log("main", attempt, "stdout");
        let numbers: String = (1..=2000).map(|number| format!("{number}\n")).collect();
        assert_eq!(log, format!("{numbers}the last words of {attempt}\n"));
    }
}

#[test]
fn exec_with_an_idle_stdin_goes_on_and_sees_its_end() {
    let _node = Node::new("exec_with_an_idle_stdin_goes_on_and_sees_its_end");
    let container = Container::start("idle-stdin", &IDLE);
    let mut exec = container.spawn_exec("cat", &["cat"]);
    let mut stdin = exec.stdin.take().unwrap();
    let mut lines = BufReader::new(exec.stdout.take().unwrap()).lines();
    for line in ["before", "after"] {
        writeln!(stdin, "{line}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), line);
        if line == "before" {
            // Time itself is what is tested: what ends idle streams does so after 30 s, and nothing tells before.
            thread::sleep(Duration::from_secs(35));
        }
    }
    drop(stdin);
    assert!(lines.next().is_none(), "cat ends with its input");
    assert!(exec.wait().unwrap().success());
}

/// Makes a pod in a thread of its own, as far as it comes, and meanwhile kills `victim` after `moment`.
fn pod_whose_making_is_disturbed(name: &str, victim: &str, moment: Duration) {
    thread::scope(|scope| {
        let making = scope.spawn(|| {
            let mut kubelet = Kubelet::new(name);
            let made = kubelet
                .run_pod_with(name, |_| ())
                .and_then(|pod| kubelet.create_with(&pod, "main", 0, &IDLE, |_| ()))
                .and_then(|container| kubelet.try_start(&container));
            if let Err(status) = made {
                assert!(!status.message().is_empty());
            }
            kubelet.forget_pods();
        });
        eventually("a shim starts", || {
            (!named(SHIM).is_empty() || making.is_finished()).then_some(())
        });
        // One of the many moments of the making.
        thread::sleep(moment);
        if victim == "containerd" {
            drop(ContainerdDown::kill());
        } else if let Some(pid) = named(victim).first() {
            let _gone_already = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
    });
}

#[test]
fn pod_is_not_stuck_terminating_whatever_died() {
    let _node = Node::new("pod_is_not_stuck_terminating_whatever_died");
    for victim in [VMM, SHIM, "containerd"] {
        let mut kubelet = Kubelet::new("terminating");
        let pod = kubelet.run_pod("terminating");
        kubelet.run(&pod, "main", &IDLE);
        if victim == "containerd" {
            drop(ContainerdDown::kill());
            kubelet.await_containerd();
        } else {
            kill_9(named(victim)[0]);
        }
        let begun = Instant::now();
        kubelet.stop_pod(&pod);
        kubelet.remove_pod(&pod);
        assert_eq!(kubelet.all_pods(), Vec::<String>::new(), "{victim}");
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{victim}: {:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn pod_is_not_stuck_terminating_whatever_died_in_its_making() {
    let _node = Node::new("pod_is_not_stuck_terminating_whatever_died_in_its_making");
    let kubelet = Kubelet::new("unmade");
    for round in 0..count(1, 8) {
        for victim in [VMM, SHIM] {
            let moment = Duration::from_millis(u64::from(300 + 400 * (round % 8)));
            pod_whose_making_is_disturbed("unmade-pod", victim, moment);
            kubelet.remove_all_pods();
        }
    }
}

#[test]
fn restart_of_containerd_in_the_middle_of_a_create_leaks_no_pod() {
    let _node = Node::new("restart_of_containerd_in_the_middle_of_a_create_leaks_no_pod");
    let mut kubelet = Kubelet::new("restarted");
    for moment in [200, 1200, 3000]
        .into_iter()
        .take(usize::try_from(count(2, 3)).unwrap())
    {
        pod_whose_making_is_disturbed("restarted", "containerd", Duration::from_millis(moment));
        kubelet.remove_all_pods();
        eventually("neither shim nor VM is left", || {
            [SHIM, VMM]
                .iter()
                .all(|name| named(name).is_empty())
                .then_some(())
        });
    }
    // And the node is as good as before: the same pod again.
    let pod = kubelet.run_pod("restarted");
    let main = kubelet.run(&pod, "main", &IDLE);
    assert_eq!(output(&kubelet, &main, "echo well"), "well\n");
}

#[test]
fn death_of_the_vmm_is_not_reported_as_success() {
    let node = Node::new("death_of_the_vmm_is_not_reported_as_success");
    let mut kubelet = Kubelet::new("vmm-death");
    let pod = kubelet.run_pod("vmm-death");
    let main = kubelet.run(&pod, "main", &IDLE);
    thread::scope(|scope| {
        let inside = main.clone();
        let exec = scope.spawn(move || {
            Kubelet::new("vmm-death-exec").try_exec(&inside, &sh("touch /begun; sleep 1000"))
        });
        eventually("the exec runs", || {
            (kubelet.exec(&main, &["test", "-e", "/begun"]).code == 0).then_some(())
        });
        kill_9(named(VMM)[0]);
        let ended = exec.join().unwrap();
        assert!(
            ended.as_ref().is_err() || ended.as_ref().is_ok_and(|exec| exec.code != 0),
            "{ended:?}"
        );
    });
    assert_eq!(kubelet.exit_code(&main), 137);
    let status = kubelet.status(&main);
    assert_eq!(status.reason, "Error");
    assert!(status.finished_at >= status.started_at, "{status:?}");
    assert!(
        node.log().contains("signal 9"),
        "the log says what ended the VM"
    );
}

#[test]
fn crash_loop_leaks_neither_descriptors_nor_threads_nor_size() {
    let _node = Node::new("crash_loop_leaks_neither_descriptors_nor_threads_nor_size");
    let mut kubelet = Kubelet::new("crash-loop");
    let pod = kubelet
        .run_pod_with("crash-loop", |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(128 << 20, 0));
        })
        .unwrap();
    let witness = kubelet.run(&pod, "witness", &IDLE);
    let (vmm, shim) = (named(VMM)[0], named(SHIM)[0]);
    let measure = || {
        let entries =
            |pid: i32, what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        let guest = output(
            &kubelet,
            &witness,
            "grep MemTotal /proc/meminfo; nproc; wc -l < /proc/mounts; ls /sys/block | wc -l",
        );
        let of = |pid| (entries(pid, "fd"), entries(pid, "task"));
        (of(vmm), of(shim), guest)
    };
    let mut first = None;
    for attempt in 0..count(20, 200) {
        let container = kubelet
            .create_with(&pod, "main", attempt, &sh("exit 1"), |config| {
                config.linux.as_mut().unwrap().resources = Some(resources(32 << 20, 0));
            })
            .unwrap();
        kubelet.start(&container);
        assert_eq!(kubelet.exit_code(&container), 1);
        kubelet.remove(&container);
        if attempt == 2 {
            first = Some(measure());
        }
    }
    let first = first.unwrap();
    // What an exec has opened is closed a moment after its end.
    let mut last = measure();
    let begun = Instant::now();
    while last != first && begun.elapsed() < Duration::from_secs(20) {
        last = measure();
    }
    assert_eq!(
        last, first,
        "descriptors and threads of VMM and shim, and the guest"
    );
}

/// A cgroup as a kubelet's of a pod, with a memory limit.
pub(crate) struct PodCgroup(PathBuf);

impl PodCgroup {
    pub(crate) fn new(name: &str, memory: u64) -> Self {
        let path = PathBuf::from("/sys/fs/cgroup").join(name);
        fs::create_dir(&path).unwrap();
        let cgroup = Self(path);
        fs::write(
            cgroup.0.join("cgroup.subtree_control"),
            "+memory +cpu +pids",
        )
        .unwrap();
        fs::write(cgroup.0.join("memory.max"), memory.to_string()).unwrap();
        cgroup
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap()
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn pod_with_64_mib_boots_and_is_never_more_than_its_cgroup() {
    /// What a RuntimeClass adds to the limits of its pods.
    const OVERHEAD: u64 = 64 * MIB;
    const LIMIT: u64 = 64 * MIB;
    let _node = Node::new("pod_with_64_mib_boots_and_is_never_more_than_its_cgroup");
    let cgroup = PodCgroup::new("pod64", LIMIT + OVERHEAD);
    let mut kubelet = Kubelet::new("small");
    let limits = || resources(i64::try_from(LIMIT).unwrap(), 0);
    let pod = kubelet
        .run_pod_with("small", |config| {
            let linux = config.linux.as_mut().unwrap();
            linux.resources = Some(limits());
            linux.cgroup_parent = "/pod64".to_owned();
        })
        .unwrap();
    for (name, fill, code) in [("fits", 40, 0), ("hungry", 70, 137)] {
        // Into memory, so that every page is touched. More than the VM has would be refused before it is used.
        let script = format!("exec dd if=/dev/zero of=/dev/null bs={fill}M count=1");
        let container = kubelet
            .create_with(&pod, name, 0, &sh(&script), |config| {
                config.linux.as_mut().unwrap().resources = Some(limits());
            })
            .unwrap();
        kubelet.start(&container);
        assert_eq!(kubelet.exit_code(&container), code, "{name}");
    }
    let peak: u64 = cgroup.read("memory.peak").trim().parse().unwrap();
    println!("64 MiB pod: peak {} MiB on the host", peak / MIB);
    let events = cgroup.read("memory.events");
    assert!(
        events.contains("oom_kill 0"),
        "the host killed nothing: {events}"
    );
    let procs = run(
        "find",
        &[cgroup.0.to_str().unwrap(), "-name", "cgroup.procs"],
    )
    .stdout;
    let inside: String = procs
        .lines()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    for name in [VMM, SHIM] {
        let pid = named(name)[0].to_string();
        assert!(
            inside.lines().any(|line| line == pid),
            "{name} is in the pod's cgroup"
        );
    }
    kubelet.stop_pod(&pod);
    kubelet.remove_pod(&pod);
}

#[test]
fn memory_of_a_burst_is_given_back() {
    let _node = Node::new("memory_of_a_burst_is_given_back");
    let container = Container::start("burst", &IDLE);
    let vmm = named(VMM)[0];
    let resident = || (status_field(vmm, "RssAnon") + status_field(vmm, "RssShmem")) >> 10;
    let before = resident();
    let burst = ["dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"];
    let mut peak = before;
    thread::scope(|scope| {
        let running = scope.spawn(|| container.exec("burst", &burst).success());
        while !running.is_finished() {
            peak = peak.max(resident());
            thread::sleep(Duration::from_millis(20));
        }
    });
    assert!(peak > before + 200, "{before} MiB, at most {peak} MiB");
    // Linux reports free pages two seconds after they are freed, in batches.
    eventually("most of it is the host's again", || {
        (resident() < before + (peak - before) / 4).then_some(())
    });
    println!(
        "{before} MiB, {peak} MiB in the burst, {} MiB after it",
        resident()
    );
}

/// How far the guest's clock is from the node's, in seconds, and the uncertainty of that.
fn clock_difference(container: &Container, exec: &str) -> (f64, f64) {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64()
    };
    let before = now();
    // Seconds alone: busybox's date has no fractions.
    let said = container.exec(exec, &["date", "+%s"]).success().stdout;
    let after = now();
    let guest: f64 = said.trim().parse().unwrap();
    // Half a second for the fraction.
    (
        guest + 0.5 - (before + after) / 2.0,
        (after - before) / 2.0 + 0.5,
    )
}

#[test]
fn clock_of_the_guest_is_right_also_after_it_stood_still() {
    let _node = Node::new("clock_of_the_guest_is_right_also_after_it_stood_still");
    let container = Container::start("clock", &IDLE);
    let right = |exec: &str| {
        let (difference, uncertainty) = clock_difference(&container, exec);
        assert!(
            difference.abs() <= uncertainty + 0.1,
            "{exec}: {difference} s, known to {uncertainty} s"
        );
    };
    right("at-first");
    // Time itself is what is tested: a clock that stood still is behind by as much, which has to be more than is uncertain.
    container.pause().success();
    thread::sleep(Duration::from_secs(5));
    container.resume().success();
    right("after-pause");
    let vmm = Pid::from_raw(named(VMM)[0]);
    kill(vmm, Signal::SIGSTOP).unwrap();
    thread::sleep(Duration::from_secs(10));
    kill(vmm, Signal::SIGCONT).unwrap();
    right("after-stop");
    assert_eq!(parent_of(vmm.as_raw()), Some(named(SHIM)[0]));
}

#[test]
fn clock_of_the_guest_that_went_astray_is_set_right() {
    let _node = Node::new("clock_of_the_guest_that_went_astray_is_set_right");
    let mut kubelet = Kubelet::new("astray");
    let pod = kubelet.run_pod("astray");
    let main = kubelet
        .create_with(&pod, "main", 0, &IDLE, |config| {
            let linux = config.linux.as_mut().unwrap();
            let security = linux.security_context.as_mut().unwrap();
            security.capabilities = Some(v1::Capability {
                add_capabilities: vec!["SYS_TIME".to_owned()],
                ..Default::default()
            });
        })
        .unwrap();
    kubelet.start(&main);
    for astray in ["+3600", "-3600"] {
        // As if the node's clock had been set by as much, to the other side.
        let script = format!("date -s @$(($(date +%s) {astray}))");
        output(&kubelet, &main, &script);
        eventually("the guest's clock is the node's", || {
            let node = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let guest: u64 = output(&kubelet, &main, "date +%s").trim().parse().unwrap();
            (guest.abs_diff(node.as_secs()) < 60).then_some(())
        });
    }
}
