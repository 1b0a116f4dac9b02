// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A bundle's `config.json`, and what it makes of its container: the pod itself, a member, or one on its own.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use ids::{Bytes, ContainerId, Mib, SandboxId};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::annotations::Overrides;
use crate::block_devices::BlockDevice;
use crate::config::{Guest, RuntimeConfig};
use crate::description;
use crate::error::SpecError;
use crate::host_folders::HostFolder;
use crate::host_mounts::HostMounts;
use crate::sizing::{Limits, PodSize};
use crate::volumes::{EmptyDir, LiveVolume, WriteBack};
use crate::{mounts, namespaces, refusals, translate};

/// The longest `config.json`, in bytes. It crosses to the guest in one ttrpc message of at most 4 MiB.
pub const MAX_SPEC_BYTES: usize = 2 << 20;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const RUNC_GROUP: &str = "io.containerd.runc.v2.group";

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The pod's pause container: it stands for the VM and needs no process in it.
    Sandbox,
    /// A container of the pod that the sandbox is.
    Member(SandboxId),
    /// A container without a pod: a VM of its own.
    Standalone,
}

/// What the VM of a pod is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Its virtual CPUs and memory, and what they can become.
    pub size: PodSize,
    /// The guest's host name; `None` keeps the kernel's.
    pub hostname: Option<String>,
    /// Sysctls that the guest's own namespaces get.
    pub sysctls: BTreeMap<String, String>,
    /// The size of the pod's `/dev/shm`.
    pub shm: Bytes,
}

impl PodSpec {
    /// The kernel's and runc's default size of `/dev/shm`.
    pub(crate) const DEFAULT_SHM: Bytes = Bytes(64 << 20);
}

/// What the agent needs of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// The OCI spec for the guest as JSON: no host path is left in it.
    pub guest_spec: Vec<u8>,
    /// Host files to copy into the guest.
    pub copies: Vec<HostCopy>,
    /// The volumes of the kubelet's that it mounts and that are to be kept current, each once.
    pub live: Vec<LiveVolume>,
    /// The emptyDirs that the container mounts, each once.
    pub empty_dirs: Vec<EmptyDir>,
    /// The parts of them that it mounts.
    pub sub_paths: Vec<SubPath>,
    /// How precious it is to the node's OOM killer (`process.oomScoreAdj`), as kubelet says it by the pod's QoS class.
    pub oom_score_adj: Option<i32>,
    /// What it may use.
    pub limits: Limits,
    /// The host's own directories that the container mounts, each once.
    pub host_folders: Vec<HostFolder>,
    /// The block devices of the host that it has.
    pub block_devices: Vec<BlockDevice>,
    /// The root file system on the host, relative to the bundle or absolute: where it is if containerd hands over no
    /// mounts for it.
    pub host_rootfs: PathBuf,
}

/// A host file or folder whose copy a container mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCopy {
    /// Its number among the container's copies; see `agent_proto::layout::copied_mount`.
    pub index: u32,
    /// Where it is on the host.
    pub source: PathBuf,
    /// Whether what the container writes to it goes back to the host.
    pub back: Option<WriteBack>,
}

/// A part of an emptyDir that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubPath {
    /// Its number among the container's; see `agent_proto::layout::sub_path`.
    pub index: u32,
    /// The volume's name in the guest.
    pub volume: String,
    /// Relative to the volume.
    pub path: PathBuf,
    /// The part as the kubelet has made it on the host: its owner and mode count if the guest has to make it.
    pub source: PathBuf,
}

/// A parsed `config.json`.
#[derive(Debug, Clone)]
pub struct Bundle {
    spec: Spec,
    role: Role,
}

