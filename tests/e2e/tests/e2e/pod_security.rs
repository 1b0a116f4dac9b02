// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a pod's spec says of namespaces, privileges and limits, as a kubelet asks for it: each holds in the guest, or the
//! pod is refused with the name of what it cannot have.

use std::collections::HashMap;
use std::fs;

use e2e::{BUSYBOX, Container, Node, eventually};
use k8s_cri::v1::{
    self, ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, SecurityProfile,
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

/// A field of `/proc/<pid>/status`, which `cat` has shown.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim_start_matches(':').trim()
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
fn namespaces_of_the_host_are_refused_by_the_pods_field() {
    let _node = Node::new("namespaces_of_the_host_are_refused_by_the_pods_field");
    let mut kubelet = Kubelet::new("host-namespaces");
    type Change = fn(&mut NamespaceOption);
    let changes: [(&str, Change); 2] = [
        ("hostPID", |options| {
            options.pid = i32::from(NamespaceMode::Node)
        }),
        ("hostIPC", |options| {
            options.ipc = i32::from(NamespaceMode::Node)
        }),
    ];
    for (wanted, change) in changes {
        let pod = kubelet.run_pod_with("host", |config| change(pod_namespaces(config)));
        let message = pod.err().unwrap().message().to_owned();
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn privileged_pod_has_all_of_the_guest_and_nothing_of_the_host() {
    let _node = Node::new("privileged_pod_has_all_of_the_guest_and_nothing_of_the_host");
    let mut kubelet = Kubelet::new("privileged");
    let pod = kubelet
        .run_pod_with("privileged", |config| {
            let linux = config.linux.get_or_insert_default();
            let security = linux.security_context.get_or_insert_default();
            security.privileged = true;
        })
        .unwrap();
    let command = ["sleep", "infinity"];
    let container = run_with(&kubelet, &pod, ("main", 0), &command, |config| {
        security(config).privileged = true;
    });
    let status = says(&kubelet, &container, "cat /proc/self/status");
    assert_eq!(field(&status, "CapEff"), ALL_CAPABILITIES);
    assert_eq!(field(&status, "Seccomp"), "0");

    assert!(fs::exists("/dev/kvm").unwrap(), "the node has one");
    let devices = says(&kubelet, &container, "ls /dev /dev/net");
    for hosts in ["kvm", "vda", "vhost-net", "loop-control"] {
        assert!(!devices.lines().any(|name| name == hosts), "{devices}");
    }
    for guests in ["null", "kmsg", "fuse", "tun"] {
        assert!(devices.lines().any(|name| name == guests), "{devices}");
    }
    let kernel = says(&kubelet, &container, "dmesg > /tmp/log && uname -r");
    assert!(kernel.ends_with("-coffer\n"), "the guest's: {kernel}");

    let swappiness = "/proc/sys/vm/swappiness";
    let hosts = fs::read_to_string(swappiness).unwrap();
    says(
        &kubelet,
        &container,
        "mkdir /mnt && mount -t tmpfs none /mnt && mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero > /dev/null && \
         echo 17 > /proc/sys/vm/swappiness && mkdir /sys/fs/cgroup/own",
    );
    assert_eq!(fs::read_to_string(swappiness).unwrap(), hosts);

    let plain = kubelet.run(&pod, "plain", &command);
    for refused in ["mount -t tmpfs none /tmp", "head -c 1 /dev/kmsg"] {
        assert_ne!(kubelet.exec(&plain, &sh(refused)).code, 0, "{refused}");
    }
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

fn localhost_profile(path: &str, profile: serde_json::Value) -> SecurityProfile {
    fs::write(path, profile.to_string()).unwrap();
    SecurityProfile {
        profile_type: i32::from(v1::security_profile::ProfileType::Localhost),
        localhost_ref: path.to_owned(),
    }
}

#[test]
fn seccomp_profile_of_the_node_holds_for_init_and_exec() {
    let _node = Node::new("seccomp_profile_of_the_node_holds_for_init_and_exec");
    let mut kubelet = Kubelet::new("seccomp");
    let pod = kubelet.run_pod("seccomp");
    let path = "/tmp/coffer-seccomp.json";
    let profile = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_KILL_PROCESS"}
        ]
    });
    let command = sh("mkdir /made; exec sleep infinity");
    let confined = run_with(&kubelet, &pod, ("confined", 0), &command, |config| {
        security(config).seccomp = Some(localhost_profile(path, profile));
    });
    eventually("init has tried", || {
        let log = kubelet.log("confined", 0, "stderr");
        log.contains("No space left on device").then_some(())
    });
    let executed = kubelet.exec(&confined, &["mkdir", "/made"]);
    assert!(
        executed.code == 1 && executed.stderr.contains("No space left on device"),
        "{executed:?}"
    );
    let killed = kubelet.exec(&confined, &["ln", "-s", "/a", "/b"]);
    assert_eq!(killed.code, 159, "SIGSYS: {killed:?}");

    let free = run_with(
        &kubelet,
        &pod,
        ("free", 0),
        &["sleep", "infinity"],
        |config| {
            let unconfined = v1::security_profile::ProfileType::Unconfined;
            security(config).seccomp = Some(SecurityProfile {
                profile_type: i32::from(unconfined),
                ..Default::default()
            });
        },
    );
    let status = says(&kubelet, &free, "mkdir /made; cat /proc/self/status");
    assert_eq!(field(&status, "Seccomp"), "0");

    let asks = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
    });
    let refused = kubelet.create_with(&pod, "asks", 0, &["true"], |config| {
        security(config).seccomp = Some(localhost_profile(path, asks));
    });
    // Some releases of containerd make the task only at the start.
    let refused = refused.and_then(|id| kubelet.try_start(&id));
    fs::remove_file(path).unwrap();
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("SCMP_ACT_NOTIFY"), "{message}");
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
fn sysctls_are_the_pods_and_those_of_the_whole_machine_are_refused() {
    let _node = Node::new("sysctls_are_the_pods_and_those_of_the_whole_machine_are_refused");
    let mut kubelet = Kubelet::new("sysctls");
    let wanted = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "10000"),
        ("fs.mqueue.msg_max", "20"),
        ("net.ipv4.ip_local_port_range", "2000\t65000"),
        ("net.ipv4.ping_group_range", "0\t1000"),
        ("net.ipv4.tcp_syncookies", "0"),
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.core.somaxconn", "1000"),
    ];
    let with = |sysctls: &[(&str, &str)]| -> HashMap<String, String> {
        let owned = |text: &str| text.replace('\t', " ");
        let pairs = sysctls.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), owned(value)))
            .collect()
    };
    let pod = kubelet
        .run_pod_with("sysctls", |config| {
            config.linux.get_or_insert_default().sysctls = with(&wanted);
        })
        .unwrap();
    for name in ["one", "two"] {
        let container = kubelet.run(&pod, name, &["sleep", "infinity"]);
        for (key, value) in wanted {
            let path = key.replace('.', "/");
            let is = says(&kubelet, &container, &format!("cat /proc/sys/{path}"));
            assert_eq!(is.trim(), value, "{key} in {name}");
        }
    }
    for key in [
        "vm.max_map_count",
        "kernel.pid_max",
        "net.ipv4.no_such_parameter",
    ] {
        let pod = kubelet.run_pod_with("refused", |config| {
            config.linux.get_or_insert_default().sysctls = with(&[(key, "1")]);
        });
        let message = pod.err().unwrap().message().to_owned();
        assert!(message.contains(key), "{message}");
    }
}

