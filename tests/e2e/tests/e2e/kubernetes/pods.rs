// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods: what kubelet is told of them, what sets them up, what is refused.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use e2e::{named, run};
use k8s_cri::v1;
use tonic::Code;

use super::client::{Running, until};
use super::shared::Shared;
use crate::cri_client::{Kubelet, Pod, call};
use crate::observability::{VCPUS, add_config};
use crate::volumes::{IDLE, PodDir, mount};

/// Where kubelet puts a burstable pod with the cgroupfs driver.
const CGROUP: &str = "/kubepods/burstable/pod1b2c3d4e";

static POD: Shared<InCgroup> = Shared::new(InCgroup::new);

/// A pod in a cgroup that kubelet has made for it.
struct InCgroup {
    running: Running,
    // After the pod.
    _cgroup: PodCgroup,
}

/// A cgroup that kubelet has made, by its path; it goes with its empty parents.
struct PodCgroup(&'static str);

impl PodCgroup {
    fn new(path: &'static str) -> Self {
        fs::create_dir_all(format!("/sys/fs/cgroup{path}")).unwrap();
        Self(path)
    }
}

impl InCgroup {
    fn new() -> Self {
        let cgroup = PodCgroup::new(CGROUP);
        let of_pod = |config: &mut v1::PodSandboxConfig| {
            config.labels = map("app", "shop");
            config.annotations = map("kubernetes.io/config.source", "api");
            CGROUP.clone_into(&mut config.linux.as_mut().unwrap().cgroup_parent);
        };
        Self {
            running: Running::with("pods", of_pod, |_| ()),
            _cgroup: cgroup,
        }
    }
}

impl Deref for InCgroup {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for path in Path::new(self.0)
            .ancestors()
            .filter(|path| path.parent().is_some())
        {
            let path = format!("/sys/fs/cgroup{}", path.display());
            if let Err(error) = fs::remove_dir(&path) {
                eprintln!("{path} is not removed: {error}");
            }
        }
    }
}

fn map(key: &str, value: &str) -> HashMap<String, String> {
    HashMap::from([(key.to_owned(), value.to_owned())])
}

/// What the answer to a pod with these namespaces is.
fn refusal(name: &str, change: impl FnOnce(&mut v1::NamespaceOption)) -> String {
    let mut kubelet = Kubelet::new(name);
    let refused = kubelet.run_pod_with(name, |config| {
        let linux = config.linux.as_mut().unwrap();
        let security = linux.security_context.as_mut().unwrap();
        change(security.namespace_options.as_mut().unwrap());
    });
    refused.err().unwrap().message().to_owned()
}

#[test]
fn attributes_of_a_pod_are_kept() {
    let pod = POD.case();
    let status = pod.kubelet.try_pod_status(&pod.pod.id).unwrap();
    assert_eq!(
        status.metadata.unwrap(),
        v1::PodSandboxMetadata {
            name: "pods".to_owned(),
            uid: "uid-pods".to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }
    );
    assert_eq!(status.labels, map("app", "shop"));
    assert_eq!(
        status.annotations,
        map("kubernetes.io/config.source", "api")
    );
    assert_eq!(status.runtime_handler, "coffer");
    assert!(status.created_at > 0);
    let namespaces = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(namespaces.network(), v1::NamespaceMode::Pod);
    assert_eq!(namespaces.pid(), v1::NamespaceMode::Container);
}

#[test]
fn pods_are_listed_by_id_state_and_label() {
    let pod = POD.case();
    let listed = |filter: v1::PodSandboxFilter| pod.kubelet.list_pods(filter);
    let by_id = v1::PodSandboxFilter {
        id: pod.pod.id.clone(),
        ..Default::default()
    };
    assert_eq!(listed(by_id.clone()), ["pods"]);
    let in_state = |state: v1::PodSandboxState| v1::PodSandboxFilter {
        state: Some(v1::PodSandboxStateValue {
            state: i32::from(state),
        }),
        ..by_id.clone()
    };
    assert_eq!(
        listed(in_state(v1::PodSandboxState::SandboxReady)),
        ["pods"]
    );
    assert_eq!(
        listed(in_state(v1::PodSandboxState::SandboxNotready)),
        [""; 0]
    );
    let labelled = |value: &str| v1::PodSandboxFilter {
        label_selector: map("app", value),
        ..Default::default()
    };
    assert_eq!(listed(labelled("shop")), ["pods"]);
    assert_eq!(listed(labelled("bank")), [""; 0]);
}