impl Bundle {
    /// The bundle from the bytes of its `config.json`.
    ///
    /// # Errors
    /// [`SpecError::TooLong`], [`SpecError::Json`], [`SpecError::Annotation`] or [`SpecError::Id`].
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        if json.len() > MAX_SPEC_BYTES {
            return Err(SpecError::TooLong {
                len: json.len(),
                max: MAX_SPEC_BYTES,
            });
        }
        is_object(json).map_err(SpecError::Json)?;
        let spec: Spec = serde_json::from_slice(json).map_err(SpecError::Json)?;
        let role = role(&spec)?;
        Ok(Self { spec, role })
    }

    /// Makes the container a member of `sandbox`, a pod that was described without a spec: `files` of the pod's, each a
    /// place in the container and a file of the host, are mounted where the spec mounts nothing.
    ///
    /// # Errors
    /// [`SpecError::Unsupported`].
    pub fn join(
        &mut self,
        sandbox: &SandboxId,
        files: &[(&str, &std::path::Path)],
    ) -> Result<(), SpecError> {
        self.role = Role::Member(sandbox.clone());
        let mut asked = self.asked_namespaces();
        let mounts = self.spec.mounts().clone().unwrap_or_default();
        let mounts = description::member_mounts(mounts, &asked, files);
        self.spec.set_mounts(Some(mounts));
        namespaces::of_described_member(&mut asked)?;
        self.set_namespaces(asked);
        Ok(())
    }

    /// Puts the container into the guest's namespaces where it asks for the node's ([`crate::HostNamespaces::Guest`]).
    ///
    /// # Errors
    /// [`SpecError::Unsupported`].
    pub fn use_guest_namespaces(&mut self) -> Result<(), SpecError> {
        let mut asked = self.asked_namespaces();
        namespaces::of_guest(&mut asked, &self.role)?;
        self.set_namespaces(asked);
        Ok(())
    }

    fn asked_namespaces(&self) -> Vec<LinuxNamespace> {
        let linux = self.spec.linux().as_ref();
        let asked = linux.and_then(|linux| linux.namespaces().clone());
        asked.unwrap_or_default()
    }

    fn set_namespaces(&mut self, namespaces: Vec<LinuxNamespace>) {
        if let Some(linux) = self.spec.linux_mut() {
            linux.set_namespaces(Some(namespaces));
        }
    }

    /// Whether there is a container in it: the bundle of a pod that is described later may have a spec without one.
    pub fn has_process(&self) -> bool {
        self.spec.process().is_some()
    }

    /// What the container is to its sandbox.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// The sandbox that container `id` belongs to: what shim processes are grouped by. A pod of CRI's is what CRI says it is,
    /// whatever group its author writes; that is for clients without CRI.
    ///
    /// # Errors
    /// [`SpecError::Id`] if an annotation names no valid sandbox.
    pub fn sandbox(&self, id: &ContainerId) -> Result<SandboxId, SpecError> {
        match (&self.role, self.annotation(RUNC_GROUP)) {
            (Role::Member(sandbox), _) => Ok(sandbox.clone()),
            (Role::Standalone, Some(group)) => group.parse().map_err(SpecError::Id),
            (Role::Sandbox, _) | (Role::Standalone, None) => Ok(SandboxId::from(id)),
        }
    }

    /// The host cgroup that the spec names for the container, empty if none.
    pub fn cgroups_path(&self) -> Option<&std::path::Path> {
        self.spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_deref())
    }

    /// The network namespace that the pod is to have, as the CNI has made it; `None` if it is to have none.
    pub fn network_namespace(&self) -> Option<&std::path::Path> {
        let namespaces = self.spec.linux().as_ref()?.namespaces().as_ref()?;
        let network = namespaces
            .iter()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?;
        let path = network.path().as_deref()?;
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// What the container binds of the host: [`Bundle::container`] is to be told which of it are directories.
    pub fn bind_sources(&self) -> impl Iterator<Item = &std::path::Path> {
        mounts::bind_sources(self.spec.mounts().as_deref().unwrap_or_default())
    }

    /// Whether init has a terminal.
    pub fn terminal(&self) -> bool {
        self.spec
            .process()
            .as_ref()
            .and_then(|process| process.terminal())
            .unwrap_or(false)
    }

    /// The VM of the pod whose first container this is, on a node with so much memory, with what [`Self::overrides`] says.
    ///
    /// # Errors
    /// [`SpecError::HostNamespace`], [`SpecError::Unsupported`], [`SpecError::TooLarge`] or [`SpecError::Annotation`].
    pub fn pod(
        &self,
        guest: &Guest,
        node_memory: Mib,
        overrides: &Overrides,
    ) -> Result<PodSpec, SpecError> {
        refusals::check(&self.spec)?;
        let linux = self.spec.linux().as_ref();
        let asked = linux.and_then(|linux| linux.namespaces().as_deref());
        namespaces::check(asked.unwrap_or_default())?;
        let limits = match self.role {
            Role::Standalone => {
                Limits::from_resources(linux.and_then(|linux| linux.resources().as_ref()))
            }
            Role::Sandbox | Role::Member(_) => match self.spec.annotations() {
                Some(annotations) => Limits::from_annotations(annotations)?,
                None => Limits::default(),
            },
        };
        let sysctls = linux
            .and_then(|linux| linux.sysctl().clone())
            .unwrap_or_default();
        let mut sysctls: BTreeMap<_, _> = sysctls.into_iter().collect();
        let set = |name: &&String| !name.is_empty();
        if let Some(name) = self.spec.domainname().as_ref().filter(set) {
            sysctls.insert("kernel.domainname".to_owned(), name.clone());
        }
        Ok(PodSpec {
            size: limits.pod_size(guest, node_memory, overrides)?,
            hostname: self.spec.hostname().clone().filter(|name| !name.is_empty()),
            sysctls,
            shm: PodSpec::DEFAULT_SHM,
        })
    }

    /// What the annotations change of the pod's VM.
    ///
    /// # Errors
    /// [`SpecError::UnknownAnnotation`], [`SpecError::AnnotationNotAllowed`] or [`SpecError::Annotation`].
    pub fn overrides(&self, config: &RuntimeConfig) -> Result<Overrides, SpecError> {
        Overrides::read(self.spec.annotations().as_ref(), config)
    }

    /// The container for the agent. It is an error to ask for one whose role is [`Role::Sandbox`]: it has none. The
    /// host's mounts tell what a kubelet's volumes are.
    ///
    /// Left out of the guest's spec, because another layer does their work:
    ///
    /// | field | who does it |
    /// |---|---|
    /// | network, ipc and uts namespaces, host and domain name, sysctls of the pod | the guest's own namespaces are the pod's |
    /// | devices of the host in the spec of a privileged container | it gets the guest's own |
    /// | `cgroupsPath` | the agent's own tree; the host's cgroup holds the VM |
    /// | the default AppArmor profile, SELinux labels | they guard the host's kernel, which the container does not reach |
    ///
    /// # Errors
    /// [`SpecError::Unsupported`], [`SpecError::HostNamespace`] or [`SpecError::Missing`].
    pub fn container(
        &self,
        id: &ContainerId,
        host: &HostMounts,
    ) -> Result<ContainerSpec, SpecError> {
        translate::container(self.spec.clone(), id, &self.role, host)
    }

    /// All of them.
    pub fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }

    fn annotation(&self, key: &str) -> Option<&String> {
        self.spec
            .annotations()
            .as_ref()
            .and_then(|annotations| annotations.get(key))
    }
}

