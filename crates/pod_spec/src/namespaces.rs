// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The namespaces of a container: which are the pod's own, which are made anew, and which a VM does not have.
//!
//! | asked for | what the container gets in the guest |
//! |---|---|
//! | network | the guest's own, which is the pod's |
//! | ipc, uts | the guest's own, which are the pod's; a member of a pod that leaves the path out has its own |
//! | pid without a path | a namespace of its own |
//! | pid, path to the pod's sandbox process | the pod's (`shareProcessNamespace: true`) |
//! | pid, path to another container's process | that container's (`kubectl debug --target`) |
//! | mount, cgroup | always namespaces of its own |
//! | user | refused |
//! | none, where the field is left out | refused: it would be the node's; the guest's if the node's config says so |

use std::path::Path;

use agent_proto::layout;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use crate::bundle::Role;
use crate::error::SpecError;

/// The pids that containerd is told for processes in a guest begin here: `PID_MAX_LIMIT` of 64-bit Linux, which no
/// process of the host reaches (docs/decisions/0004-pids.md).
const FIRST_GUEST_PID: u32 = 4_194_304;

/// As CRI names the pod's: any process of the host's below [`FIRST_GUEST_PID`] stands for the sandbox.
const SANDBOX_PID_PATH: &str = "/proc/1/ns/pid";
const SANDBOX_IPC_PATH: &str = "/proc/1/ns/ipc";

/// The namespaces for the guest.
///
/// # Errors
/// [`SpecError::HostNamespace`] or [`SpecError::Unsupported`].
pub(crate) fn translate(
    asked: &[LinuxNamespace],
    role: &Role,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    check(asked)?;
    let mut guest = Vec::new();
    for namespace in asked {
        let kind = namespace.typ();
        let path = namespace
            .path()
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty());
        match (kind, path, role) {
            (LinuxNamespaceType::Network | LinuxNamespaceType::Cgroup, _, _)
            | (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, Some(_), Role::Member(_))
            | (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, None, Role::Standalone) => {}
            (LinuxNamespaceType::Pid, Some(path), Role::Member(_)) => {
                guest.push(shared_pid_namespace(path)?);
            }
            (_, Some(path), _) => return Err(refuse_path(kind, path)),
            (_, None, _) => guest.push(namespace.clone()),
        }
    }
    // A container must not see the guest's cgroups, whatever cgroup version the node has.
    guest.push(new_namespace(LinuxNamespaceType::Cgroup, None)?);
    if !has(asked, LinuxNamespaceType::Mount) {
        guest.push(new_namespace(LinuxNamespaceType::Mount, None)?);
    }
    Ok(guest)
}

/// Adds what a member of a pod leaves out that containerd's Sandbox API describes: the network is the pod's, and what is
/// not asked to be shared by a path is the container's own.
pub(crate) fn of_described_member(asked: &mut Vec<LinuxNamespace>) -> Result<(), SpecError> {
    for kind in [
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Pid,
    ] {
        if !has(asked, kind) {
            asked.push(new_namespace(kind, None)?);
        }
    }
    Ok(())
}

/// Adds what the container leaves out to be in the node's, where the node's config has it be the guest's: a member's
/// processes are in the pod's PID namespace then. A pod without a network stays one that is refused.
pub(crate) fn of_guest(asked: &mut Vec<LinuxNamespace>, role: &Role) -> Result<(), SpecError> {
    if !has(asked, LinuxNamespaceType::Pid) {
        let shared = matches!(role, Role::Member(_)).then(|| SANDBOX_PID_PATH.to_owned());
        asked.push(new_namespace(LinuxNamespaceType::Pid, shared)?);
    }
    if !has(asked, LinuxNamespaceType::Ipc) {
        let shared = matches!(role, Role::Member(_)).then(|| SANDBOX_IPC_PATH.to_owned());
        asked.push(new_namespace(LinuxNamespaceType::Ipc, shared)?);
    }
    if *role == Role::Standalone && !has(asked, LinuxNamespaceType::Network) {
        asked.push(new_namespace(LinuxNamespaceType::Network, None)?);
    }
    Ok(())
}

/// Refuses a spec that leaves out a namespace, for then it means the host's, and one with a user namespace.
///
/// # Errors
/// [`SpecError::HostNamespace`] or [`SpecError::Unsupported`].
pub(crate) fn check(asked: &[LinuxNamespace]) -> Result<(), SpecError> {
    refuse_hosts(asked)?;
    if has(asked, LinuxNamespaceType::User) {
        return Err(SpecError::unsupported(
            "linux.namespaces[user]",
            "a pod cannot have a user namespace inside its VM, which already separates its root from the node's: leave \
             out hostUsers: false",
        ));
    }
    Ok(())
}

