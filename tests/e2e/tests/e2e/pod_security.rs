// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a pod's spec says of namespaces, privileges and limits, where it takes more than one pod's cases in
//! [`kubernetes`](crate::kubernetes) have: each holds in the guest, or is refused by its name.

use std::fs;

use e2e::{BUSYBOX, Container, Node, eventually};
use k8s_cri::v1::{
    self, ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig,
};

use crate::cri_client::{Kubelet, Pod, resources};

/// All 41 capabilities of Linux 6.12.
const ALL_CAPABILITIES: &str = "000001ffffffffff";

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

fn pod_namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

fn pid_mode(config: &mut ContainerConfig, mode: NamespaceMode) -> &mut NamespaceOption {
    let namespaces = security(config).namespace_options.get_or_insert_default();
    namespaces.pid = i32::from(mode);
    namespaces
}

/// Makes and starts a container whose config was changed.
fn run_with(
    kubelet: &Kubelet,
    pod: &Pod,
    (name, attempt): (&str, u32),
    command: &[&str],
    change: impl FnOnce(&mut ContainerConfig),
) -> String {
    let id = kubelet
        .create_with(pod, name, attempt, command, change)
        .unwrap();
    kubelet.start(&id);
    id
}

/// What a command in a container says.
#[track_caller]
fn says(kubelet: &Kubelet, container: &str, script: &str) -> String {
    let executed = kubelet.exec(container, &sh(script));
    assert_eq!(executed.code, 0, "{script}: {executed:?}");
    executed.stdout
}

