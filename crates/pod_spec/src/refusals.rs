// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What no guest can do, told before there is a VM: hooks on the host, seccomp agents, kernel parameters of the whole
//! machine.

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, Spec};

use crate::error::SpecError;

/// System V IPC's parameters, each of the ipc namespace, and the NIS domain of the uts namespace (runc's list).
const NAMESPACED: [&str; 9] = [
    "kernel.domainname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Whole groups of the network and ipc namespaces.
const NAMESPACED_GROUPS: [&str; 2] = ["net.", "fs.mqueue."];

/// Refuses what neither a sandbox nor a container can have.
///
/// # Errors
/// [`SpecError::Unsupported`] with the field.
pub(crate) fn check(spec: &Spec) -> Result<(), SpecError> {
    check_hooks(spec)?;
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    if let Some(seccomp) = linux.seccomp() {
        check_seccomp(seccomp)?;
    }
    linux
        .sysctl()
        .iter()
        .flat_map(|sysctls| sysctls.keys())
        .try_for_each(|key| check_sysctl(key))
}

/// Only `startContainer` hooks name programs of the container; those of all others are on the host, where nothing of the
/// container is.
fn check_hooks(spec: &Spec) -> Result<(), SpecError> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let prestart = hooks.prestart();
    let hosts = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    let asked = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    match hosts.into_iter().find(|(_, list)| asked(list)) {
        Some((name, _)) => Err(SpecError::unsupported(
            format!("hooks.{name}"),
            "a program of the host cannot reach into a VM: remove the hook, or make it a startContainer hook, which runs \
             in the container",
        )),
        None => Ok(()),
    }
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), SpecError> {
    let mut rules = seccomp.syscalls().iter().flatten();
    if seccomp.listener_path().is_some()
        || seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
        || rules.any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
    {
        return Err(SpecError::unsupported(
            "linux.seccomp",
            "SCMP_ACT_NOTIFY asks a seccomp agent on the host, which cannot see into a VM: use another action",
        ));
    }
    Ok(())
}

pub(crate) fn check_sysctl(key: &str) -> Result<(), SpecError> {
    let namespaced = NAMESPACED.contains(&key)
        || NAMESPACED_GROUPS
            .iter()
            .any(|group| key.strip_prefix(group).is_some_and(|rest| !rest.is_empty()));
    if namespaced {
        return Ok(());
    }
    Err(SpecError::unsupported(
        format!("linux.sysctl[{key}]"),
        "is not a pod's own: those are net.*, fs.mqueue.* and the kernel.* ones of System V IPC, written with dots",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(rest: &str) -> Option<String> {
        let spec = serde_json::from_str(&format!("{{\"ociVersion\":\"1.0.2\",{rest}}}")).unwrap();
        check(&spec).err().map(|error| error.to_string())
    }

    #[test]
    fn hook_on_the_host_is_refused_by_name_and_one_in_the_container_is_not() {
        for name in [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
        ] {
            let hooks = |list: &str| format!(r#""hooks":{{"{name}":[{list}]}}"#);
            let error = refusal(&hooks(r#"{"path":"/bin/hook"}"#)).unwrap();
            assert!(error.starts_with(&format!("hooks.{name}: ")), "{error}");
            assert_eq!(refusal(&hooks("")), None);
        }
        assert_eq!(
            refusal(r#""hooks":{"startContainer":[{"path":"/bin/hook"}]}"#),
            None
        );
    }

    #[test]
    fn seccomp_agent_is_refused_wherever_it_is_asked() {
        let seccomp = |rest: &str| format!(r#""linux":{{"seccomp":{{{rest}}}}}"#);
        for rest in [
            r#""defaultAction":"SCMP_ACT_NOTIFY""#,
            r#""defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/agent.sock""#,
            r#""defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]"#,
        ] {
            let error = refusal(&seccomp(rest)).unwrap();
            assert!(error.contains("SCMP_ACT_NOTIFY"), "{error}");
        }
        assert_eq!(
            refusal(&seccomp(r#""defaultAction":"SCMP_ACT_ALLOW""#)),
            None
        );
    }

    #[test]
    fn sysctl_of_the_whole_machine_is_refused_by_name() {
        let sysctl = |key: &str| refusal(&format!(r#""linux":{{"sysctl":{{"{key}":"1"}}}}"#));
        for key in [
            "kernel.shm_rmid_forced",
            "kernel.msgmax",
            "fs.mqueue.msg_max",
            "net.ipv4.ip_local_port_range",
            "net.core.somaxconn",
        ] {
            assert_eq!(sysctl(key), None, "{key}");
        }
        for key in [
            "vm.max_map_count",
            "kernel.pid_max",
            "kernel.hostname",
            "fs.file-max",
            "net.",
            "net/ipv4/tcp_syncookies",
            "nosuch",
            "",
        ] {
            let error = sysctl(key).unwrap();
            assert!(
                error.starts_with(&format!("linux.sysctl[{key}]: ")),
                "{error}"
            );
        }
    }
}
