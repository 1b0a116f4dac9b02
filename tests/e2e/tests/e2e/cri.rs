// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods over CRI with the runtime handler `coffer`.

use std::time::Duration;

use e2e::{Node, eventually, named};
use k8s_cri::v1;

use crate::cri_client::{Kubelet, resources};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

#[test]
fn containers_of_a_pod_share_one_vm_and_its_namespaces() {
    let _node = Node::new("containers_of_a_pod_share_one_vm_and_its_namespaces");
    let mut kubelet = Kubelet::new("share");
    let pod = kubelet.run_pod("share");
    let one = kubelet.run(&pod, "one", &["sleep", "infinity"]);
    let two = kubelet.run(&pod, "two", &["sleep", "infinity"]);
    assert_eq!(named("coffer-vmm").len(), 1);
    assert_eq!(named("containerd-shim-coffer-v2").len(), 1);

    let both = |command: &[&str]| {
        let run = |container: &str| {
            let executed = kubelet.exec(container, command);
            assert_eq!(executed.code, 0, "{executed:?}");
            executed.stdout
        };
        (run(&one), run(&two))
    };
    for namespace in ["ipc", "uts", "net"] {
        let (first, second) = both(&["readlink", &format!("/proc/self/ns/{namespace}")]);
        assert_eq!(first, second, "{namespace}");
    }
    for namespace in ["mnt", "pid"] {
        let (first, second) = both(&["readlink", &format!("/proc/self/ns/{namespace}")]);
        assert_ne!(first, second, "{namespace}");
    }
    let (first, second) = both(&["cat", "/proc/sys/kernel/random/boot_id"]);
    assert_eq!(first, second);
    assert_eq!(
        both(&["hostname"]),
        ("share\n".to_owned(), "share\n".to_owned())
    );

    kubelet.exec(&one, &sh("echo shared > /dev/shm/note; echo own > /own"));
    assert_eq!(
        kubelet.exec(&two, &["cat", "/dev/shm/note"]).stdout,
        "shared\n"
    );
    assert_ne!(kubelet.exec(&two, &["cat", "/own"]).code, 0);
}

#[test]
fn exec_sync_gives_code_and_both_outputs() {
    let _node = Node::new("exec_sync_gives_code_and_both_outputs");
    let mut kubelet = Kubelet::new("exec");
    let pod = kubelet.run_pod("exec");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    let executed = kubelet.exec(&container, &sh("echo out; echo err >&2; exit 42"));
    assert_eq!(
        (
            executed.code,
            executed.stdout.as_str(),
            executed.stderr.as_str()
        ),
        (42, "out\n", "err\n")
    );
}

#[test]
fn logs_are_complete_however_fast_the_exit() {
    let _node = Node::new("logs_are_complete_however_fast_the_exit");
    let mut kubelet = Kubelet::new("logs");
    let pod = kubelet.run_pod("logs");
    let container = kubelet.run(&pod, "main", &sh("seq 1 500; echo last-error >&2; exit 3"));
    assert_eq!(kubelet.exit_code(&container), 3);
    let expected: String = (1..=500).map(|number| format!("{number}\n")).collect();
    eventually("the log is whole", || {
        (kubelet.log("main", 0, "stdout").len() >= expected.len()).then_some(())
    });
    assert_eq!(kubelet.log("main", 0, "stdout"), expected);
    assert_eq!(kubelet.log("main", 0, "stderr"), "last-error\n");
}

#[test]
fn container_restarts_in_place() {
    let _node = Node::new("container_restarts_in_place");
    let mut kubelet = Kubelet::new("restart");
    let pod = kubelet.run_pod("restart");
    let vmm = named("coffer-vmm");
    for attempt in 0..3 {
        let container =
            kubelet.create(&pod, "main", attempt, &sh("ls /mark; echo > /mark; exit 1"));
        kubelet.start(&container);
        assert_eq!(kubelet.exit_code(&container), 1);
        kubelet.remove(&container);
        assert_eq!(
            kubelet.log("main", attempt, "stdout"),
            "",
            "a restarted container begins with a fresh rootfs"
        );
    }
    assert_eq!(named("coffer-vmm"), vmm, "the VM stays");
}

#[test]
fn stop_sends_sigterm_and_then_sigkill() {
    let _node = Node::new("stop_sends_sigterm_and_then_sigkill");
    let mut kubelet = Kubelet::new("stop");
    let pod = kubelet.run_pod("stop");
    let polite = kubelet.run(
        &pod,
        "polite",
        &sh("trap 'exit 12' TERM; echo ready; while :; do sleep 0.1; done"),
    );
    let stubborn = kubelet.run(
        &pod,
        "stubborn",
        &sh("trap '' TERM; echo ready; while :; do sleep 0.1; done"),
    );
    for name in ["polite", "stubborn"] {
        eventually(&format!("the handler of {name} is in place"), || {
            kubelet
                .log(name, 0, "stdout")
                .contains("ready")
                .then_some(())
        });
    }
    kubelet.stop(&polite, Duration::from_secs(60));
    assert_eq!(kubelet.exit_code(&polite), 12);
    kubelet.stop(&stubborn, Duration::from_secs(1));
    assert_eq!(kubelet.exit_code(&stubborn), 137);
    kubelet.remove(&polite);
    kubelet.remove(&stubborn);
}

