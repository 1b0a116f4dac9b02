// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where a pod is described: in a bundle that is there before the shim, or by CreateSandbox afterwards.
//!
//! `options` of CreateSandbox are CRI's `PodSandboxConfig`. What a pause container's spec says elsewhere comes from there:
//! host name, sysctls, the sums of limits, the parent of the pod's cgroup and the files that every container gets.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use ids::{Bytes, SandboxId};
use pod_spec::PodDescription;

use cri::{DnsConfig, NamespaceMode, PodSandboxConfig};

#[expect(
    nonstandard_style,
    unreachable_pub,
    unused_mut,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod cri {
    include!(concat!(env!("OUT_DIR"), "/pod_sandbox_config.rs"));
}

/// The node's own files, which a pod without a DNS config gets as with any runtime of containerd's.
const NODE_HOSTS: &str = "/etc/hosts";
const NODE_RESOLV_CONF: &str = "/etc/resolv.conf";

/// Where a pod is described.
#[derive(Debug, Clone)]
pub enum PodSource {
    /// In the bundle of its first container.
    Bundle(PathBuf),
    /// By CreateSandbox, which fills the cell.
    Described(Arc<OnceLock<DescribedPod>>),
}

/// A pod as CreateSandbox describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescribedPod {
    /// For the VM.
    pub description: PodDescription,
    /// The network namespace that the CNI has made; `None` if the pod is to have none.
    pub network_namespace: Option<PathBuf>,
    /// Its annotations: which of them count is for the node's config to say.
    pub annotations: HashMap<String, String>,
    /// When the pod was described.
    pub created_at: SystemTime,
    /// The host's cgroup for the pod, as an OCI spec's `linux.cgroupsPath`.
    pub(crate) cgroups_path: Option<String>,
    /// What the pod's `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` are made of, if it has any.
    pub(crate) files: Option<PodFiles>,
}

/// The files that every container of a pod gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFiles {
    hostname: String,
    /// `None`: the node's.
    resolv_conf: Option<String>,
}

/// A CreateSandbox that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DescribeError {
    /// Options of somebody else's.
    #[error(
        "options of type {0:?} describe no pod: runtime.v1.PodSandboxConfig of CRI was expected, or none"
    )]
    Type(String),
    /// Not what the type says.
    #[error("the options are no CRI PodSandboxConfig")]
    Decode(#[source] protobuf::Error),
    /// There is no pause container whose root file system could matter.
    #[error("a sandbox with a root file system of its own is not supported: leave rootfs empty")]
    Rootfs,
    /// User namespaces are not mapped into a guest.
    #[error(
        "the pod asks for a user namespace (hostUsers: false), which its VM does not offer: leave hostUsers out, for the \
         VM itself keeps the pod from the host's users"
    )]
    UserNamespace,
}

impl DescribedPod {
    /// What `request` describes at the time `now`.
    ///
    /// # Errors
    /// [`DescribeError`] if that is no pod that could be.
    pub(crate) fn new(
        request: &CreateSandboxRequest,
        id: &SandboxId,
        now: SystemTime,
    ) -> Result<Self, DescribeError> {
        if !request.rootfs.is_empty() {
            return Err(DescribeError::Rootfs);
        }
        let config = match request.options.as_ref() {
            Some(any) if !(any.type_url.is_empty() && any.value.is_empty()) => Some(config(any)?),
            _ => None,
        };
        let network_namespace = Some(&request.netns_path)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        let Some(config) = config else {
            return Ok(Self {
                description: PodDescription::default(),
                network_namespace,
                annotations: request.annotations.clone(),
                created_at: now,
                cgroups_path: None,
                files: None,
            });
        };
        let linux = config.linux.clone().unwrap_or_default();
        let namespaces = linux
            .security_context
            .clone()
            .unwrap_or_default()
            .namespace_options
            .unwrap_or_default();
        let users = namespaces.userns_options.as_ref();
        if users.is_some_and(|users| users.mode == NamespaceMode::POD.into()) {
            return Err(DescribeError::UserNamespace);
        }
        let resources = linux.resources.unwrap_or_default();
        let huge_pages = resources.hugepage_limits.iter().map(|pages| pages.limit);
        let node = NamespaceMode::NODE.into();
        let description = PodDescription {
            hostname: config.hostname.clone(),
            sysctls: linux.sysctls.into_iter().collect(),
            cpu_quota: resources.cpu_quota,
            cpu_period: resources.cpu_period,
            memory: resources.memory_limit_in_bytes,
            huge_pages: Bytes(huge_pages.fold(0, u64::saturating_add)),
            host_network: namespaces.network == node,
            host_ipc: namespaces.ipc == node,
            host_pid: namespaces.pid == node,
        };
        Ok(Self {
            description,
            network_namespace,
            annotations: config
                .annotations
                .into_iter()
                .chain(request.annotations.clone())
                .collect(),
            created_at: now,
            cgroups_path: cgroups_path(&linux.cgroup_parent, id),
            files: Some(PodFiles {
                hostname: config.hostname,
                resolv_conf: config.dns_config.as_ref().and_then(resolv_conf),
            }),
        })
    }
}

