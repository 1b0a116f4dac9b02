// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's spec for the guest: host paths become guest paths, and what a VM cannot give is refused.

use agent_proto::layout;
use ids::ContainerId;
use oci_spec::runtime::{Linux, LinuxResources, Process, Spec};

use crate::bundle::{ContainerSpec, MAX_SPEC_BYTES, Role, is_object};
use crate::error::SpecError;
use crate::host_mounts::HostMounts;
use crate::sizing::Limits;
use crate::{block_devices, devices, mounts, namespaces, refusals};

/// Profiles that containerd sets for every container of a node with AppArmor, or that mean "none".
const DEFAULT_APPARMOR: [&str; 3] = ["", "unconfined", "cri-containerd.apparmor.d"];

/// Translates a container's spec. See [`crate::Bundle::container`].
pub(crate) fn container(
    mut spec: Spec,
    id: &ContainerId,
    role: &Role,
    host: &HostMounts,
) -> Result<ContainerSpec, SpecError> {
    refusals::check(&spec)?;
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or(SpecError::Missing("process"))?;
    strip_host_labels(process)?;
    let oom_score_adj = oom_score_adj(process)?;
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
    if *role == Role::Standalone {
        // They are the pod's. A member may only repeat the pod's, which the guest checks.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    spec.set_annotations(None);
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let limits = Limits::from_resources(resources);
    let guest_spec = serde_json::to_vec(&spec).map_err(SpecError::Json)?;
    Ok(ContainerSpec {
        guest_spec,
        oom_score_adj,
        limits,
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
    is_object(json).map_err(SpecError::ExecJson)?;
    let mut process: Process = serde_json::from_slice(json).map_err(SpecError::ExecJson)?;
    strip_host_labels(&mut process)?;
    serde_json::to_vec(&process).map_err(SpecError::ExecJson)
}

/// The adjustment, which the kernel takes from -1000 to 1000 (proc(5)).
fn oom_score_adj(process: &Process) -> Result<Option<i32>, SpecError> {
    match process.oom_score_adj() {
        Some(value) if !(-1000..=1000).contains(&value) => {
            let reason = format!("{value} is not within -1000 and 1000: correct or remove it");
            Err(SpecError::unsupported("process.oomScoreAdj", reason))
        }
        valid => Ok(valid),
    }
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
    let asked = linux.namespaces().as_deref().unwrap_or_default();
    linux.set_namespaces(Some(namespaces::translate(asked, role)?));
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    if *role == Role::Standalone {
        // The guest's namespaces are this container's: its sysctls are the pod's.
        linux.set_sysctl(None);
    }
    devices::translate(linux)?;
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
    use oci_spec::runtime::LinuxNamespaceType;

    const NAMESPACES: &str = r#"[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network","path":"/proc/1/ns/net"}]"#;

    fn spec(process: &str, namespaces: &str, linux: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","hostname":"h","domainname":"d","annotations":{{"a":"b"}},
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
        assert_eq!((guest.hostname(), guest.domainname()), (&None, &None));
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
    fn oom_score_is_for_host_and_guest_and_within_the_kernels_bounds() {
        let json = |value: i32| spec(&format!(r#","oomScoreAdj":{value}"#), NAMESPACES, "");
        for value in [-1000, -997, 0, 1000] {
            let bundle = Bundle::parse(json(value).as_bytes()).unwrap();
            let container = bundle.container(&"c1".parse().unwrap(), &HostMounts::default());
            assert_eq!(container.unwrap().oom_score_adj, Some(value));
            let guest = translate(&json(value)).unwrap();
            assert_eq!(
                guest.process().as_ref().unwrap().oom_score_adj(),
                Some(value)
            );
        }
        for value in [-1001, 1001] {
            let error = refusal(&json(value));
            assert!(error.starts_with("process.oomScoreAdj"), "{error}");
        }
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
    fn member_keeps_its_names_for_the_guest_to_check() {
        let json = spec("", NAMESPACES, "").replace(
            r#""a":"b""#,
            r#""io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"p""#,
        );
        let guest = translate(&json).unwrap();
        assert_eq!(guest.hostname().as_deref(), Some("h"));
    }

    #[test]
    fn user_namespace_hooks_and_foreign_sysctls_are_refused() {
        let namespaces = NAMESPACES.replace("]", r#",{"type":"user"}]"#);
        assert!(refusal(&spec("", &namespaces, "")).contains("hostUsers"));
        let sysctl = r#","sysctl":{"vm.swappiness":"1"}"#;
        assert!(refusal(&spec("", NAMESPACES, sysctl)).contains("vm.swappiness"));
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
