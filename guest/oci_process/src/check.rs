// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Which specs are accepted. What is neither enforced here nor by the agent's cgroups is refused, field by field.
//!
//! | field | done by |
//! |---|---|
//! | `process.*` | [`crate::child`], except those refused below |
//! | `root.readonly`, `mounts`, `linux.devices`, `maskedPaths`, `readonlyPaths`, `rootfsPropagation` | [`crate::rootfs`] |
//! | `linux.namespaces`, `hostname`, `domainname`, `linux.sysctl`, `linux.seccomp`, `linux.personality`, `hooks` | [`crate::child`] |
//! | `linux.resources` | the agent's cgroups, which refuse what cgroup v2 cannot do |
//! | the path of a pid namespace | whoever calls [`crate::launch_init`] with a process that is in it |
//! | `linux.cgroupsPath` | not looked at: the agent names its cgroups after the container |
//! | `annotations`, `ociVersion` | carry no request |

use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccompAction, Process, Spec};

use crate::Error;

/// The most arguments or environment variables of a process, together with [`MAX_STRINGS_LEN`].
pub const MAX_STRINGS: usize = 65_536;

/// The most bytes in arguments and environment; the kernel itself stops at a quarter of the stack's limit.
pub const MAX_STRINGS_LEN: usize = 2 * 1024 * 1024;

/// The most mounts in a spec.
pub const MAX_MOUNTS: usize = 4096;

/// Whether the container's init can be made as `spec` says.
///
/// # Errors
/// [`Error::Unsupported`] or [`Error::Invalid`] with the first field at fault.
pub fn check_spec(spec: &Spec) -> Result<(), Error> {
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::invalid("process", "is missing"))?;
    check_process(process)?;
    refuse(
        spec.windows().is_some() || spec.solaris().is_some() || spec.zos().is_some(),
        "windows, solaris and zos",
        "only Linux containers run in the guest",
    )?;
    refuse(
        spec.vm().is_some(),
        "vm",
        "the node's configuration, not the spec, says what VM a pod gets",
    )?;
    refuse(
        spec.uid_mappings().is_some() || spec.gid_mappings().is_some(),
        "uidMappings",
        USER_NAMESPACES,
    )?;
    if let Some(hooks) = spec.hooks() {
        crate::hooks::check(hooks)?;
    }
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    if mounts.len() > MAX_MOUNTS {
        return Err(Error::invalid(
            "mounts",
            format!("{} of them, at most {MAX_MOUNTS} are allowed", mounts.len()),
        ));
    }
    for mount in mounts {
        refuse(
            mount.uid_mappings().is_some() || mount.gid_mappings().is_some(),
            &format!("mounts[{}].uidMappings", mount.destination().display()),
            USER_NAMESPACES,
        )?;
    }
    check_linux(spec)
}

const USER_NAMESPACES: &str = "user namespaces are not available inside a microVM, set hostUsers: true: the VM already \
                               separates the pod's root from the node's";

fn check_linux(spec: &Spec) -> Result<(), Error> {
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| Error::invalid("linux", "is missing"))?;
    let mut mount_namespace = false;
    for namespace in linux.namespaces().as_deref().unwrap_or_default() {
        let name = namespace.typ().to_string();
        refuse(
            namespace.typ() != LinuxNamespaceType::Pid
                && namespace
                    .path()
                    .as_ref()
                    .is_some_and(|path| !path.as_os_str().is_empty()),
            &format!("linux.namespaces[{name}].path"),
            "a path on the node means nothing in the guest; namespaces shared by the pod are left out of the spec",
        )?;
        match namespace.typ() {
            LinuxNamespaceType::User => {
                return unsupported("linux.namespaces[user]", USER_NAMESPACES);
            }
            LinuxNamespaceType::Time => {
                return unsupported(
                    "linux.namespaces[time]",
                    "time namespaces are not available",
                );
            }
            LinuxNamespaceType::Mount => mount_namespace = true,
            _ => {}
        }
    }
    if !mount_namespace {
        return Err(Error::invalid(
            "linux.namespaces",
            "has no mount namespace: every container needs its own",
        ));
    }
    refuse(
        linux
            .uid_mappings()
            .as_ref()
            .is_some_and(|list| !list.is_empty())
            || linux
                .gid_mappings()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
        "linux.uidMappings",
        USER_NAMESPACES,
    )?;
    refuse(
        linux
            .net_devices()
            .as_ref()
            .is_some_and(|map| !map.is_empty()),
        "linux.netDevices",
        "the node's devices are not in the guest",
    )?;
    refuse(
        linux
            .mount_label()
            .as_ref()
            .is_some_and(|label| !label.is_empty()),
        "linux.mountLabel",
        "the guest's kernel has no SELinux",
    )?;
    refuse(
        linux.intel_rdt().is_some(),
        "linux.intelRdt",
        "it is the node's to set, for the whole VM",
    )?;
    refuse(
        linux.memory_policy().is_some(),
        "linux.memoryPolicy",
        "the guest has one memory node",
    )?;
    refuse(
        linux
            .time_offsets()
            .as_ref()
            .is_some_and(|map| !map.is_empty()),
        "linux.timeOffsets",
        "time namespaces are not available",
    )?;
    if let Some(personality) = linux.personality() {
        refuse(
            personality
                .flags()
                .as_ref()
                .is_some_and(|flags| !flags.is_empty()),
            "linux.personality.flags",
            "no flag is defined by the OCI runtime specification",
        )?;
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
            || seccomp
                .syscalls()
                .iter()
                .flatten()
                .any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
        refuse(
            seccomp.listener_path().is_some() || notifies,
            "linux.seccomp.listenerPath",
            "a seccomp agent on the node cannot see into the guest",
        )?;
    }
    Ok(())
}