#[test]
fn name_of_a_pod_is_taken_once() {
    let pod = POD.case();
    let mut second = Kubelet::new("pods-second");
    let error = second.run_pod_with("pods", |_| ()).err().unwrap();
    assert!(error.message().contains("is reserved for"), "{error}");
    assert_eq!(pod.exec("exit 3").code, 3);
}

#[test]
fn unknown_runtime_handler_is_refused_by_name() {
    let pod = POD.case();
    let metadata = v1::PodSandboxMetadata {
        name: "unknown".to_owned(),
        uid: "uid-unknown".to_owned(),
        namespace: "default".to_owned(),
        attempt: 0,
    };
    let request = v1::RunPodSandboxRequest {
        config: Some(v1::PodSandboxConfig {
            metadata: Some(metadata),
            ..Default::default()
        }),
        runtime_handler: "strongbox".to_owned(),
    };
    let error = call!(pod.kubelet, run_pod_sandbox, request).unwrap_err();
    assert!(error.message().contains("\"strongbox\""), "{error}");
}

#[test]
fn host_pid_is_refused_with_a_reason() {
    let _pod = POD.case();
    let node = i32::from(v1::NamespaceMode::Node);
    let message = refusal("host-pid", |options| options.pid = node);
    assert!(message.contains("hostPID"), "{message}");
}

#[test]
fn host_ipc_is_refused_with_a_reason() {
    let _pod = POD.case();
    let node = i32::from(v1::NamespaceMode::Node);
    let message = refusal("host-ipc", |options| options.ipc = node);
    assert!(message.contains("hostIPC"), "{message}");
}

#[test]
fn every_process_of_the_pod_on_the_host_is_in_the_pods_cgroup() {
    let pod = POD.case();
    let dir = PodDir::new("pods");
    let claim = mount(&dir.claim("served"), "/data", false);
    let served = pod.kubelet.run_with(&pod.pod, "served", &IDLE, |config| {
        config.mounts = vec![claim]
    });
    for program in [
        "coffer-vmm",
        "containerd-shim-coffer-v2",
        "coffer-virtiofsd",
    ] {
        let processes = named(program);
        assert_eq!(processes.len(), 1, "{program}: {processes:?}");
        let process = processes[0];
        let cgroup = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
        assert!(
            cgroup.starts_with(&format!("0::{CGROUP}/")),
            "{program}: {cgroup}"
        );
        for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let of_task = fs::read_to_string(task.unwrap().path().join("cgroup")).unwrap();
            assert!(
                of_task.starts_with(&format!("0::{CGROUP}/")),
                "a thread of {program}: {of_task}"
            );
        }
    }
    pod.discard(&served);
}

/// A pod that asks for so many virtual CPUs.
fn annotated(kubelet: &mut Kubelet, name: &str, vcpus: &str) -> Result<Pod, tonic::Status> {
    kubelet.run_pod_with(name, |config| config.annotations = map(VCPUS, vcpus))
}

#[test]
fn annotation_that_the_node_allows_is_obeyed() {
    let pod = POD.case();
    let allow = format!("[annotations]\nallow = [{VCPUS:?}]\n");
    let _config = add_config(pod.node(), &allow);
    let mut kubelet = Kubelet::new("allowed");
    let allowed = annotated(&mut kubelet, "allowed", "2").unwrap();
    let main = kubelet.run(&allowed, "main", &IDLE);
    assert_eq!(kubelet.exec(&main, &["nproc"]).stdout, "2\n");
}