#[test]
fn shared_pid_namespace_begins_with_pause_and_outlives_its_containers() {
    let _node = Node::new("shared_pid_namespace_begins_with_pause_and_outlives_its_containers");
    let mut kubelet = Kubelet::new("shared-pids");
    let pod = kubelet
        .run_pod_with("shared-pids", |config| {
            pod_namespaces(config).pid = i32::from(NamespaceMode::Pod);
        })
        .unwrap();
    let share = |config: &mut ContainerConfig| {
        pid_mode(config, NamespaceMode::Pod);
    };
    let command = sh("sleep 2001 & exec sleep 1001");
    let one = run_with(&kubelet, &pod, ("one", 0), &command, share);
    let two = run_with(&kubelet, &pod, ("two", 0), &["sleep", "1002"], share);
    let processes = || says(&kubelet, &two, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
    assert_eq!(
        says(&kubelet, &two, "cat /proc/1/cmdline | tr '\\0' '\\n'"),
        "/pause\n"
    );
    let namespace = |id: &str| says(&kubelet, id, "readlink /proc/self/ns/pid");
    assert_eq!(namespace(&one), namespace(&two));
    let all = processes();
    for process in ["sleep 2001", "sleep 1001", "sleep 1002"] {
        assert!(all.contains(process), "{process:?} is not in {all:?}");
    }
    assert_ne!(
        kubelet
            .exec(&two, &sh("ls /proc/1/root/ && kill -9 1"))
            .code,
        0,
        "the pause process is nobody's to look into"
    );

    says(&kubelet, &one, "sh -c 'sleep 0.1 &'");
    eventually("the orphan is reaped", || {
        let zombies = "cat /proc/[0-9]*/status 2>/dev/null | grep -c 'State:.Z'; true";
        (says(&kubelet, &two, zombies) == "0\n").then_some(())
    });

    says(
        &kubelet,
        &two,
        "kill -9 $(ps | awk '/[s]leep 1001/ {print $1}')",
    );
    assert_eq!(kubelet.exit_code(&one), 137);
    eventually("the container's other processes end with its init", || {
        (!processes().contains("sleep 2001")).then_some(())
    });
    kubelet.remove(&one);
    let again = run_with(&kubelet, &pod, ("one", 1), &["sleep", "1003"], share);
    let seen = says(&kubelet, &again, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
    assert!(
        seen.contains("sleep 1002") && seen.contains("/pause"),
        "{seen}"
    );
}

#[test]
fn debug_container_is_in_the_pid_namespace_of_its_target() {
    let _node = Node::new("debug_container_is_in_the_pid_namespace_of_its_target");
    let mut kubelet = Kubelet::new("debug");
    let pod = kubelet.run_pod("debug");
    let target = kubelet.run(&pod, "target", &["sleep", "1001"]);
    let other = kubelet.run(&pod, "other", &["sleep", "1002"]);
    let debug = run_with(&kubelet, &pod, ("debug", 0), &["sleep", "1003"], |config| {
        pid_mode(config, NamespaceMode::Target).target_id = target.clone();
    });
    let seen = says(&kubelet, &debug, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
    assert!(
        seen.contains("sleep 1001 ") && seen.contains("sleep 1003 "),
        "{seen}"
    );
    assert!(!seen.contains("sleep 1002"), "{seen}");
    assert_eq!(
        says(&kubelet, &other, "readlink /proc/1/exe"),
        "/bin/busybox\n",
        "others have their own"
    );
    kubelet.stop(&target, std::time::Duration::ZERO);
    assert_eq!(
        kubelet.exit_code(&debug),
        137,
        "it ends with the namespace that it is in"
    );
}

#[test]
fn ctr_runs_a_privileged_container_and_refuses_a_device_asked_for() {
    let _node = Node::new("ctr_runs_a_privileged_container_and_refuses_a_device_asked_for");
    let script = sh("grep CapEff /proc/self/status; ls /dev");
    let output = Container::run_image("privileged", BUSYBOX, &["--privileged"], &script);
    assert!(
        output.code == 0 && output.stdout.contains(ALL_CAPABILITIES),
        "{output:?}"
    );
    assert!(!output.stdout.contains("kvm"), "{output:?}");
    for options in [
        &["--device", "/dev/kvm"][..],
        &["--privileged", "--device", "/dev/kvm"],
    ] {
        let output = Container::run_image("device", BUSYBOX, options, &["true"]);
        assert!(
            output.code != 0 && output.stderr.contains("linux.devices[/dev/kvm]"),
            "{output:?}"
        );
    }
}

#[test]
fn call_newer_than_containerds_own_profile_is_not_implemented() {
    let _node = Node::new("call_newer_than_containerds_own_profile_is_not_implemented");
    let program = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); \
                   calls = [libc.syscall(1000), ctypes.get_errno(), libc.swapoff(b'/'), ctypes.get_errno()]; \
                   print(calls, [line for line in open('/proc/self/status') if line.startswith('Seccomp:')])";
    let image = "coffer.test/python:latest";
    let command = ["python3", "-c", program];
    let output = Container::run_image("newer", image, &["--seccomp"], &command);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(
        output.stdout, "[-1, 38, -1, 1] ['Seccomp:\\t2\\n']\n",
        "ENOSYS, and EPERM for a call that the profile knows and does not allow"
    );
}

#[test]
fn container_without_a_pod_cannot_join_a_namespace_of_the_host() {
    let _node = Node::new("container_without_a_pod_cannot_join_a_namespace_of_the_host");
    for kind in ["pid", "ipc", "uts"] {
        let option = format!("{kind}:/proc/1/ns/{kind}");
        let output = Container::run_image("joins", BUSYBOX, &["--with-ns", &option], &["true"]);
        let field = format!("linux.namespaces[{kind}].path");
        assert!(
            output.code != 0 && output.stderr.contains(&field),
            "{output:?}"
        );
    }
}

#[test]
fn cpuset_of_the_node_becomes_as_many_vcpus() {
    let _node = Node::new("cpuset_of_the_node_becomes_as_many_vcpus");
    let mut kubelet = Kubelet::new("cpuset");
    let pod = kubelet
        .run_pod_with("cpuset", |config| {
            config.linux.get_or_insert_default().resources = Some(resources(0, 200_000));
        })
        .unwrap();
    let with = |cpus: &str| v1::LinuxContainerResources {
        cpuset_cpus: cpus.to_owned(),
        cpuset_mems: "1".to_owned(),
        ..resources(0, 0)
    };
    let command = ["sleep", "infinity"];
    let container = run_with(&kubelet, &pod, ("main", 0), &command, |config| {
        config.linux.get_or_insert_default().resources = Some(with("37"));
    });
    assert_eq!(says(&kubelet, &container, "nproc"), "1\n");
    for (cpus, count) in [("0-63", "2\n"), ("40", "1\n"), ("0-1", "2\n")] {
        kubelet.update(&container, with(cpus)).unwrap();
        assert_eq!(says(&kubelet, &container, "nproc"), count, "{cpus}");
    }
}

#[test]
fn vmm_without_room_in_the_pods_cgroup_is_reported_as_that() {
    let node = Node::new("vmm_without_room_in_the_pods_cgroup_is_reported_as_that");
    let mut kubelet = Kubelet::new("no-room");
    let cgroup = "/sys/fs/cgroup/no-room";
    fs::create_dir(cgroup).unwrap();
    let pod = kubelet
        .run_pod_with("no-room", |config| {
            config.linux.get_or_insert_default().cgroup_parent = "/no-room".to_owned();
        })
        .unwrap();
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    // Less than the VM has in use, and nowhere to put it.
    fs::write(format!("{cgroup}/memory.max"), "16M").unwrap();
    assert_eq!(kubelet.exit_code(&container), 137);
    eventually("the log says why", || {
        node.log()
            .contains("OOM killer ended the VMM")
            .then_some(())
    });
    kubelet.stop_pod(&pod);
    kubelet.remove_pod(&pod);
    eventually("the pod's cgroup is empty", || fs::remove_dir(cgroup).ok());
}
