// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's spec for the guest: host paths become guest paths, and what a VM cannot give is refused.

use agent_proto::layout;
use ids::ContainerId;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResources, Process, Spec,
};

use crate::bundle::{ContainerSpec, MAX_SPEC_BYTES, Role};
use crate::error::SpecError;
use crate::host_mounts::HostMounts;
use crate::{block_devices, mounts};

/// Profiles that containerd sets for every container of a node with AppArmor, or that mean "none".
const DEFAULT_APPARMOR: [&str; 3] = ["", "unconfined", "cri-containerd.apparmor.d"];

/// Character devices that the guest has of its own, by major and minor: null, zero, full, random, urandom, tty, ptmx
/// (the OCI runtime spec's default devices), net/tun and fuse.
const GUEST_DEVICES: [(i64, i64); 9] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (5, 2),
    (10, 200),
    (10, 229),
];

/// Translates a container's spec. See [`crate::Bundle::container`].
pub(crate) fn container(
    mut spec: Spec,
    id: &ContainerId,
    role: &Role,
    host: &HostMounts,
) -> Result<ContainerSpec, SpecError> {
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or(SpecError::Missing("process"))?;
    strip_host_labels(process)?;
    let root = spec.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    let host_rootfs = root.path().clone();
    root.set_path(layout::rootfs(id).into());

    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or(SpecError::Missing("linux"))?;
    let block_devices = block_devices::take(linux)?;
    translate_linux(linux, role)?;

    let (mounts, needs) = mounts::translate(id, spec.mounts().clone().unwrap_or_default(), host)?;
    spec.set_mounts(Some(mounts));
    spec.set_hostname(None);
    spec.set_domainname(None);
    spec.set_annotations(None);
    let guest_spec = serde_json::to_vec(&spec).map_err(SpecError::Json)?;
    Ok(ContainerSpec {
        guest_spec,
        copies: needs.copies,
        live: needs.live,
        empty_dirs: needs.empty_dirs,
        sub_paths: needs.sub_paths,
        host_folders: needs.host_folders,
        block_devices,
        host_rootfs,
    })
}

/// The process of an exec for the guest, as JSON.
///
/// # Errors
/// [`SpecError::ExecJson`] or [`SpecError::TooLong`] if the bytes are no process, [`SpecError::Unsupported`] if it asks for what a guest
/// does not have.
pub fn exec_process(json: &[u8]) -> Result<Vec<u8>, SpecError> {
    if json.len() > MAX_SPEC_BYTES {
        return Err(SpecError::TooLong {
            len: json.len(),
            max: MAX_SPEC_BYTES,
        });
    }
    let mut process: Process = serde_json::from_slice(json).map_err(SpecError::ExecJson)?;
    strip_host_labels(&mut process)?;
    serde_json::to_vec(&process).map_err(SpecError::ExecJson)
}

