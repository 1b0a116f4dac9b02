// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Requests and limits: what is set in the container's cgroup, and that it holds.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use e2e::named;
use k8s_cri::v1;

use super::client::{Ended, Running, image};
use super::shared::Shared;
use crate::cri_client::{Kubelet, resources};
use crate::volumes::{IDLE, PYTHON, PodDir, import_python, mount, sh};

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
    let id = pod.kubelet.run_with(&pod.pod, "bomb", &IDLE, |config| {
        config.linux.as_mut().unwrap().resources = Some(unified("pids.max", "20"));
    });
    // Deaf to what ends it politely, and without the pipe that its output comes through.
    let bomb =
        "trap '' TERM; for i in $(seq 60); do sleep 1000 > /dev/null 2>&1 & done; echo all of them";
    let refused = pod.kubelet.exec(&id, &sh(bomb));
    assert!(refused.stderr.contains("fork"), "{refused:?}");
    assert_eq!(e2e::metrics("k8s.io", &id)["pids.limit"], 20);
    pod.discard(&id);
    let neighbour = pod.output("for i in $(seq 60); do sleep 1 & done; wait; echo all of them");
    assert_eq!(neighbour, "all of them\n", "it has no such limit");
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

/// The memory that a guest's kernel has, in MiB.
const MEMORY: &str = "awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";

/// Whether this is the memory of a guest of `guest.default_memory_mib`, less what its kernel has taken for itself.
#[track_caller]
fn assert_default_memory(mib: &str) {
    let mib: u32 = mib.trim().parse().unwrap();
    assert!((512 - 64..=512).contains(&mib), "{mib} MiB");
}

#[test]
fn pod_without_limits_has_the_default_size() {
    // Not the pod of the other cases, which follows their limits.
    let _others = POD.case();
    let pod = Running::new("without-limits");
    assert_eq!(pod.output("nproc"), "1\n");
    assert_default_memory(&pod.output(MEMORY));
}

#[test]
fn pod_with_cpu_limits_alone_has_their_sum_and_the_default_memory() {
    let _pod = POD.case();
    let mut kubelet = Kubelet::new("processors");
    // Two containers with 500m and 1200m: kubelet gives the sum.
    let change = |config: &mut v1::PodSandboxConfig| {
        config.linux.as_mut().unwrap().resources = Some(resources(0, 170_000));
    };
    let pod = kubelet.run_pod_with("processors", change).unwrap();
    for (name, quota) in [("one", 50_000), ("two", 120_000)] {
        let id = kubelet.run_with(&pod, name, &IDLE, |config| {
            config.linux.as_mut().unwrap().resources = Some(resources(0, quota));
        });
        let output = |script: &str| kubelet.exec(&id, &sh(script)).stdout;
        let seen = output("nproc; cat /sys/fs/cgroup/cpu.max");
        assert_eq!(seen, format!("2\n{quota} 100000\n"));
        assert_default_memory(&output(MEMORY));
    }
}

/// A limit of the container's cgroup that has no field in CRI.
fn unified(key: &str, value: &str) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        unified: HashMap::from([(key.to_owned(), value.to_owned())]),
        ..Default::default()
    }
}

/// Writes 2.25 MiB to a disk and prints the seconds that it takes.
const WRITE: &str = "now() { cut -d' ' -f1 /proc/uptime; }; begun=$(now); \
                     dd if=/dev/zero of=/v/file bs=64k count=36 conv=fsync 2>/dev/null && echo $begun $(now)";

#[test]
fn write_takes_as_long_as_io_max_says() {
    let pod = POD.case();
    let dir = PodDir::new("resources");
    let volume = dir.empty_dir("written");
    let run = |name: &str, limits: v1::LinuxContainerResources, script: &str| {
        let ended = pod.script(name, script, |config| {
            config.mounts = vec![mount(&volume, "/v", false)];
            config.linux.as_mut().unwrap().resources = Some(limits);
        });
        ended.stdout
    };
    let device = "awk '$5 == \"/v\" { print $3 }' /proc/self/mountinfo";
    let device = run("device", resources(0, 0), device);
    let limit = format!("{} wbps=1048576", device.trim());
    let script = format!("cat /sys/fs/cgroup/io.max; {WRITE}");
    let limited = run("limited", unified("io.max", &limit), &script);
    let (set, times) = limited.split_once('\n').unwrap();
    assert_eq!(
        set,
        format!(
            "{} rbps=max wbps=1048576 riops=max wiops=max",
            device.trim()
        )
    );
    let (begun, done) = times.trim().split_once(' ').unwrap();
    let [begun, done] = [begun, done].map(|seconds| seconds.parse::<f64>().unwrap());
    // A slice of the throttle, a tenth of a second, passes at once.
    assert!(done - begun >= 2.0, "{times}");
}