fn refuse_hosts(asked: &[LinuxNamespace]) -> Result<(), SpecError> {
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

/// CRI names the namespace by the pid that containerd knows of the sandbox or of the target container.
fn shared_pid_namespace(path: &Path) -> Result<LinuxNamespace, SpecError> {
    let pid = path
        .to_str()
        .and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/pid"))
        .and_then(|pid| pid.parse::<u32>().ok())
        .ok_or_else(|| refuse_path(LinuxNamespaceType::Pid, path))?;
    let place = match pid.checked_sub(FIRST_GUEST_PID) {
        // The sandbox's process on the host stands for the pod; a pod in the host's namespace has been refused before.
        None => layout::POD_PID_NAMESPACE.to_owned(),
        Some(guest_pid) => layout::pid_namespace_of(guest_pid),
    };
    new_namespace(LinuxNamespaceType::Pid, Some(place))
}

fn refuse_path(kind: LinuxNamespaceType, path: &Path) -> SpecError {
    SpecError::unsupported(
        format!("linux.namespaces[{kind}].path"),
        format!(
            "{} is a namespace of the host, which a VM does not have: leave the path out",
            path.display()
        ),
    )
}

fn has(asked: &[LinuxNamespace], kind: LinuxNamespaceType) -> bool {
    asked.iter().any(|namespace| namespace.typ() == kind)
}

fn new_namespace(
    kind: LinuxNamespaceType,
    path: Option<String>,
) -> Result<LinuxNamespace, SpecError> {
    let mut namespace = LinuxNamespaceBuilder::default()
        .typ(kind)
        .build()
        .map_err(|error| SpecError::unsupported("linux.namespaces", error.to_string()))?;
    namespace.set_path(path.map(Into::into));
    Ok(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str, role: &Role) -> Result<Vec<(String, Option<String>)>, String> {
        let asked: Vec<LinuxNamespace> = serde_json::from_str(json).unwrap();
        let guest = translate(&asked, role).map_err(|error| error.to_string())?;
        let pair = |namespace: &LinuxNamespace| {
            let path = namespace.path().as_ref();
            (
                namespace.typ().to_string(),
                path.map(|path| path.display().to_string()),
            )
        };
        Ok(guest.iter().map(pair).collect())
    }

    fn member() -> Role {
        Role::Member("pod".parse().unwrap())
    }

    fn with_pid_path(path: &str) -> String {
        format!(
            r#"[{{"type":"pid","path":"{path}"}},{{"type":"ipc","path":"/proc/7/ns/ipc"}},
                {{"type":"uts","path":"/proc/7/ns/uts"}},{{"type":"network","path":"/proc/7/ns/net"}},{{"type":"mount"}}]"#
        )
    }

    #[test]
    fn path_of_the_sandbox_is_the_pods_pid_namespace() {
        let guest = of(&with_pid_path("/proc/7/ns/pid"), &member()).unwrap();
        let place = Some("/run/coffer/pause/ns/pid".to_owned());
        assert_eq!(guest.first(), Some(&("pid".to_owned(), place)));
        assert_eq!(guest.len(), 3, "{guest:?}");
    }

    #[test]
    fn path_of_a_container_is_its_guest_pids() {
        let guest = of(&with_pid_path("/proc/4194347/ns/pid"), &member()).unwrap();
        let place = Some("/proc/43/ns/pid".to_owned());
        assert_eq!(guest.first(), Some(&("pid".to_owned(), place)));
    }

    fn kinds(list: &[LinuxNamespace]) -> Vec<String> {
        let kind = |namespace: &LinuxNamespace| namespace.typ().to_string();
        list.iter().map(kind).collect()
    }

    #[test]
    fn member_of_a_described_pod_shares_what_it_names_by_a_path() {
        let mut asked: Vec<LinuxNamespace> =
            serde_json::from_str(r#"[{"type":"mount"},{"type":"uts","path":"/proc/1/ns/uts"}]"#)
                .unwrap();
        of_described_member(&mut asked).unwrap();
        let guest = translate(&asked, &member()).unwrap();
        assert_eq!(kinds(&guest), ["mnt", "ipc", "pid", "cgroup"]);
        assert!(guest.iter().all(|namespace| namespace.path().is_none()));
    }

    #[test]
    fn namespaces_of_the_node_are_the_guests_where_the_config_says_so() {
        let left_out = || vec![new_namespace(LinuxNamespaceType::Mount, None).unwrap()];
        let mut alone = left_out();
        of_guest(&mut alone, &Role::Standalone).unwrap();
        let guest = translate(&alone, &Role::Standalone).unwrap();
        assert_eq!(kinds(&guest), ["mnt", "pid", "cgroup"]);

        let mut pods = left_out();
        of_guest(&mut pods, &member()).unwrap();
        let error = translate(&pods, &member()).unwrap_err().to_string();
        assert!(error.contains("hostNetwork"), "{error}");
        pods.push(
            new_namespace(LinuxNamespaceType::Network, Some("/proc/7/ns/net".into())).unwrap(),
        );
        let guest = translate(&pods, &member()).unwrap();
        assert_eq!(kinds(&guest), ["mnt", "pid", "cgroup"]);
        assert_eq!(
            guest[1].path().as_deref(),
            Some(Path::new("/run/coffer/pause/ns/pid"))
        );
    }

    #[test]
    fn any_other_path_is_refused_with_its_field() {
        for path in [
            "/proc/self/ns/pid",
            "/proc/7/ns/net",
            "/var/run/pidns",
            "/proc/-1/ns/pid",
        ] {
            let error = of(&with_pid_path(path), &member()).unwrap_err();
            assert!(
                error.starts_with("linux.namespaces[pid].path: ") && error.contains(path),
                "{error}"
            );
        }
    }

    #[test]
    fn container_without_a_pod_cannot_join_the_hosts() {
        let with = |kind: &str| {
            let path = |of: &str| {
                if of == kind {
                    r#","path":"/proc/1/ns/x""#
                } else {
                    ""
                }
            };
            let (pid, ipc, uts) = (path("pid"), path("ipc"), path("uts"));
            format!(
                r#"[{{"type":"pid"{pid}}},{{"type":"ipc"{ipc}}},{{"type":"uts"{uts}}},{{"type":"network","path":"/run/netns/a"}}]"#
            )
        };
        of(&with("none"), &Role::Standalone).unwrap();
        for kind in ["pid", "ipc", "uts"] {
            let error = of(&with(kind), &Role::Standalone).unwrap_err();
            assert!(
                error.starts_with(&format!("linux.namespaces[{kind}].path: ")),
                "{error}"
            );
        }
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
            let error = of(&format!("[{}]", list.join(",")), &member()).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