fn strip_host_labels(process: &mut Process) -> Result<(), SpecError> {
    if let Some(profile) = process.apparmor_profile()
        && !DEFAULT_APPARMOR.contains(&profile.as_str())
    {
        let reason = format!(
            "the guest has no AppArmor, so profile {profile:?} cannot be applied: remove it"
        );
        return Err(SpecError::unsupported("process.apparmorProfile", reason));
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}

fn translate_linux(linux: &mut Linux, role: &Role) -> Result<(), SpecError> {
    linux.set_namespaces(Some(namespaces(
        linux.namespaces().as_deref().unwrap_or_default(),
    )?));
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    if *role == Role::Standalone {
        // The guest's namespaces are this container's: its sysctls are the pod's.
        linux.set_sysctl(None);
    }
    for device in linux.devices().iter().flatten() {
        check_device(device)?;
    }
    if let Some(resources) = linux.resources() {
        check_resources(resources)?;
    }
    let unsupported = [
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.netDevices", linux.net_devices().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
        (
            "linux.timeOffsets",
            linux
                .time_offsets()
                .as_ref()
                .is_some_and(|offsets| !offsets.is_empty()),
        ),
    ];
    for (field, present) in unsupported {
        if present {
            return Err(SpecError::unsupported(
                field,
                "a guest does not have it: remove it",
            ));
        }
    }
    Ok(())
}

/// The namespaces for the guest. The guest's own network, ipc and uts namespaces are the pod's, so those go; what is
/// left is made anew for each container.
fn namespaces(asked: &[LinuxNamespace]) -> Result<Vec<LinuxNamespace>, SpecError> {
    refuse_host_namespaces(asked)?;
    let mut guest = Vec::new();
    for namespace in asked {
        match namespace.typ() {
            LinuxNamespaceType::Network | LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => {}
            LinuxNamespaceType::Cgroup => {}
            kind if namespace.path().is_some() => {
                let field = format!("linux.namespaces[{kind}]");
                let reason = "sharing another container's namespace is not supported yet: give each its own \
                              (shareProcessNamespace: false)";
                return Err(SpecError::unsupported(field, reason));
            }
            _ => guest.push(namespace.clone()),
        }
    }
    // A container must not see the guest's cgroups, whatever cgroup version the node has.
    guest.push(new_namespace(LinuxNamespaceType::Cgroup)?);
    if !has(asked, LinuxNamespaceType::Mount) {
        guest.push(new_namespace(LinuxNamespaceType::Mount)?);
    }
    Ok(guest)
}

/// Refuses a spec that leaves out a namespace, for then it means the host's.
///
/// # Errors
/// [`SpecError::HostNamespace`].
pub(crate) fn refuse_host_namespaces(asked: &[LinuxNamespace]) -> Result<(), SpecError> {
    let pods = [
        (LinuxNamespaceType::Network, "network", "hostNetwork"),
        (LinuxNamespaceType::Ipc, "ipc", "hostIPC"),
        (LinuxNamespaceType::Pid, "pid", "hostPID"),
    ];
    match pods.into_iter().find(|(kind, _, _)| !has(asked, *kind)) {
        Some((_, name, field)) => Err(SpecError::HostNamespace(name, field)),
        None => Ok(()),
    }
}

fn has(asked: &[LinuxNamespace], kind: LinuxNamespaceType) -> bool {
    asked.iter().any(|namespace| namespace.typ() == kind)
}

fn new_namespace(kind: LinuxNamespaceType) -> Result<LinuxNamespace, SpecError> {
    LinuxNamespaceBuilder::default()
        .typ(kind)
        .build()
        .map_err(|error| SpecError::unsupported("linux.namespaces", error.to_string()))
}

fn check_device(device: &LinuxDevice) -> Result<(), SpecError> {
    let guests = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U)
        && GUEST_DEVICES.contains(&(device.major(), device.minor()));
    if guests || device.typ() == LinuxDeviceType::P {
        return Ok(());
    }
    let field = format!("linux.devices[{}]", device.path().display());
    Err(SpecError::unsupported(
        field,
        "a device of the host cannot be passed to a pod: remove it, and set privileged_without_host_devices in \
         containerd's runtime options for privileged pods",
    ))
}