#[test]
fn pod_stops_and_is_removed_with_its_containers() {
    let _node = Node::new("pod_stops_and_is_removed_with_its_containers");
    let mut kubelet = Kubelet::new("stop-pod");
    let pod = kubelet.run_pod("stop-pod");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    kubelet.stop_pod(&pod);
    assert_eq!(kubelet.exit_code(&container), 137);
    assert_eq!(
        kubelet.pod_state(&pod),
        i32::from(v1::PodSandboxState::SandboxNotready)
    );
    assert_eq!(
        named("coffer-vmm"),
        Vec::<i32>::new(),
        "a stopped pod has no VM"
    );
    kubelet.stop_pod(&pod);
    kubelet.remove_pod(&pod);
}

#[test]
fn pod_without_containers_stops() {
    let _node = Node::new("pod_without_containers_stops");
    let mut kubelet = Kubelet::new("empty");
    let pod = kubelet.run_pod("empty");
    assert_eq!(
        kubelet.pod_state(&pod),
        i32::from(v1::PodSandboxState::SandboxReady)
    );
    kubelet.stop_pod(&pod);
    assert_eq!(
        kubelet.pod_state(&pod),
        i32::from(v1::PodSandboxState::SandboxNotready)
    );
}

#[test]
fn vm_is_sized_by_the_pods_limits() {
    let _node = Node::new("vm_is_sized_by_the_pods_limits");
    let mut kubelet = Kubelet::new("size");
    let pod = kubelet
        .run_pod_with("size", |config| {
            let linux = config.linux.as_mut().unwrap();
            linux.resources = Some(resources(256 << 20, 150_000));
        })
        .unwrap();
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    assert_eq!(kubelet.exec(&container, &["nproc"]).stdout, "2\n");
    let free = kubelet
        .exec(&container, &sh("grep MemTotal /proc/meminfo"))
        .stdout;
    let kib: u64 = free.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((256 << 10..320 << 10).contains(&kib), "{free}");
}

#[test]
fn pod_whose_vm_dies_is_not_ready_and_its_containers_have_exited() {
    let _node = Node::new("pod_whose_vm_dies_is_not_ready_and_its_containers_have_exited");
    let mut kubelet = Kubelet::new("vm-dies");
    let pod = kubelet.run_pod("vm-dies");
    let one = kubelet.run(&pod, "one", &["sleep", "infinity"]);
    let two = kubelet.run(&pod, "two", &["sleep", "infinity"]);
    let vmm = named("coffer-vmm")[0];
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vmm),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    assert_eq!(
        (kubelet.exit_code(&one), kubelet.exit_code(&two)),
        (137, 137)
    );
    let not_ready = i32::from(v1::PodSandboxState::SandboxNotready);
    eventually("the pod is not ready", || {
        (kubelet.pod_state(&pod) == not_ready).then_some(())
    });
}

#[test]
fn memory_limit_is_the_containers_own() {
    let _node = Node::new("memory_limit_is_the_containers_own");
    let mut kubelet = Kubelet::new("oom");
    let pod = kubelet.run_pod("oom");
    let hungry = kubelet
        .create_with(
            &pod,
            "hungry",
            0,
            &sh("dd if=/dev/zero of=/dev/shm/fill bs=1M count=60"),
            |config| {
                config.linux.as_mut().unwrap().resources = Some(resources(32 << 20, 0));
            },
        )
        .unwrap();
    kubelet.start(&hungry);
    // The shell survives its child: what it reports is the child's death.
    assert_ne!(kubelet.exit_code(&hungry), 0);
    assert_eq!(kubelet.status(&hungry).reason, "OOMKilled");
}

#[test]
fn user_capabilities_and_seccomp_of_the_container_are_applied() {
    let _node = Node::new("user_capabilities_and_seccomp_of_the_container_are_applied");
    let mut kubelet = Kubelet::new("security");
    let pod = kubelet.run_pod("security");
    let container = kubelet
        .create_with(&pod, "main", 0, &["sleep", "infinity"], |config| {
            let security = config
                .linux
                .as_mut()
                .unwrap()
                .security_context
                .as_mut()
                .unwrap();
            security.run_as_user = Some(v1::Int64Value { value: 1234 });
            security.supplemental_groups = vec![77];
            security.no_new_privs = true;
            security.readonly_rootfs = true;
            security.capabilities = Some(v1::Capability {
                drop_capabilities: vec!["ALL".to_owned()],
                ..Default::default()
            });
            let default = v1::security_profile::ProfileType::RuntimeDefault;
            security.seccomp = Some(v1::SecurityProfile {
                profile_type: i32::from(default),
                ..Default::default()
            });
        })
        .unwrap();
    kubelet.start(&container);
    let status = kubelet
        .exec(&container, &["cat", "/proc/self/status"])
        .stdout;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .trim_start_matches(':')
            .trim()
            .to_owned()
    };
    assert_eq!(field("Uid").split_whitespace().next(), Some("1234"));
    assert!(
        field("Groups")
            .split_whitespace()
            .any(|group| group == "77")
    );
    assert_eq!(field("CapBnd"), "0000000000000000");
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    assert_ne!(kubelet.exec(&container, &["touch", "/file"]).code, 0);
}

#[test]
fn host_namespaces_are_refused_with_a_reason() {
    let _node = Node::new("host_namespaces_are_refused_with_a_reason");
    let mut kubelet = Kubelet::new("host");
    let error = kubelet.run_pod_with("host", |config| {
        let security = config
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap();
        security.namespace_options.as_mut().unwrap().network = i32::from(v1::NamespaceMode::Node);
    });
    let message = error
        .err()
        .expect("a pod in the host's network must be refused")
        .message()
        .to_owned();
    assert!(message.contains("hostNetwork"), "{message}");
}