#[test]
fn user_groups_capabilities_and_paths_are_the_security_contexts() {
    let _node = Node::new("user_groups_capabilities_and_paths_are_the_security_contexts");
    let mut kubelet = Kubelet::new("context");
    let pod = kubelet
        .run_pod_with("context", |config| {
            config.dns_config = Some(v1::DnsConfig {
                servers: vec!["10.96.0.10".to_owned()],
                searches: vec!["default.svc.cluster.local".to_owned()],
                options: vec!["ndots:5".to_owned()],
            });
        })
        .unwrap();
    let command = ["sleep", "infinity"];
    let container = run_with(&kubelet, &pod, ("main", 0), &command, |config| {
        let mut limits = resources(0, 0);
        limits.oom_score_adj = 500;
        config.linux.get_or_insert_default().resources = Some(limits);
        let security = security(config);
        security.run_as_user = Some(v1::Int64Value { value: 1234 });
        security.run_as_group = Some(v1::Int64Value { value: 2345 });
        security.supplemental_groups = vec![77, 88];
        security.capabilities = Some(v1::Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            drop_capabilities: vec!["CHOWN".to_owned()],
            ..Default::default()
        });
        security.masked_paths = vec!["/proc/timer_list".to_owned(), "/sys/kernel".to_owned()];
        security.readonly_paths = vec!["/proc/sys".to_owned()];
    });
    let status = says(&kubelet, &container, "cat /proc/1/status");
    assert_eq!(field(&status, "Uid"), "1234\t1234\t1234\t1234");
    assert_eq!(field(&status, "Gid"), "2345\t2345\t2345\t2345");
    let groups: Vec<&str> = field(&status, "Groups").split_whitespace().collect();
    assert!(
        groups.contains(&"77") && groups.contains(&"88"),
        "{groups:?}"
    );
    let bounding = u64::from_str_radix(field(&status, "CapBnd"), 16).unwrap();
    assert_eq!(
        (bounding & 1, bounding >> 12 & 1, bounding >> 21 & 1),
        (0, 1, 0),
        "no CHOWN, NET_ADMIN, no SYS_ADMIN: {bounding:x}"
    );
    assert_eq!(
        says(&kubelet, &container, "cat /proc/1/oom_score_adj"),
        "500\n"
    );
    assert_eq!(
        says(&kubelet, &container, "cat /proc/timer_list; ls /sys/kernel"),
        ""
    );
    assert_eq!(
        says(&kubelet, &container, "cat /etc/resolv.conf"),
        "search default.svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    );
    assert_eq!(says(&kubelet, &container, "cat /etc/hostname"), "context\n");

    // procMount: Unmasked, and root.
    let open = run_with(&kubelet, &pod, ("open", 0), &command, |config| {
        security(config).run_as_user = Some(v1::Int64Value { value: 0 });
    });
    assert_ne!(says(&kubelet, &open, "ls /sys/kernel"), "");
    says(&kubelet, &open, "echo 1 > /proc/sys/kernel/shm_rmid_forced");
}