#[test]
fn io_weight_has_disks_heed_weights() {
    let pod = POD.case();
    let dir = PodDir::new("resources");
    let volume = dir.empty_dir("weighed");
    let script = "dd if=/dev/zero of=/v/file bs=64k count=16 conv=fsync 2>/dev/null; cd /sys/fs/cgroup && cat io.weight io.stat";
    let ended = pod.script("weighed", script, |config| {
        config.mounts = vec![mount(&volume, "/v", false)];
        config.linux.as_mut().unwrap().resources = Some(unified("io.weight", "500"));
    });
    assert!(ended.stdout.starts_with("default 500\n"), "{ended:?}");
    // The kernel counts costs of disks only where it weighs (blk-iocost.c, ioc_pd_stat).
    assert!(ended.stdout.contains(" cost.usage="), "{ended:?}");
}

/// Uses two huge pages in a file, asks for a third, and prints what comes of it.
const HUGE_PAGES: &str = "import errno, mmap, os
def pages(name, count):
    file = os.open(name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, count << 21)
    return mmap.mmap(file, count << 21)
two = pages('/huge/two', 2)
two[0], two[-1] = 1, 2
limits = [open('/sys/fs/cgroup/hugetlb.2MB.' + name).read().strip() for name in ('max', 'current')]
print(*limits, [line.split()[1] for line in open('/proc/meminfo') if line.startswith('HugePages_Total')])
try:
    pages('/huge/third', 1)
except OSError as error:
    print(errno.errorcode[error.errno])
for name in os.listdir('/huge'):
    os.unlink('/huge/' + name)
print('@end')
";

#[test]
fn huge_pages_are_the_containers_to_their_limit_and_go_back() {
    let pod = POD.case();
    import_python();
    let mut dir = PodDir::new("resources");
    let volume = dir.huge_page_dir("huge");
    let create = |name: &str, bytes: u64| {
        let command = ["python3", "-c", HUGE_PAGES];
        pod.kubelet
            .create_with(&pod.pod, name, 0, &command, |config| {
                image(config, PYTHON);
                config.mounts = vec![mount(&volume, "/huge", false)];
                config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
                    hugepage_limits: vec![v1::HugepageLimit {
                        page_size: "2MB".to_owned(),
                        limit: bytes,
                    }],
                    ..Default::default()
                });
            })
    };
    let id = create("huge", 4 << 20).unwrap();
    pod.kubelet.start(&id);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet.logs("huge", 0, "@end");
    assert_eq!(
        pod.kubelet.log("huge", 0, "stdout"),
        "4194304 4194304 ['2']\nENOMEM\n@end\n"
    );
    pod.kubelet.remove(&id);
    assert_eq!(
        pod.output("awk '/^HugePages_Total/ { print $2 }' /proc/meminfo"),
        "0\n"
    );
    // More than the guest has.
    let refused = create("too-huge", 8 << 30).and_then(|id| pod.kubelet.try_start(&id));
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("hugepageLimits[2MB]"), "{message}");
    assert_eq!(pod.exec("exit 2").code, 2, "the pod lives on");
}

#[test]
fn writable_layer_ends_with_its_disk_and_the_pod_lives_on() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "full", &IDLE);
    let executed = |script: &str| pod.kubelet.exec(&id, &sh(script));
    // `storage.scratch_mib` is 10240: most of it at once, then what is left.
    let beyond = executed("fallocate -l 11G /beyond");
    assert!(beyond.stderr.contains("No space left"), "{beyond:?}");
    let fill = executed(
        "rm -f /beyond; fallocate -l $(($(df -k / | awk 'END { print $4 }') - 4096))K /most && dd if=/dev/zero of=/rest bs=1M count=16 conv=fsync",
    );
    assert!(fill.stderr.contains("No space left"), "{fill:?}");
    assert_eq!(executed("echo alive; rm /most /rest").stdout, "alive\n");
    let after = executed("dd if=/dev/zero of=/rest bs=1M count=1 conv=fsync");
    assert_eq!(after.code, 0, "{after:?}");
    pod.discard(&id);
    assert_eq!(pod.output("echo x > /file && cat /file && rm /file"), "x\n");
}

#[test]
fn pages_of_a_mapped_hosts_file_are_its_containers() {
    let pod = POD.case();
    import_python();
    let dir = PodDir::new("resources");
    let hosts = dir.path.join("etc-hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let map = "import mmap, os
file = os.open('/etc/hosts', os.O_RDWR)
os.ftruncate(file, 96 << 20)
pages = mmap.mmap(file, 96 << 20)
pages[::4096] = bytes(len(pages) // 4096)
";
    let id = pod
        .kubelet
        .run_with(&pod.pod, "maps", &["python3", "-c", map], |config| {
            image(config, PYTHON);
            config.mounts = vec![mount(&hosts, "/etc/hosts", false)];
            config.linux.as_mut().unwrap().resources = Some(resources(48 << 20, 0));
        });
    assert_eq!(pod.kubelet.exit_code(&id), 137);
    assert_eq!(pod.kubelet.status(&id).reason, "OOMKilled");
    pod.kubelet.remove(&id);
    assert_eq!(fs::read_to_string(&hosts).unwrap(), "127.0.0.1 localhost\n");
    assert_eq!(pod.exec("exit 2").code, 2, "the neighbour runs on");
}