pub(crate) fn check_resources(resources: &LinuxResources) -> Result<(), SpecError> {
    let cpu = resources.cpu().as_ref();
    let memory = resources.memory().as_ref();
    let block = resources.block_io().as_ref();
    let throttled = block.is_some_and(|block| {
        [
            block
                .throttle_read_bps_device()
                .as_ref()
                .map_or(0, Vec::len),
            block
                .throttle_write_bps_device()
                .as_ref()
                .map_or(0, Vec::len),
            block
                .throttle_read_iops_device()
                .as_ref()
                .map_or(0, Vec::len),
            block
                .throttle_write_iops_device()
                .as_ref()
                .map_or(0, Vec::len),
            block.weight_device().as_ref().map_or(0, Vec::len),
        ]
        .iter()
        .any(|count| *count > 0)
    });
    let refused = [
        (
            "linux.resources.cpu.realtimeRuntime",
            cpu.and_then(|cpu| cpu.realtime_runtime())
                .is_some_and(|runtime| runtime != 0),
            "cgroup v2 has no real-time limits: remove it",
        ),
        (
            "linux.resources.network",
            resources.network().as_ref().is_some_and(|network| {
                network.class_id().is_some()
                    || network
                        .priorities()
                        .as_ref()
                        .is_some_and(|list| !list.is_empty())
            }),
            "cgroup v2 has no network classes: remove it",
        ),
        (
            "linux.resources.rdma",
            resources
                .rdma()
                .as_ref()
                .is_some_and(|rdma| !rdma.is_empty()),
            "a guest has no RDMA device: remove it",
        ),
        (
            "linux.resources.memory.disableOOMKiller",
            memory
                .and_then(|memory| memory.disable_oom_killer())
                .unwrap_or(false),
            "cgroup v2 cannot turn the OOM killer off: remove it",
        ),
        (
            "linux.resources.blockIO",
            throttled,
            "limits by the host's device numbers mean nothing in a guest: remove them",
        ),
    ];
    match refused.into_iter().find(|(_, present, _)| *present) {
        Some((field, _, reason)) => Err(SpecError::unsupported(field, reason)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bundle;

    const NAMESPACES: &str = r#"[{"type":"pid"},{"type":"ipc","path":"/proc/1/ns/ipc"},{"type":"uts"},
        {"type":"mount"},{"type":"network","path":"/proc/1/ns/net"}]"#;

    fn spec(process: &str, namespaces: &str, linux: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","hostname":"h","annotations":{{"a":"b"}},
            "root":{{"path":"rootfs","readonly":true}},
            "process":{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}{process}}},
            "linux":{{"cgroupsPath":"/kubepods/x","namespaces":{namespaces}{linux}}}}}"#
        )
    }

    fn translate(json: &str) -> Result<Spec, SpecError> {
        let spec = Bundle::parse(json.as_bytes())?
            .container(&"c1".parse().unwrap(), &HostMounts::default())?;
        Ok(serde_json::from_slice(&spec.guest_spec).unwrap())
    }

    fn refusal(json: &str) -> String {
        translate(json).unwrap_err().to_string()
    }

    #[test]
    fn nothing_of_the_host_is_left_in_the_guests_spec() {
        let guest = translate(&spec("", NAMESPACES, "")).unwrap();
        assert_eq!(
            guest.root().as_ref().unwrap().path(),
            std::path::Path::new("/run/coffer/containers/c1/rootfs")
        );
        assert_eq!(guest.root().as_ref().unwrap().readonly(), Some(true));
        assert_eq!(guest.annotations(), &None);
        assert_eq!(guest.hostname(), &None);
        let linux = guest.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path(), &None);
        let kinds: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|namespace| namespace.typ())
            .collect();
        assert_eq!(
            kinds,
            [
                LinuxNamespaceType::Pid,
                LinuxNamespaceType::Mount,
                LinuxNamespaceType::Cgroup
            ]
        );
    }

    #[test]
    fn host_namespaces_are_refused_with_the_field_to_change() {
        for (missing, field) in [
            ("network", "hostNetwork"),
            ("ipc", "hostIPC"),
            ("pid", "hostPID"),
        ] {
            let list: Vec<String> = ["network", "ipc", "pid", "mount"]
                .iter()
                .filter(|kind| **kind != missing)
                .map(|kind| format!("{{\"type\":\"{kind}\"}}"))
                .collect();
            let error = refusal(&spec("", &format!("[{}]", list.join(",")), ""));
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn default_apparmor_profile_is_left_out_and_another_refused() {
        let guest = translate(&spec(
            r#","apparmorProfile":"cri-containerd.apparmor.d""#,
            NAMESPACES,
            "",
        ))
        .unwrap();
        assert_eq!(guest.process().as_ref().unwrap().apparmor_profile(), &None);
        let error = refusal(&spec(r#","apparmorProfile":"mine""#, NAMESPACES, ""));
        assert!(error.starts_with("process.apparmorProfile"), "{error}");
    }

    #[test]
    fn host_device_is_refused_and_dev_null_is_not() {
        let device = |major, minor| {
            format!(
                r#","devices":[{{"path":"/dev/x","type":"c","major":{major},"minor":{minor}}}]"#
            )
        };
        assert!(translate(&spec("", NAMESPACES, &device(1, 3))).is_ok());
        assert!(
            refusal(&spec("", NAMESPACES, &device(10, 232))).starts_with("linux.devices[/dev/x]")
        );
    }

    #[test]
    fn resources_that_cannot_be_applied_are_refused_by_name() {
        for (json, field) in [
            (r#"{"cpu":{"realtimeRuntime":5}}"#, "realtimeRuntime"),
            (r#"{"network":{"classID":1}}"#, "network"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "disableOOMKiller",
            ),
            (r#"{"rdma":{"m":{"hcaHandles":1}}}"#, "rdma"),
            (
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#,
                "blockIO",
            ),
        ] {
            let error = refusal(&spec("", NAMESPACES, &format!(r#","resources":{json}"#)));
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn shared_pid_namespace_is_refused() {
        let namespaces =
            r#"[{"type":"pid","path":"/proc/1/ns/pid"},{"type":"ipc"},{"type":"network"}]"#;
        assert!(refusal(&spec("", namespaces, "")).contains("shareProcessNamespace"));
    }

    #[test]
    fn spec_without_process_root_or_linux_is_refused_by_name() {
        for (json, field) in [
            (r#"{"ociVersion":"1.0.2"}"#, "process"),
            (
                r#"{"ociVersion":"1.0.2","process":{"cwd":"/","user":{"uid":0,"gid":0}}}"#,
                "root",
            ),
        ] {
            assert!(refusal(json).contains(field));
        }
    }

    #[test]
    fn exec_process_loses_host_labels_only() {
        let json = br#"{"cwd":"/","args":["id"],"user":{"uid":5,"gid":0},"selinuxLabel":"x:y","terminal":true}"#;
        let process: Process = serde_json::from_slice(&exec_process(json).unwrap()).unwrap();
        assert_eq!(process.selinux_label(), &None);
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.user().uid(), 5);
        assert!(matches!(exec_process(b"[]"), Err(SpecError::ExecJson(_))));
    }
}