/// Whether a further process can be made as `process` says.
///
/// # Errors
/// As [`check_spec`].
pub fn check_process(process: &Process) -> Result<(), Error> {
    let arguments = process.args().as_deref().unwrap_or_default();
    if arguments.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("process.args", "names no program"));
    }
    let strings = || arguments.iter().chain(process.env().iter().flatten());
    let bytes: usize = strings().map(String::len).sum();
    if strings().count() > MAX_STRINGS || bytes > MAX_STRINGS_LEN {
        return Err(Error::invalid(
            "process.args and process.env",
            format!(
                "{bytes} bytes in all, at most {MAX_STRINGS_LEN} in {MAX_STRINGS} strings are allowed"
            ),
        ));
    }
    if strings().any(|text| text.contains('\0')) {
        return Err(Error::invalid(
            "process.args and process.env",
            "have a NUL byte",
        ));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid("process.cwd", "is not an absolute path"));
    }
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    refuse(
        set(process.apparmor_profile()),
        "process.apparmorProfile",
        "the guest's kernel has no AppArmor",
    )?;
    refuse(
        set(process.selinux_label()),
        "process.selinuxLabel",
        "the guest's kernel has no SELinux",
    )?;
    refuse(
        process.scheduler().is_some(),
        "process.scheduler",
        "scheduling policies are not available",
    )?;
    refuse(
        process.exec_cpu_affinity().is_some(),
        "process.execCPUAffinity",
        "use linux.resources.cpu.cpus",
    )
}

fn refuse(condition: bool, field: &str, hint: &'static str) -> Result<(), Error> {
    if condition {
        return unsupported(field, hint);
    }
    Ok(())
}

fn unsupported(field: &str, hint: &'static str) -> Result<(), Error> {
    Err(Error::Unsupported {
        field: field.to_owned(),
        hint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(change: serde_json::Value) -> Spec {
        let mut value = serde_json::json!({
            "ociVersion": "1.1.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
        });
        merge(&mut value, change);
        serde_json::from_value(value).unwrap()
    }

    fn merge(to: &mut serde_json::Value, from: serde_json::Value) {
        match (to, from) {
            (serde_json::Value::Object(to), serde_json::Value::Object(from)) => {
                for (key, value) in from {
                    merge(to.entry(key).or_insert(serde_json::Value::Null), value);
                }
            }
            (to, from) => *to = from,
        }
    }

    #[test]
    fn plain_spec_is_accepted() {
        check_spec(&spec(serde_json::json!({}))).unwrap();
    }

    #[test]
    fn what_the_guest_cannot_do_is_refused_by_name() {
        for (change, field) in [
            (
                serde_json::json!({"process": {"apparmorProfile": "x"}}),
                "process.apparmorProfile",
            ),
            (
                serde_json::json!({"process": {"selinuxLabel": "x"}}),
                "process.selinuxLabel",
            ),
            (
                serde_json::json!({"process": {"cwd": "tmp"}}),
                "process.cwd",
            ),
            (serde_json::json!({"process": {"args": []}}), "process.args"),
            (
                serde_json::json!({"process": {"args": ["a\u{0}b"]}}),
                "process.args",
            ),
            (
                serde_json::json!({"linux": {"mountLabel": "x"}}),
                "linux.mountLabel",
            ),
            (
                serde_json::json!({"linux": {"intelRdt": {}}}),
                "linux.intelRdt",
            ),
            (
                serde_json::json!({"linux": {"namespaces": [{"type": "pid"}]}}),
                "linux.namespaces",
            ),
            (
                serde_json::json!({"linux": {"namespaces": [{"type": "user"}]}}),
                "linux.namespaces[user]",
            ),
            (
                serde_json::json!({"linux": {"namespaces": [{"type": "network", "path": "/proc/1/ns/net"}]}}),
                "linux.namespaces[net].path",
            ),
            (
                serde_json::json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}}),
                "linux.seccomp.listenerPath",
            ),
        ] {
            let error = check_spec(&spec(change.clone())).unwrap_err().to_string();
            assert!(error.starts_with(field), "{change}: {error}");
        }
    }

    #[test]
    fn strings_at_the_cap_pass_and_one_byte_past_it_does_not() {
        let with = |len: usize| spec(serde_json::json!({"process": {"args": ["a".repeat(len)]}}));
        check_spec(&with(MAX_STRINGS_LEN)).unwrap();
        check_spec(&with(MAX_STRINGS_LEN + 1)).unwrap_err();
    }
}
