// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A pod that is described without a spec of its own: containerd's Sandbox API has no pause container.

use std::collections::BTreeMap;
use std::path::Path;

use ids::{Bytes, Mib};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount};

use crate::annotations::Overrides;
use crate::bundle::PodSpec;
use crate::config::{Guest, HostNamespaces};
use crate::error::SpecError;
use crate::refusals;
use crate::sizing::Limits;

/// Where a container finds the pod's shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// What a pod is to be like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodDescription {
    /// Its host name; empty keeps the guest kernel's.
    pub hostname: String,
    /// Sysctls that the guest's own namespaces get.
    pub sysctls: BTreeMap<String, String>,
    /// CPU time per period, both in µs; 0 or less is no limit.
    pub cpu_quota: i64,
    /// See [`Self::cpu_quota`].
    pub cpu_period: i64,
    /// In bytes; 0 or less is no limit.
    pub memory: i64,
    /// All of every size, beside the memory.
    pub huge_pages: Bytes,
    /// It wants the host's network namespace.
    pub host_network: bool,
    /// It wants the host's IPC namespace.
    pub host_ipc: bool,
    /// It wants the host's PID namespace.
    pub host_pid: bool,
}

impl PodDescription {
    /// The VM of the pod on a node with so much memory, with what its annotations change.
    ///
    /// # Errors
    /// [`SpecError::HostNamespace`], [`SpecError::Unsupported`], [`SpecError::TooLarge`] or [`SpecError::Annotation`].
    pub fn pod(
        &self,
        guest: &Guest,
        node_memory: Mib,
        overrides: &Overrides,
    ) -> Result<PodSpec, SpecError> {
        let refused = guest.host_namespaces == HostNamespaces::Refused;
        let hosts = [
            (self.host_network, "network", "hostNetwork"),
            (self.host_ipc && refused, "ipc", "hostIPC"),
            (self.host_pid && refused, "pid", "hostPID"),
        ];
        if let Some((_, name, field)) = hosts.into_iter().find(|(wanted, _, _)| *wanted) {
            return Err(SpecError::HostNamespace(name, field));
        }
        for key in self.sysctls.keys() {
            refusals::check_sysctl(key)?;
        }
        let limits = Limits::of_pod(
            self.cpu_quota,
            self.cpu_period,
            self.memory,
            self.huge_pages,
        );
        Ok(PodSpec {
            size: limits.pod_size(guest, node_memory, overrides)?,
            hostname: Some(self.hostname.clone()).filter(|name| !name.is_empty()),
            sysctls: self.sysctls.clone(),
            shm: PodSpec::DEFAULT_SHM,
        })
    }
}

/// The mounts of a member of a described pod: `files` of the pod's are at the places where nothing else is mounted, and
/// `/dev/shm` is the pod's if the IPC namespace is, for CRI leaves both to the pod's runtime.
pub(crate) fn member_mounts(
    mut mounts: Vec<Mount>,
    namespaces: &[LinuxNamespace],
    files: &[(&str, &Path)],
) -> Vec<Mount> {
    let shares_ipc = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Ipc && namespace.path().is_some());
    for mount in &mut mounts {
        if shares_ipc
            && mount.destination() == Path::new(SHARED_MEMORY)
            && mount.typ().as_deref() == Some("tmpfs")
        {
            *mount = bind(SHARED_MEMORY, Path::new(SHARED_MEMORY));
        }
    }
    for (destination, source) in files {
        if !mounts
            .iter()
            .any(|mount| mount.destination() == Path::new(destination))
        {
            mounts.push(bind(destination, source));
        }
    }
    mounts
}

fn bind(destination: &str, source: &Path) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source.to_path_buf()));
    mount.set_options(Some(vec!["rbind".to_owned(), "rprivate".to_owned()]));
    mount
}

#[cfg(test)]
mod tests {
    use ids::Mib;

    use super::*;
    use crate::{Bundle, HostMounts, RuntimeConfig};

    fn guest() -> Guest {
        RuntimeConfig::parse("").unwrap().guest
    }