#[test]
fn annotation_that_the_node_does_not_allow_is_refused_by_name() {
    let _pod = POD.case();
    let refused = annotated(&mut Kubelet::new("refused"), "refused", "2");
    let message = refused.err().unwrap().message().to_owned();
    assert!(
        message.contains(VCPUS) && message.contains("annotations.allow in the node's config"),
        "{message}"
    );
}

#[test]
fn annotation_out_of_its_bounds_is_refused_with_them() {
    let pod = POD.case();
    let allow = format!("[annotations]\nallow = [{VCPUS:?}]\n");
    let _config = add_config(pod.node(), &allow);
    for beyond in ["0", "65", "many"] {
        let refused = annotated(&mut Kubelet::new("beyond"), "beyond", beyond);
        let message = refused.err().unwrap().message().to_owned();
        assert!(
            message.contains(VCPUS) && message.contains("a whole number from 1 to 64"),
            "{message}"
        );
    }
}

/// With the paths of kubelet's systemd driver, and no systemd: what that does to the slice is done here.
#[test]
fn pod_in_a_slice_is_in_a_scope_of_its_own_and_keeps_its_controllers() {
    const SLICE: &str =
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod5f6a7b8c.slice";
    let _pod = POD.case();
    let _slice = PodCgroup::new(SLICE);
    let mut kubelet = Kubelet::new("slice");
    let pod = kubelet
        .run_pod_with("slice", |config| {
            SLICE.clone_into(&mut config.linux.as_mut().unwrap().cgroup_parent);
        })
        .unwrap();
    let id = kubelet.run(&pod, "main", &IDLE);
    let scope = format!("{SLICE}/cri-containerd-{}.scope", pod.id);
    let inside = |pid: &i32| {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        cgroup == format!("0::{scope}/coffer\n")
    };
    for program in ["coffer-vmm", "containerd-shim-coffer-v2"] {
        let processes = named(program).into_iter().filter(inside).count();
        assert_eq!(processes, 1, "{program}");
    }
    let control = format!("/sys/fs/cgroup{SLICE}/cgroup.subtree_control");
    for controller in ["cpu", "io", "memory", "pids"] {
        let error = fs::write(&control, format!("-{controller}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{controller}");
    }
    let memory = fs::read_to_string(format!("/sys/fs/cgroup{scope}/memory.current")).unwrap();
    assert!(memory.trim().parse::<u64>().unwrap() > 1 << 20, "{memory}");
    kubelet.stop(&id, Duration::ZERO);
    kubelet.try_stop_pod(&pod.id).unwrap();
    kubelet.try_remove_pod(&pod.id).unwrap();
    assert!(!Path::new(&format!("/sys/fs/cgroup{scope}")).exists());
}

#[test]
fn shared_memory_of_a_pod_is_64_mib_and_open_to_all() {
    let pod = POD.case();
    let script = "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; stat -c %a /dev/shm";
    assert_eq!(pod.output(script), "65536\n1777\n");
    let full = pod.exec("dd if=/dev/zero of=/dev/shm/fill bs=1M count=65");
    assert!(full.stderr.contains("No space left"), "{full:?}");
    pod.output("rm /dev/shm/fill");
}

#[test]
fn pod_status_is_ready_with_the_address_that_it_has() {
    let pod = POD.case();
    let status = pod.kubelet.try_pod_status(&pod.pod.id).unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
    let ip = status.network.unwrap().ip;
    let inside = pod.output("ip -o -4 addr show dev eth0 | tr -s ' ' | cut -d' ' -f4");
    assert_eq!(inside, format!("{ip}/16\n"));
}

#[test]
fn pod_that_is_removed_is_not_found_and_its_name_is_free() {
    let pod = POD.case();
    let mut kubelet = Kubelet::new("renewed");
    let first = kubelet.run_pod("renewed");
    let container = kubelet.run(&first, "main", &IDLE);
    kubelet.stop_pod(&first);
    kubelet.remove_pod(&first);
    assert_eq!(
        kubelet.try_pod_status(&first.id).unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        kubelet.try_status(&container).unwrap_err().code(),
        Code::NotFound
    );
    let second = kubelet.run_pod("renewed");
    assert_ne!(first.id, second.id);
    assert_eq!(
        kubelet.list(of(&second.id)),
        [""; 0],
        "nothing of the first is left"
    );
    // And two pods are two machines.
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let container = kubelet.run(&second, "main", &IDLE);
    let other = kubelet.exec(&container, &["sh", "-c", boot_id]).stdout;
    assert_ne!(other, pod.output(boot_id));
    assert_ne!(kubelet.pod_ip(&second), pod.kubelet.pod_ip(&pod.pod));
}

fn of(pod: &str) -> v1::ContainerFilter {
    v1::ContainerFilter {
        pod_sandbox_id: pod.to_owned(),
        ..Default::default()
    }
}

#[test]
fn safe_sysctls_of_a_pod_are_set_in_its_guest() {
    let pod = POD.case();
    let mut kubelet = Kubelet::new("sysctls");
    let sysctls = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "10000"),
        ("fs.mqueue.msg_max", "20"),
        ("net.ipv4.ip_local_port_range", "2000\t65000"),
        ("net.ipv4.ping_group_range", "0\t1000"),
        ("net.ipv4.tcp_syncookies", "0"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.core.somaxconn", "1000"),
    ];
    let with = kubelet.run_pod_with("sysctls", |config| {
        let sysctls = sysctls.map(|(key, value)| (key.to_owned(), value.replace('\t', " ")));
        config.linux.as_mut().unwrap().sysctls = HashMap::from(sysctls);
    });
    let container = kubelet.run(&with.unwrap(), "main", &IDLE);
    for (key, value) in sysctls {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let of_pod = kubelet.exec(&container, &["cat", &path]).stdout;
        assert_eq!(of_pod.trim_end(), value, "{key}");
        let of_other = pod.output(&format!("cat {path}"));
        assert_ne!(of_other.trim_end(), value, "{key} of another pod");
        let of_node = run("cat", &[&path]).stdout;
        assert_ne!(of_node.trim_end(), value, "{key} of the node");
    }
}

