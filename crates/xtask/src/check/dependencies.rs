// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The direction of dependencies: which crate may use which, and what some may not use at all.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{process, workspace};

/// The crate map: every crate of the workspace, and those of ours that it may use (in tests, see [`TEST_ONLY`], more).
/// An arrow that is not here is either a mistake or a decision to write down.
const MAP: &[(&str, &[&str])] = &[
    ("ids", &[]),
    // pure: bytes and values, no I/O
    ("virtio_wire", &["ids"]),
    ("agent_proto", &["ids", "proto_codegen"]),
    ("pod_spec", &["agent_proto", "ids"]),
    ("shim_api", &["proto_codegen"]),
    ("task_state", &["ids"]),
    // for host and guest: a netlink socket, and both ends of a forwarded connection
    ("route_netlink", &[]),
    ("port_forward", &[]),
    // the VMM
    ("virtio_device", &["ids", "virtio_wire"]),
    ("seccomp_filters", &["ids"]),
    (
        "vmm",
        &["ids", "seccomp_filters", "virtio_device", "virtio_wire"],
    ),
    ("kvm_probe", &["ids"]),
    // shared directories
    ("file_server", &["ids"]),
    ("coffer_virtiofsd", &["seccomp_filters"]),
    // drivers behind one contract
    ("hypervisor", &["ids"]),
    ("driver_embedded", &["hypervisor", "ids", "vmm"]),
    ("driver_fake", &["agent_proto", "hypervisor", "ids"]),
    // a pod
    ("agent_client", &["agent_proto", "ids", "port_forward"]),
    (
        "pod_storage",
        &["agent_proto", "hypervisor", "ids", "pod_spec"],
    ),
    ("pod_network", &["route_netlink"]),
    (
        "sandbox",
        &[
            "agent_client",
            "agent_proto",
            "file_server",
            "hypervisor",
            "ids",
            "pod_spec",
            "pod_storage",
            "task_state",
        ],
    ),
    (
        "shim",
        &[
            "agent_client",
            "agent_proto",
            "driver_embedded",
            "hypervisor",
            "ids",
            "pod_network",
            "pod_spec",
            "pod_storage",
            "proto_codegen",
            "sandbox",
            "shim_api",
            "task_state",
        ],
    ),
    ("cofferctl", &["ids", "kvm_probe", "pod_spec", "shim_api"]),
    // the guest
    ("oci_process", &["ids"]),
    (
        "agent_core",
        &[
            "agent_proto",
            "ids",
            "oci_process",
            "port_forward",
            "route_netlink",
        ],
    ),
    (
        "agent",
        &["agent_core", "agent_proto", "ids", "oci_process"],
    ),
    ("kernel_selftest", &[]),
    // tools
    ("proto_codegen", &[]),
    (
        "virtio_testdriver",
        &["ids", "virtio_device", "virtio_wire"],
    ),
    ("network_testbed", &[]),
    ("fuzz_smoke", TEST_ONLY),
    ("fuzz_targets", TEST_ONLY),
    ("e2e", TEST_ONLY),
    ("xtask", &["kvm_probe"]),
];

/// What tools for tests may use, and every crate in its own tests.
const TEST_ONLY: &[&str] = &[
    "agent_client",
    "agent_core",
    "agent_proto",
    "driver_embedded",
    "driver_fake",
    "file_server",
    "fuzz_targets",
    "hypervisor",
    "ids",
    "kvm_probe",
    "network_testbed",
    "oci_process",
    "pod_network",
    "pod_spec",
    "pod_storage",
    "port_forward",
    "sandbox",
    "shim_api",
    "task_state",
    "virtio_device",
    "virtio_testdriver",
    "virtio_wire",
    "vmm",
];

/// Crates of others that some of ours may not use, and why.
const BANS: &[(&[&str], &[&str], &str)] = &[
    (
        &[
            "ids",
            "virtio_wire",
            "agent_proto",
            "pod_spec",
            "shim_api",
            "task_state",
        ],
        &["tokio", "nix", "libc", "rustix", "vm-memory", "kvm-ioctls"],
        "is pure: it decides, others do",
    ),
    (
        &["virtio_device"],
        &["kvm-ioctls", "kvm-bindings"],
        "knows memory and queues, not KVM",
    ),
    (
        &["hypervisor", "sandbox", "shim"],
        &["kvm-ioctls", "kvm-bindings", "vm-memory", "virtio-queue"],
        "is above the drivers",
    ),
    (
        &["agent", "agent_core", "oci_process"],
        &["kvm-ioctls", "containerd-shim-protos"],
        "runs in the guest",
    ),
];