    fn pod(description: &PodDescription, guest: &Guest) -> Result<PodSpec, SpecError> {
        description.pod(guest, Mib(1024), &Overrides::default())
    }

    #[test]
    fn limits_size_the_vm_and_none_gives_the_nodes_default() {
        let guest = guest();
        let default = pod(&PodDescription::default(), &guest).unwrap();
        let started = default.size.started_with;
        assert_eq!(
            (started.vcpus, started.memory, default.hostname),
            (guest.default_vcpus, guest.default_memory, None)
        );
        let description = PodDescription {
            hostname: "web".to_owned(),
            cpu_quota: 150_000,
            cpu_period: 100_000,
            memory: 256 << 20,
            ..PodDescription::default()
        };
        let pod = pod(&description, &guest).unwrap();
        assert_eq!(pod.size.started_with.vcpus.get(), 2);
        assert_eq!(
            pod.size.started_with.memory.0,
            256 + guest.overhead_memory.0
        );
        assert_eq!(pod.hostname.as_deref(), Some("web"));
    }

    #[test]
    fn sysctl_of_the_whole_machine_is_refused() {
        let mut description = PodDescription::default();
        description
            .sysctls
            .insert("vm.swappiness".to_owned(), "1".to_owned());
        let error = pod(&description, &guest()).unwrap_err().to_string();
        assert!(error.contains("vm.swappiness"), "{error}");
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        for field in ["hostNetwork", "hostIPC", "hostPID"] {
            let description = PodDescription {
                host_network: field == "hostNetwork",
                host_ipc: field == "hostIPC",
                host_pid: field == "hostPID",
                ..PodDescription::default()
            };
            let error = pod(&description, &guest()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
            let guests = Guest {
                host_namespaces: HostNamespaces::Guest,
                ..guest()
            };
            assert_eq!(pod(&description, &guests).is_err(), field == "hostNetwork");
        }
    }

    /// The guest's mounts of a member with `mounts` and an IPC namespace at `ipc`.
    fn member(mounts: &str, ipc: &str) -> Vec<(String, String)> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"mounts":{mounts},
            "process":{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}}},
            "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"mount"}},
            {{"type":"network","path":"/n"}},{{"type":"ipc"{ipc}}}]}}}}"#
        );
        let mut bundle = Bundle::parse(json.as_bytes()).unwrap();
        let files = [
            ("/etc/hosts", Path::new("/private/hosts")),
            ("/etc/resolv.conf", Path::new("/private/resolv.conf")),
        ];
        bundle.join(&"pod1".parse().unwrap(), &files).unwrap();
        let spec = bundle
            .container(&"c1".parse().unwrap(), &HostMounts::default())
            .unwrap();
        let sources = spec
            .copies
            .iter()
            .map(|copy| copy.source.display().to_string());
        let mut found: Vec<_> = sources
            .map(|source| ("copied".to_owned(), source))
            .collect();
        let guest: oci_spec::runtime::Spec = serde_json::from_slice(&spec.guest_spec).unwrap();
        for mount in guest.mounts().iter().flatten() {
            let kind = mount.typ().clone().unwrap_or_default();
            found.push((mount.destination().display().to_string(), kind));
        }
        found
    }

    #[test]
    fn member_gets_the_pods_files_where_nothing_else_is_mounted() {
        let own = r#"[{"destination":"/etc/hosts","type":"bind","source":"/kubelet/hosts","options":["rbind","ro"]}]"#;
        let found = member(own, "");
        let copied: Vec<&str> = found
            .iter()
            .filter(|(kind, _)| kind == "copied")
            .map(|(_, source)| source.as_str())
            .collect();
        assert_eq!(copied, ["/kubelet/hosts", "/private/resolv.conf"]);
    }

    #[test]
    fn shared_memory_is_the_pods_if_the_ipc_namespace_is() {
        let shm =
            r#"[{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["size=64k"]}]"#;
        for (ipc, kind) in [(r#","path":"/proc/7/ns/ipc""#, "bind"), ("", "tmpfs")] {
            let found = member(shm, ipc);
            assert!(
                found.contains(&("/dev/shm".to_owned(), kind.to_owned())),
                "{found:?}"
            );
        }
    }
}