#[test]
fn fork_bomb_stops_at_the_pids_limit_and_leaves_the_neighbour_alone() {
    let _node = Node::new("fork_bomb_stops_at_the_pids_limit_and_leaves_the_neighbour_alone");
    let mut kubelet = Kubelet::new("pids");
    let pod = kubelet.run_pod("pids");
    let neighbour = kubelet.run(&pod, "neighbour", &["sleep", "infinity"]);
    let script = "trap '' TERM; while :; do sleep infinity & done; exec sleep infinity";
    let bomb = run_with(&kubelet, &pod, ("bomb", 0), &sh(script), |config| {
        let mut limits = resources(0, 0);
        limits.unified = HashMap::from([("pids.max".to_owned(), "20".to_owned())]);
        config.linux.get_or_insert_default().resources = Some(limits);
    });
    // busybox's shell gives up when it cannot fork.
    eventually("the bomb is at its limit", || {
        let log = kubelet.log("bomb", 0, "stderr");
        log.contains("Resource temporarily unavailable")
            .then_some(())
    });
    assert_eq!(
        says(&kubelet, &neighbour, "sleep 0 & wait; echo alive"),
        "alive\n"
    );
    kubelet.stop(&bomb, std::time::Duration::ZERO);
    kubelet.remove(&bomb);
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