#[test]
fn sysctl_that_is_not_the_pods_is_refused_by_name() {
    let _pod = POD.case();
    let before = named("coffer-vmm").len();
    let mut kubelet = Kubelet::new("no-sysctl");
    for key in [
        "vm.max_map_count",
        "kernel.pid_max",
        "kernel.shm_no_such_thing",
        "net.ipv4.no_such_parameter",
    ] {
        let refused = kubelet.run_pod_with("no-sysctl", |config| {
            config.linux.as_mut().unwrap().sysctls = map(key, "1");
        });
        let message = refused.err().unwrap().message().to_owned();
        assert!(
            message.contains(key) || message.contains(&key.replace('.', "/")),
            "{message}"
        );
    }
    until("nothing of it runs", || named("coffer-vmm").len() == before);
}

#[test]
fn figures_of_a_pod_hold_those_of_its_containers() {
    let pod = POD.case();
    let figures = pod.kubelet.pod_stats(&pod.pod.id);
    assert_eq!(figures.attributes.unwrap().id, pod.pod.id);
    let linux = figures.linux.unwrap();
    let names: Vec<String> = linux
        .containers
        .into_iter()
        .map(|stats| stats.attributes.unwrap().metadata.unwrap().name)
        .collect();
    assert_eq!(names, ["main"]);
    assert!(linux.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
}

#[test]
fn network_figures_of_a_pod_are_those_of_its_interface() {
    let pod = POD.case();
    let received = || {
        let linux = pod.kubelet.pod_stats(&pod.pod.id).linux.unwrap();
        let interface = linux.network.unwrap().default_interface.unwrap();
        assert_eq!(interface.name, "eth0");
        (
            interface.rx_bytes.unwrap().value,
            interface.tx_bytes.unwrap().value,
        )
    };
    let before = received();
    pod.output("ping -c 4 -s 1000 10.88.0.1");
    let after = received();
    assert!(after.0 - before.0 >= 4 * 1000, "{before:?} {after:?}");
    assert!(after.1 - before.1 >= 4 * 1000, "{before:?} {after:?}");
}