/// Concrete drivers are named in one file of the shim.
const DRIVERS: &[&str] = &["driver_embedded", "driver_cloud_hypervisor"];

/// Fails with every arrow that points the wrong way.
pub(crate) fn direction() -> Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["metadata", "--no-deps", "--format-version=1"])
        .current_dir(workspace::root());
    let metadata: Value = serde_json::from_str(&process::output(&mut cargo)?)
        .context("cargo metadata is not JSON")?;
    let packages = metadata
        .get("packages")
        .and_then(Value::as_array)
        .context("cargo metadata lists no packages")?;
    let mut found: Vec<String> = packages.iter().flat_map(wrong_arrows).collect();
    found.extend(drivers_outside_main()?);
    if found.is_empty() {
        Ok(())
    } else {
        bail!("{}", found.join("\n"))
    }
}

fn wrong_arrows(package: &Value) -> Vec<String> {
    let name = text(package, "name");
    let Some((_, allowed)) = MAP.iter().find(|(known, _)| *known == name) else {
        return vec![format!(
            "{name} is not in the crate map; add it to crates/xtask/src/check/dependencies.rs"
        )];
    };
    let dependencies = package
        .get("dependencies")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    dependencies
        .filter_map(|dependency| wrong_arrow(name, allowed, dependency))
        .collect()
}

fn wrong_arrow(name: &str, allowed: &[&str], dependency: &Value) -> Option<String> {
    let to = text(dependency, "name");
    let ours = dependency.get("path").is_some_and(Value::is_string);
    let for_tests = text(dependency, "kind") == "dev";
    if ours {
        let fine = allowed.contains(&to) || (for_tests && TEST_ONLY.contains(&to));
        return (!fine).then(|| format!("{name} uses {to}, which the crate map does not allow"));
    }
    let ban = BANS
        .iter()
        .find(|(crates, banned, _)| !for_tests && crates.contains(&name) && banned.contains(&to));
    ban.map(|(_, _, why)| format!("{name} uses {to}, but it {why}"))
}

fn drivers_outside_main() -> Result<Vec<String>> {
    let folder = workspace::root().join("crates/shim/src");
    let mut found = Vec::new();
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let path = entry?.path();
        if path.is_dir() || path.ends_with("main.rs") {
            continue;
        }
        let source =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let named = DRIVERS.iter().filter(|driver| source.contains(*driver));
        found.extend(named.map(|driver| {
            format!(
                "{} names {driver}; only the shim's main.rs may",
                path.display()
            )
        }));
    }
    Ok(found)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arrow_upwards_is_found() {
        let package = json!({"name": "sandbox", "dependencies": [
            {"name": "driver_embedded", "path": "/x", "kind": null}, {"name": "ids", "path": "/x", "kind": null}]});
        assert_eq!(
            wrong_arrows(&package),
            ["sandbox uses driver_embedded, which the crate map does not allow"]
        );
    }

    #[test]
    fn banned_crate_is_found_but_not_in_tests() {
        let dependency = |kind: Option<&str>| json!({"name": "tokio", "kind": kind});
        let package = |kind| json!({"name": "task_state", "dependencies": [dependency(kind)]});
        assert_eq!(wrong_arrows(&package(None)).len(), 1);
        assert_eq!(wrong_arrows(&package(Some("dev"))).len(), 0);
    }

    #[test]
    fn unknown_crate_is_found() {
        assert_eq!(wrong_arrows(&json!({"name": "utils"})).len(), 1);
    }

    #[test]
    fn map_has_no_cycle() {
        // Repeatedly remove crates all of whose arrows lead to removed ones.
        let mut left: Vec<_> = MAP.iter().filter(|(_, uses)| *uses != TEST_ONLY).collect();
        let mut gone: Vec<&str> = Vec::new();
        while !left.is_empty() {
            let before = left.len();
            left.retain(|(name, uses)| {
                let free = uses.iter().all(|to| gone.contains(to));
                if free {
                    gone.push(name);
                }
                !free
            });
            assert!(left.len() < before, "a cycle among {left:?}");
        }
    }
}