/// Whether the JSON is an object: serde takes an array for a struct too, and an empty one for a struct of defaults.
///
/// # Errors
/// As for JSON of another type.
pub(crate) fn is_object(json: &[u8]) -> Result<(), serde_json::Error> {
    match json.trim_ascii_start().first() {
        Some(b'{') => Ok(()),
        _ => Err(serde::de::Error::custom("a JSON object was expected")),
    }
}

fn role(spec: &Spec) -> Result<Role, SpecError> {
    let annotation = |key: &str| {
        spec.annotations()
            .as_ref()
            .and_then(|annotations| annotations.get(key))
    };
    match annotation(CONTAINER_TYPE).map(String::as_str) {
        None => Ok(Role::Standalone),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => {
            let sandbox = annotation(SANDBOX_ID).map_or("", String::as_str);
            sandbox.parse().map(Role::Member).map_err(SpecError::Id)
        }
        Some(other) => Err(SpecError::Annotation {
            key: CONTAINER_TYPE,
            value: other.to_owned(),
            expected: "\"sandbox\" or \"container\" was expected".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use ids::Mib;

    use super::*;

    const NODE: Mib = Mib(1024);

    fn bundle(annotations: &str) -> Result<Bundle, SpecError> {
        Bundle::parse(
            format!("{{\"ociVersion\":\"1.0.2\",\"annotations\":{annotations}}}").as_bytes(),
        )
    }

    fn id() -> ContainerId {
        "c1".parse().unwrap()
    }

    #[test]
    fn container_without_annotations_is_a_sandbox_of_its_own() {
        let bundle = bundle("{}").unwrap();
        assert_eq!(bundle.role(), &Role::Standalone);
        assert_eq!(bundle.sandbox(&id()).unwrap().as_str(), "c1");
    }

    #[test]
    fn member_belongs_to_the_annotated_sandbox() {
        let json = format!("{{\"{CONTAINER_TYPE}\":\"container\",\"{SANDBOX_ID}\":\"pod1\"}}");
        let bundle = bundle(&json).unwrap();
        assert_eq!(bundle.role(), &Role::Member("pod1".parse().unwrap()));
        assert_eq!(bundle.sandbox(&id()).unwrap().as_str(), "pod1");
    }

    #[test]
    fn group_annotation_is_heeded_outside_cri_alone() {
        let sandbox_of = |others: &str| {
            let json = format!("{{\"{RUNC_GROUP}\":\"victim\"{others}}}");
            bundle(&json).unwrap().sandbox(&id()).unwrap()
        };
        assert_eq!(sandbox_of("").as_str(), "victim");
        let sandbox = format!(",\"{CONTAINER_TYPE}\":\"sandbox\"");
        assert_eq!(sandbox_of(&sandbox).as_str(), "c1");
        let member = format!(",\"{CONTAINER_TYPE}\":\"container\",\"{SANDBOX_ID}\":\"pod1\"");
        assert_eq!(sandbox_of(&member).as_str(), "pod1");
    }

    #[test]
    fn sandbox_id_that_leaves_a_directory_is_refused() {
        let json = format!("{{\"{CONTAINER_TYPE}\":\"container\",\"{SANDBOX_ID}\":\"../x\"}}");
        assert!(matches!(bundle(&json), Err(SpecError::Id(_))));
    }

    #[test]
    fn network_namespace_is_the_one_with_a_path() {
        let namespace = |network: &str| {
            let json = format!(
                "{{\"ociVersion\":\"1.0.2\",\"linux\":{{\"namespaces\":[{{\"type\":\"pid\",\"path\":\"/p\"}}{network}]}}}}"
            );
            let bundle = Bundle::parse(json.as_bytes()).unwrap();
            bundle.network_namespace().map(std::path::Path::to_path_buf)
        };
        assert_eq!(namespace(""), None);
        assert_eq!(namespace(",{\"type\":\"network\"}"), None);
        assert_eq!(namespace(",{\"type\":\"network\",\"path\":\"\"}"), None);
        assert_eq!(
            namespace(",{\"type\":\"network\",\"path\":\"/run/netns/n\"}"),
            Some("/run/netns/n".into())
        );
    }

    #[test]
    fn domain_name_is_a_kernel_parameter_of_the_pod() {
        let json = r#"{"ociVersion":"1.0.2","domainname":"nis","linux":{"sysctl":{"kernel.msgmax":"9"},
            "namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"network"}]}}"#;
        let guest = crate::RuntimeConfig::default().guest;
        let overrides = Overrides::default();
        let bundle = Bundle::parse(json.as_bytes()).unwrap();
        let pod = bundle.pod(&guest, NODE, &overrides).unwrap();
        let sysctls: Vec<_> = pod.sysctls.iter().collect();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let expected = [pair("kernel.domainname", "nis"), pair("kernel.msgmax", "9")];
        assert_eq!(
            sysctls,
            expected.each_ref().map(|(key, value)| (key, value))
        );
    }

    #[test]
    fn pod_with_a_user_namespace_is_refused_before_it_has_a_vm() {
        let json = r#"{"ociVersion":"1.0.2","linux":{
            "namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"network"},{"type":"user"}]}}"#;
        let guest = crate::RuntimeConfig::default().guest;
        let overrides = Overrides::default();
        let bundle = Bundle::parse(json.as_bytes()).unwrap();
        let error = bundle.pod(&guest, NODE, &overrides);
        assert!(error.unwrap_err().to_string().contains("hostUsers"));
    }

    #[test]
    fn unknown_container_type_is_refused() {
        assert!(matches!(
            bundle(&format!("{{\"{CONTAINER_TYPE}\":\"vm\"}}")),
            Err(SpecError::Annotation { .. })
        ));
    }

    #[test]
    fn bytes_that_are_no_json_are_refused() {
        for text in ["not json", "[]", " [\"1.0.2\"]", "7", ""] {
            let parsed = Bundle::parse(text.as_bytes());
            assert!(matches!(parsed, Err(SpecError::Json(_))), "{text:?}");
        }
        Bundle::parse(b" \n{\"ociVersion\":\"1.0.2\"}").unwrap();
        assert!(matches!(
            Bundle::parse(&vec![b' '; MAX_SPEC_BYTES + 1]),
            Err(SpecError::TooLong { .. })
        ));
    }
}