fn config(any: &Any) -> Result<PodSandboxConfig, DescribeError> {
    // With or without a host before the slash; `runtime.v1alpha2` has the same fields.
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if !(name.starts_with("runtime.v1") && name.ends_with(".PodSandboxConfig")) {
        return Err(DescribeError::Type(any.type_url.clone()));
    }
    PodSandboxConfig::parse_from_bytes(&any.value).map_err(DescribeError::Decode)
}

/// Where containerd would put the pause container: in the parent as cgroupfs names it, or in a slice of systemd's.
fn cgroups_path(parent: &str, id: &SandboxId) -> Option<String> {
    if parent.is_empty() {
        return None;
    }
    let base = parent.rsplit('/').next().unwrap_or(parent);
    Some(if base.ends_with(".slice") {
        format!("{base}:cri-containerd:{id}")
    } else {
        format!("{}/{id}", parent.trim_end_matches('/'))
    })
}

/// resolv.conf(5).
fn resolv_conf(dns: &DnsConfig) -> Option<String> {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    (!text.is_empty()).then_some(text)
}

impl PodFiles {
    const HOSTNAME: &str = "hostname";
    const HOSTS: &str = "hosts";
    const RESOLV_CONF: &str = "resolv.conf";

    /// Writes the files into `dir`, which is the sandbox's own.
    ///
    /// # Errors
    /// As of the file system.
    pub(crate) fn write(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::write(dir.join(Self::HOSTNAME), format!("{}\n", self.hostname))?;
        copy(NODE_HOSTS, &dir.join(Self::HOSTS))?;
        let resolv_conf = dir.join(Self::RESOLV_CONF);
        match &self.resolv_conf {
            Some(text) => std::fs::write(resolv_conf, text),
            None => copy(NODE_RESOLV_CONF, &resolv_conf),
        }
    }

    /// Each place in a container, and the file in `dir` that belongs there.
    pub(crate) fn places(&self, dir: &Path) -> Vec<(&'static str, PathBuf)> {
        let mut places = vec![
            ("/etc/hosts", dir.join(Self::HOSTS)),
            ("/etc/resolv.conf", dir.join(Self::RESOLV_CONF)),
        ];
        if !self.hostname.is_empty() {
            places.push(("/etc/hostname", dir.join(Self::HOSTNAME)));
        }
        places
    }
}

/// A node may well have no such file: the pod's is empty then.
fn copy(from: &str, to: &Path) -> std::io::Result<()> {
    let text = match std::fs::read(from) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        text => text?,
    };
    std::fs::write(to, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn pod(config: &PodSandboxConfig) -> Result<DescribedPod, DescribeError> {
        let mut request = CreateSandboxRequest::new();
        request.netns_path = "/run/netns/cni-1".to_owned();
        request.options = Some(Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value: config.write_to_bytes().unwrap(),
            ..Any::default()
        })
        .into();
        DescribedPod::new(&request, &"pod1".parse().unwrap(), NOW)
    }

    fn config() -> PodSandboxConfig {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".to_owned();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/podx".to_owned();
        linux
            .sysctls
            .insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
        let resources = linux.resources.mut_or_insert_default();
        resources.cpu_quota = 150_000;
        resources.cpu_period = 100_000;
        resources.memory_limit_in_bytes = 64 << 20;
        config
    }

    #[test]
    fn config_of_cri_describes_the_pod() {
        let pod = pod(&config()).unwrap();
        assert_eq!(
            pod.network_namespace.as_deref(),
            Some(Path::new("/run/netns/cni-1"))
        );
        assert_eq!(pod.cgroups_path.as_deref(), Some("/kubepods/podx/pod1"));
        let description = &pod.description;
        assert_eq!(description.hostname, "web");
        assert_eq!(description.sysctls["net.ipv4.ip_forward"], "1");
        assert_eq!(
            (
                description.cpu_quota,
                description.cpu_period,
                description.memory
            ),
            (150_000, 100_000, 64 << 20)
        );
        assert!(!description.host_network && !description.host_ipc);
    }

    #[test]
    fn request_without_options_describes_a_pod_of_the_usual_size() {
        let request = CreateSandboxRequest::new();
        let pod = DescribedPod::new(&request, &"pod1".parse().unwrap(), NOW).unwrap();
        assert_eq!(pod.description, PodDescription::default());
        assert_eq!((pod.network_namespace, pod.files), (None, None));
    }

    #[test]
    fn namespaces_of_the_host_are_told() {
        let mut config = config();
        let options = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default()
            .namespace_options
            .mut_or_insert_default();
        options.network = NamespaceMode::NODE.into();
        options.ipc = NamespaceMode::NODE.into();
        options.pid = NamespaceMode::NODE.into();
        let pod = pod(&config).unwrap();
        assert!(
            pod.description.host_network && pod.description.host_ipc && pod.description.host_pid
        );
    }

    #[test]
    fn user_namespace_is_refused_by_name() {
        let mut config = config();
        config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default()
            .namespace_options
            .mut_or_insert_default()
            .userns_options
            .mut_or_insert_default()
            .mode = NamespaceMode::POD.into();
        let error = pod(&config).unwrap_err().to_string();
        assert!(error.contains("hostUsers"), "{error}");
    }

    #[test]
    fn slice_of_systemd_holds_a_scope() {
        let id = "pod1".parse().unwrap();
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-podx.slice", &id).as_deref(),
            Some("kubepods-podx.slice:cri-containerd:pod1")
        );
        assert_eq!(cgroups_path("", &id), None);
    }

    #[test]
    fn resolv_conf_has_what_the_dns_config_says() {
        let mut dns = DnsConfig::new();
        assert_eq!(resolv_conf(&dns), None);
        dns.servers = vec!["10.0.0.10".to_owned(), "10.0.0.11".to_owned()];
        dns.searches = vec!["a.svc".to_owned(), "svc".to_owned()];
        dns.options = vec!["ndots:5".to_owned()];
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search a.svc svc\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n"
        );
    }

    #[test]
    fn files_are_written_and_the_pods_are_not_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let files = PodFiles {
            hostname: "web".to_owned(),
            resolv_conf: Some("nameserver 10.0.0.10\n".to_owned()),
        };
        files.write(dir.path()).unwrap();
        for (place, source) in files.places(dir.path()) {
            let text = std::fs::read_to_string(source).unwrap();
            match place {
                "/etc/hostname" => assert_eq!(text, "web\n"),
                "/etc/resolv.conf" => assert_eq!(text, "nameserver 10.0.0.10\n"),
                _ => {}
            }
        }
    }

    #[test]
    fn options_of_another_type_and_garbage_are_refused() {
        let mut request = CreateSandboxRequest::new();
        request.options = Some(Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: vec![0x0a, 0],
            ..Any::default()
        })
        .into();
        let refused = DescribedPod::new(&request, &"pod1".parse().unwrap(), NOW);
        assert!(
            matches!(refused, Err(DescribeError::Type(name)) if name == "runtimeoptions.v1.Options")
        );
        request.options.mut_or_insert_default().type_url = "runtime.v1.PodSandboxConfig".to_owned();
        request.options.mut_or_insert_default().value = vec![0xff; 9];
        let refused = DescribedPod::new(&request, &"pod1".parse().unwrap(), NOW);
        assert!(matches!(refused, Err(DescribeError::Decode(_))));
    }
}
