// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The node as a sandbox sees it: bundles and containerd's mounts become a VM and its containers.
//!
//! Reads files and calls [`pod_spec`], which decides, and [`pod_storage`] and [`pod_network`], which build. What storage
//! makes on the host is an open file without a name; only a joined network is there to undo.

use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use agent_proto::{CONTROL_PORT, api};
use hypervisor::{Disk, VmSpec};
use ids::{DiskSerial, GuestCid, Mib, SandboxId};
use pod_spec::{
    Bundle, ContainerSpec, HostMounts, HostNamespaces, MIN_VM_MEMORY, Overrides, PodSpec, Role,
    RuntimeConfig, SpecError,
};
use pod_storage::{Rootfs, RootfsForm, StorageError, Store, WrittenBack};
use sandbox::{
    ContainerKind, ContainerPlan, CreateTask, GuestContainer, GuestDisk, GuestRootfs, Host,
    InterfaceCounters, PodPlan, SandboxError, SandboxErrorKind, Shell,
};

use crate::network;
use crate::node_size;
use crate::pod_source::{DescribedPod, PodSource};
use crate::serve::PodRequest;
use crate::start::read_bundle;

/// The scratch disk's file system, and how the guest mounts it: what is deleted is given back to the host at once.
const SCRATCH_FS: &str = "ext4";
const SCRATCH_OPTIONS: &str = "discard";

/// The node for one sandbox.
#[derive(Debug)]
pub struct NodeHost {
    id: SandboxId,
    source: PodSource,
    /// Where the pod's own files are.
    private_dir: PathBuf,
    config: RuntimeConfig,
    /// EmptyDirs that were shared with a container because the host had put files into them: they are for the others too.
    filled: Mutex<BTreeSet<PathBuf>>,
    /// What the pod's annotations have changed of its VM.
    overrides: OnceLock<Overrides>,
    /// The pod's network namespace, once its VM is joined to it.
    network: OnceLock<PathBuf>,
}

impl NodeHost {
    /// The node for the sandbox that `pod` asks for.
    pub fn new(pod: &PodRequest<'_>) -> Self {
        Self {
            id: pod.id.clone(),
            source: pod.source.clone(),
            private_dir: pod.private_dir.to_path_buf(),
            config: pod.config.clone(),
            filled: Mutex::default(),
            overrides: OnceLock::new(),
            network: OnceLock::new(),
        }
    }

    /// The memory that the VM starts with: what the pod wants, as far as its cgroup has room for it.
    fn start_memory(&self, cgroups_path: Option<&Path>, wanted: Mib) -> Result<Mib, SandboxError> {
        let limit = memory_limit(cgroups_path)?.unwrap_or(wanted);
        let exhausted = |limit: Mib| {
            let message = format!(
                "the pod's cgroup leaves its VM {} MiB of memory, and no VM starts with less than {}: raise the pod's \
                 limits or its RuntimeClass's overhead",
                limit.0, MIN_VM_MEMORY.0
            );
            SandboxError::new(SandboxErrorKind::ResourceExhausted, message)
        };
        if limit < MIN_VM_MEMORY {
            return Err(exhausted(limit));
        }
        if limit < wanted {
            tracing::warn!(
                sandbox_id = self.id.as_str(),
                wanted_mib = wanted.0,
                mib = limit.0,
                "the pod's cgroup has no room for its limits and the VM's overhead: raise its RuntimeClass's overhead"
            );
        }
        Ok(wanted.min(limit))
    }

    /// What of the node decides how the bind mounts of `bundle` reach the guest.
    fn host_mounts(&self, bundle: &Bundle) -> Result<HostMounts, SandboxError> {
        let mounts = pod_storage::host_mounts(bundle.bind_sources()).map_err(storage_error)?;
        let empty_dirs = pod_spec::disk_empty_dirs(bundle.bind_sources(), &mounts);
        let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        filled.extend(pod_storage::filled_by_the_host(empty_dirs).map_err(storage_error)?);
        Ok(mounts.with_filled(filled.clone()))
    }

    fn store(&self) -> Result<Store, SandboxError> {
        Store::open(&self.config.storage).map_err(storage_error)
    }

    /// The pod that CreateSandbox has described.
    fn described(&self) -> Option<&DescribedPod> {
        match &self.source {
            PodSource::Bundle(_) => None,
            PodSource::Described(cell) => cell.get(),
        }
    }

    /// What is known of the pod before its VM.
    fn pod(&self) -> Result<KnownPod, SandboxError> {
        let guest = &self.config.guest;
        let node_memory = node_size::node_memory().map_err(|error| {
            let message = "find out how much memory the node has";
            SandboxError::new(SandboxErrorKind::Internal, message).because(error)
        })?;
        match &self.source {
            PodSource::Bundle(dir) => {
                let bundle = self.bundle(dir)?;
                let overrides = bundle.overrides(&self.config).map_err(spec_error)?;
                Ok(KnownPod {
                    spec: bundle
                        .pod(guest, node_memory, &overrides)
                        .map_err(spec_error)?,
                    overrides,
                    cgroups_path: bundle.cgroups_path().map(Path::to_path_buf),
                    network_namespace: bundle.network_namespace().map(Path::to_path_buf),
                    annotations: bundle.annotations(),
                })
            }
            PodSource::Described(cell) => {
                let pod = cell.get().ok_or_else(|| {
                    let message = format!("sandbox {} is not described", self.id);
                    SandboxError::new(SandboxErrorKind::FailedPrecondition, message)
                })?;
                let overrides = Overrides::read(Some(&pod.annotations), &self.config);
                let overrides = overrides.map_err(spec_error)?;
                let spec = pod.description.pod(guest, node_memory, &overrides);
                Ok(KnownPod {
                    spec: spec.map_err(spec_error)?,
                    overrides,
                    cgroups_path: pod.cgroups_path.as_ref().map(PathBuf::from),
                    network_namespace: pod.network_namespace.clone(),
                    annotations: pod.annotations.clone(),
                })
            }
        }
    }

    /// A bundle, with what the node's config says of namespaces.
    fn bundle(&self, dir: &Path) -> Result<Bundle, SandboxError> {
        let mut bundle = bundle(dir)?;
        if self.config.guest.host_namespaces == HostNamespaces::Guest {
            bundle.use_guest_namespaces().map_err(spec_error)?;
        }
        Ok(bundle)
    }

    /// Makes a container a member of a pod that has no spec.
    fn join(&self, bundle: &mut Bundle, pod: &DescribedPod) -> Result<(), SandboxError> {
        let places = pod
            .files
            .as_ref()
            .map_or_else(Vec::new, |files| files.places(&self.private_dir));
        let places: Vec<(&str, &Path)> = places
            .iter()
            .map(|(place, source)| (*place, source.as_path()))
            .collect();
        bundle.join(&self.id, &places).map_err(spec_error)
    }

    /// A container's root file system and the files that are copied into it.
    fn guest_container(
        &self,
        task: &CreateTask,
        spec: ContainerSpec,
    ) -> Result<GuestContainer, SandboxError> {
        let store = self.store()?;
        let mut mounts = Vec::new();
        for mount in &task.rootfs {
            if !matches!(mount.target.as_str(), "" | "/") {
                let message = format!(
                    "a rootfs mount with target {:?}: only mounts of the whole rootfs are known",
                    mount.target
                );
                return Err(SandboxError::new(SandboxErrorKind::Unimplemented, message));
            }
            mounts.push(pod_storage::RootfsMount {
                fs_type: mount.fs_type.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
            });
        }
        let rootfs = store
            .rootfs(
                &task.container,
                &mounts,
                &task.bundle.join(&spec.host_rootfs),
            )
            .map_err(storage_error)?;
        Ok(GuestContainer {
            oom_score_adj: spec.oom_score_adj,
            limits: Some(spec.limits),
            spec_json: spec.guest_spec,
            rootfs: guest_rootfs(rootfs)?,
            live: spec.live,
            written_back: WrittenBack::open_all(&spec.copies).map_err(storage_error)?,
            copied_mounts: store.copy_files(&spec.copies).map_err(storage_error)?,
            volumes: store.empty_dirs(&spec.empty_dirs).map_err(storage_error)?,
            sub_paths: pod_storage::sub_paths(&spec.sub_paths).map_err(storage_error)?,
            host_folders: spec.host_folders,
            block_devices: pod_storage::block_devices(&spec.block_devices)
                .map_err(storage_error)?,
        })
    }

    /// A debugging shell, if the node allows any.
    fn shell(&self, task: &CreateTask, shell: &Shell) -> Result<GuestContainer, SandboxError> {
        let tools = self.config.debug.rootfs.as_deref().ok_or_else(|| {
            let message = "this node allows no debugging shells: set debug.rootfs in its config to a directory with \
                           /bin/sh, and start the pod anew";
            SandboxError::new(SandboxErrorKind::PermissionDenied, message)
        })?;
        tracing::info!(container_id = %task.container, "a debugging shell begins");
        let rootfs = self
            .store()?
            .rootfs(&task.container, &[], tools)
            .map_err(storage_error)?;
        Ok(GuestContainer {
            oom_score_adj: None,
            limits: None,
            spec_json: pod_spec::shell_spec(&shell.args, task.stdio.terminal, &shell.term),
            rootfs: guest_rootfs(rootfs)?,
            copied_mounts: Vec::new(),
            written_back: Vec::new(),
            live: Vec::new(),
            volumes: Vec::new(),
            sub_paths: Vec::new(),
            host_folders: Vec::new(),
            block_devices: Vec::new(),
        })
    }
}

/// A pod, whoever has described it.
struct KnownPod {
    spec: PodSpec,
    /// What its annotations change of the VM.
    overrides: Overrides,
    /// The host's cgroup for it, as an OCI spec's `linux.cgroupsPath`.
    cgroups_path: Option<PathBuf>,
    network_namespace: Option<PathBuf>,
    annotations: HashMap<String, String>,
}

impl Host for NodeHost {
    fn plan_pod(&self) -> Result<PodPlan, SandboxError> {
        let pod = self.pod()?;
        self.overrides.get_or_init(|| pod.overrides);
        let limits = self.config.limits.limits(&pod.annotations);
        let limits = limits.map_err(spec_error)?;
        let memory = self.start_memory(
            pod.cgroups_path.as_deref(),
            pod.spec.size.started_with.memory,
        )?;
        let (pod, namespace) = (pod.spec, pod.network_namespace);
        let scratch = self.store()?.scratch_disk().map_err(storage_error)?;
        let guest = &self.config.guest;
        let mut configure = api::ConfigureSandboxRequest::new();
        configure.hostname = pod.hostname.unwrap_or_default();
        configure.sysctls = pod.sysctls.into_iter().collect();
        configure.shm_bytes = pod.shm.0;
        configure.wall_clock_ns = wall_clock_ns();
        configure.scratch = Some(api::Disk {
            serial: scratch.serial.to_string(),
            fs_type: SCRATCH_FS.to_owned(),
            mount_options: vec![SCRATCH_OPTIONS.to_owned()],
            ..api::Disk::default()
        })
        .into();
        let kernel = open("guest.kernel", &guest.kernel)?;
        let initramfs = open("guest.initramfs", &guest.initramfs)?;
        // Last: whatever fails before has nothing to undo.
        let metadata = self.config.network.metadata_service;
        let (networks, loopback, guard) = match &namespace {
            None => (Vec::new(), None, nothing_to_undo()),
            Some(namespace) => {
                let joined = network::join(namespace, metadata)?;
                self.network.get_or_init(|| namespace.to_path_buf());
                configure.interfaces = joined.interfaces;
                configure.rules = joined.rules;
                let (loopback, redirection) = network::take_loopback(namespace).unzip();
                let guard = (redirection, joined.guard);
                (
                    joined.cards,
                    loopback,
                    Box::new(guard) as Box<dyn Any + Send>,
                )
            }
        };
        let vm = VmSpec {
            sandbox: self.id.clone(),
            vcpus: pod.size.started_with.vcpus,
            max_vcpus: pod.size.largest.vcpus,
            memory,
            max_memory: pod.size.largest.memory,
            kernel,
            initramfs,
            kernel_arguments: guest.kernel_arguments.clone(),
            networks,
            disks: vec![scratch],
            limits,
            cid: GuestCid::DEFAULT,
            host_ports: vec![CONTROL_PORT],
            console_log: None,
        };
        Ok(PodPlan {
            vm,
            overhead: pod.size.overhead,
            configure,
            loopback,
            guard,
        })
    }

    fn plan_container(&self, task: &CreateTask) -> Result<ContainerPlan, SandboxError> {
        if let Some(shell) = &task.shell {
            return Ok(ContainerPlan {
                kind: ContainerKind::Guest(Box::new(self.shell(task, shell)?)),
                guard: nothing_to_undo(),
            });
        }
        if let PodSource::Described(_) = &self.source
            && task.container.as_str() == self.id.as_str()
        {
            return Ok(ContainerPlan {
                kind: ContainerKind::Sandbox,
                guard: nothing_to_undo(),
            });
        }
        let mut bundle = self.bundle(&task.bundle)?;
        let described = self.described();
        let sandbox = match bundle.role() {
            // The Sandbox API asks for no annotations: a container of this shim is of its pod.
            Role::Standalone if described.is_some() => self.id.clone(),
            _ => bundle.sandbox(&task.container).map_err(spec_error)?,
        };
        if sandbox != self.id {
            let message = format!(
                "container {} is of sandbox {sandbox}, this is sandbox {}",
                task.container, self.id
            );
            return Err(SandboxError::new(
                SandboxErrorKind::InvalidArgument,
                message,
            ));
        }
        bundle
            .overrides(&self.config)
            .and_then(|own| own.check_within(self.overrides.get().unwrap_or(&own)))
            .map_err(spec_error)?;
        if let Some(pod) = described {
            self.join(&mut bundle, pod)?;
        }
        let kind = match bundle.role() {
            Role::Sandbox => ContainerKind::Sandbox,
            Role::Member(_) | Role::Standalone => {
                let mounts = self.host_mounts(&bundle)?;
                let spec = bundle
                    .container(&task.container, &mounts)
                    .map_err(spec_error)?;
                ContainerKind::Guest(Box::new(self.guest_container(task, spec)?))
            }
        };
        Ok(ContainerPlan {
            kind,
            guard: nothing_to_undo(),
        })
    }

    fn memory_limit(&self) -> Result<Option<Mib>, SandboxError> {
        match &self.source {
            PodSource::Bundle(dir) => memory_limit(bundle(dir)?.cgroups_path()),
            PodSource::Described(cell) => memory_limit(
                cell.get()
                    .and_then(|pod| pod.cgroups_path.as_deref())
                    .map(Path::new),
            ),
        }
    }

    fn interfaces(&self) -> Vec<InterfaceCounters> {
        let namespace = self.network.get();
        namespace.map_or_else(Vec::new, |namespace| network::counters(namespace))
    }
}

fn memory_limit(cgroups_path: Option<&Path>) -> Result<Option<Mib>, SandboxError> {
    node_size::memory_limit(cgroups_path).map_err(|error| {
        let message = "read the memory limit of the pod's cgroup";
        SandboxError::new(SandboxErrorKind::Internal, message).because(error)
    })
}

fn nothing_to_undo() -> Box<dyn Any + Send> {
    Box::new(())
}

fn bundle(dir: &Path) -> Result<Bundle, SandboxError> {
    let missing = || {
        let message = format!("{} has no config.json", dir.display());
        SandboxError::new(SandboxErrorKind::InvalidArgument, message)
    };
    read_bundle(dir)
        .map_err(|error| {
            let message = format!("read the bundle {}", dir.display());
            SandboxError::new(SandboxErrorKind::InvalidArgument, message).because(error)
        })?
        .ok_or_else(missing)
}

fn open(key: &str, path: &Path) -> Result<File, SandboxError> {
    File::open(path).map_err(|error| {
        let message = format!("open {}: set {key} in the node's config", path.display());
        SandboxError::new(SandboxErrorKind::FailedPrecondition, message).because(error)
    })
}

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default()
}

/// Each disk with its way of being mounted, in the order of the mounts.
fn guest_rootfs(rootfs: Rootfs) -> Result<GuestRootfs, SandboxError> {
    let mut disks = rootfs.disks;
    Ok(match rootfs.form {
        RootfsForm::Layered(serials) => {
            let layers = serials
                .iter()
                .map(|serial| guest_disk(&mut disks, serial, "erofs", vec!["ro".to_owned()]));
            GuestRootfs::Layered(layers.collect::<Result<_, _>>()?)
        }
        RootfsForm::Disk {
            serial,
            fs_type,
            options,
        } => GuestRootfs::Disk(guest_disk(&mut disks, &serial, &fs_type, options)?),
    })
}

fn guest_disk(
    disks: &mut Vec<Disk>,
    serial: &DiskSerial,
    fs_type: &str,
    mount_options: Vec<String>,
) -> Result<GuestDisk, SandboxError> {
    let at = disks
        .iter()
        .position(|disk| disk.serial == *serial)
        .ok_or_else(|| {
            SandboxError::new(
                SandboxErrorKind::Internal,
                format!("the rootfs names disk {serial}, which it does not have"),
            )
        })?;
    Ok(GuestDisk {
        disk: disks.swap_remove(at),
        fs_type: fs_type.to_owned(),
        mount_options,
    })
}

fn spec_error(error: SpecError) -> SandboxError {
    let kind = match &error {
        SpecError::TooLong { .. }
        | SpecError::Json(_)
        | SpecError::ExecJson(_)
        | SpecError::ResourcesJson(_)
        | SpecError::Missing(_)
        | SpecError::Annotation { .. }
        | SpecError::UnknownAnnotation { .. }
        | SpecError::Id(_) => SandboxErrorKind::InvalidArgument,
        SpecError::AnnotationNotAllowed(_) => SandboxErrorKind::PermissionDenied,
        SpecError::HostNamespace(..) | SpecError::Unsupported { .. } => {
            SandboxErrorKind::Unimplemented
        }
        SpecError::TooLarge { .. } | SpecError::BeyondVm { .. } => {
            SandboxErrorKind::ResourceExhausted
        }
    };
    SandboxError::new(kind, "read the container's spec").because(error)
}

fn storage_error(error: StorageError) -> SandboxError {
    let kind = match &error {
        StorageError::NoSpace { .. } => SandboxErrorKind::ResourceExhausted,
        StorageError::UnknownRootfs(_)
        | StorageError::Overlay { .. }
        | StorageError::TooManyImages { .. }
        | StorageError::CopyTooLarge { .. }
        | StorageError::CopyKind { .. }
        | StorageError::NotADirectory(_)
        | StorageError::NotADisk(_)
        | StorageError::NotAFile(_)
        | StorageError::NameNotUtf8(_) => SandboxErrorKind::InvalidArgument,
        StorageError::Io { .. } | StorageError::Tool { .. } | StorageError::Serial(_) => {
            SandboxErrorKind::Internal
        }
    };
    SandboxError::new(kind, "prepare the pod's storage").because(error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
    use ids::ContainerId;
    use network_testbed::{Namespace, is_root};
    use sandbox::{RootfsMount, StdioPaths};

    fn host(dir: &Path, config: &str) -> NodeHost {
        let cache = dir.join("cache");
        let text = format!(
            "{config}\n[storage]\ncache_dir = {:?}\nscratch_mib = 64",
            cache.to_str().unwrap()
        );
        NodeHost {
            id: "pod1".parse().unwrap(),
            source: PodSource::Bundle(dir.to_path_buf()),
            private_dir: dir.to_path_buf(),
            config: RuntimeConfig::parse(&text).unwrap(),
            filled: Mutex::default(),
            overrides: OnceLock::new(),
            network: OnceLock::new(),
        }
    }

    fn task(dir: &Path, id: &str, rootfs: Vec<RootfsMount>) -> CreateTask {
        CreateTask {
            container: id.parse::<ContainerId>().unwrap(),
            bundle: dir.to_path_buf(),
            rootfs,
            stdio: StdioPaths::default(),
            shell: None,
        }
    }

    fn spec(dir: &Path, annotations: &str) {
        spec_in(dir, annotations, Path::new(""));
    }

    fn spec_in(dir: &Path, annotations: &str, network: &Path) {
        let mut namespaces: Vec<_> = ["mount", "pid", "ipc", "uts"]
            .map(|kind| serde_json::json!({ "type": kind }))
            .into();
        namespaces.push(serde_json::json!({ "type": "network", "path": network }));
        let annotations: serde_json::Value = serde_json::from_str(annotations).unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "web",
            "annotations": annotations,
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["true"] },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": namespaces },
        });
        std::fs::write(dir.join("config.json"), spec.to_string()).unwrap();
    }

    fn kind<T>(result: Result<T, SandboxError>) -> (SandboxErrorKind, String) {
        match result {
            Ok(_) => panic!("accepted"),
            Err(error) => (error.kind(), error.report()),
        }
    }

    #[test]
    fn pod_without_guest_kernel_says_which_key_to_set() {
        let dir = tempfile::tempdir().unwrap();
        spec(dir.path(), "{}");
        let host = host(dir.path(), "[guest]\nkernel = \"/nowhere/vmlinux\"");
        let (kind, text) = kind(host.plan_pod());
        assert_eq!(kind, SandboxErrorKind::FailedPrecondition);
        assert!(
            text.starts_with("open /nowhere/vmlinux: set guest.kernel in the node's config: "),
            "{text}"
        );
    }

    /// A config whose guest is there.
    fn guest(dir: &Path) -> String {
        for name in ["vmlinux", "initramfs"] {
            std::fs::write(dir.join(name), name).unwrap();
        }
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        format!(
            "[guest]\nkernel = {:?}\ninitramfs = {:?}",
            path("vmlinux"),
            path("initramfs")
        )
    }

    #[test]
    fn annotations_change_the_vm_only_if_the_node_allows_it() {
        let dir = tempfile::tempdir().unwrap();
        spec(dir.path(), r#"{"io.coffer.vm.vcpus": "3"}"#);
        let refused = kind(host(dir.path(), &guest(dir.path())).plan_pod());
        assert_eq!(
            refused.0,
            SandboxErrorKind::PermissionDenied,
            "{}",
            refused.1
        );
        let allow = "\n[annotations]\nallow = [\"io.coffer.vm.vcpus\"]";
        let host = host(dir.path(), &(guest(dir.path()) + allow));
        assert_eq!(host.plan_pod().unwrap().vm.vcpus.get(), 3);
        // A container of the pod that wants something else.
        let member = r#"{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod1",
                         "io.coffer.vm.vcpus": "4"}"#;
        spec(dir.path(), member);
        let (kind, text) = kind(host.plan_container(&task(dir.path(), "c1", Vec::new())));
        assert_eq!(kind, SandboxErrorKind::InvalidArgument);
        assert!(text.contains("annotate the pod"), "{text}");
    }

    #[test]
    fn annotations_of_a_described_pod_are_read_alike() {
        let dir = tempfile::tempdir().unwrap();
        let mut request = CreateSandboxRequest::new();
        request
            .annotations
            .insert("io.coffer.vm.vcpus".to_owned(), "3".to_owned());
        let id = "pod1".parse().unwrap();
        let pod = DescribedPod::new(&request, &id, SystemTime::UNIX_EPOCH).unwrap();
        let source = PodSource::Described(Arc::new(OnceLock::from(pod)));
        let described = |config: &str| NodeHost {
            source: source.clone(),
            ..host(dir.path(), config)
        };
        let refused = kind(described(&guest(dir.path())).plan_pod());
        assert_eq!(
            refused.0,
            SandboxErrorKind::PermissionDenied,
            "{}",
            refused.1
        );
        let allow = "\n[annotations]\nallow = [\"io.coffer.vm.vcpus\"]";
        let plan = described(&(guest(dir.path()) + allow)).plan_pod().unwrap();
        assert_eq!((plan.vm.vcpus.get(), plan.vm.max_vcpus.get()), (3, 3));
    }

    #[test]
    fn pod_is_made_from_its_first_bundle() {
        let dir = tempfile::tempdir().unwrap();
        spec(dir.path(), "{}");
        let plan = host(dir.path(), &guest(dir.path())).plan_pod().unwrap();
        assert_eq!(plan.vm.sandbox.as_str(), "pod1");
        assert_eq!(plan.vm.host_ports, [CONTROL_PORT]);
        assert_eq!(plan.configure.hostname, "web");
        assert_eq!(
            plan.configure.scratch.serial,
            plan.vm.disks[0].serial.as_str()
        );
        assert!(plan.configure.wall_clock_ns > 0);
        assert!(plan.vm.networks.is_empty() && plan.configure.interfaces.is_empty());
    }

    #[test]
    fn pod_with_a_network_has_its_cards_until_the_plan_is_dropped() {
        if !is_root() {
            return;
        }
        let pod = Namespace::new();
        pod.ip("link add eth0 address 02:00:00:00:00:07 type veth peer name eth0p");
        pod.ip("link set eth0 up");
        pod.ip("addr add 10.1.2.3/24 dev eth0");
        let dir = tempfile::tempdir().unwrap();
        spec_in(dir.path(), "{}", &pod.path());
        let plan = host(dir.path(), &guest(dir.path())).plan_pod().unwrap();
        assert_eq!(plan.vm.networks.len(), 1);
        assert_eq!(plan.vm.networks[0].mac, [2, 0, 0, 0, 0, 7]);
        assert_eq!(plan.configure.interfaces[0].name, "eth0");
        assert!(pod.ip("link show").contains("coffer"));
        drop(plan);
        assert!(!pod.ip("link show").contains("coffer"));
        assert!(!pod.run("tc", "qdisc show").contains("ingress"));
    }

    #[test]
    fn pod_whose_network_is_gone_is_not_planned() {
        let dir = tempfile::tempdir().unwrap();
        spec_in(dir.path(), "{}", Path::new("/nowhere/netns"));
        let (kind, text) = kind(host(dir.path(), &guest(dir.path())).plan_pod());
        assert_eq!(kind, SandboxErrorKind::FailedPrecondition);
        assert!(text.contains("/nowhere/netns"), "{text}");
    }

    #[test]
    fn bundle_that_is_no_json_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "not json").unwrap();
        let (kind, text) =
            kind(host(dir.path(), "").plan_container(&task(dir.path(), "pod1", vec![])));
        assert_eq!(kind, SandboxErrorKind::InvalidArgument);
        assert!(
            text.contains(dir.path().to_str().unwrap()) && text.contains("OCI runtime spec"),
            "{text}"
        );
    }

    #[test]
    fn sandbox_container_needs_nothing_and_a_stranger_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), "");
        spec(
            dir.path(),
            "{\"io.kubernetes.cri.container-type\":\"sandbox\"}",
        );
        let plan = host
            .plan_container(&task(dir.path(), "pod1", vec![]))
            .unwrap();
        assert!(matches!(plan.kind, ContainerKind::Sandbox));
        let (kind, text) = kind(host.plan_container(&task(dir.path(), "pod2", vec![])));
        assert_eq!(kind, SandboxErrorKind::InvalidArgument);
        assert_eq!(
            text,
            "container pod2 is of sandbox pod2, this is sandbox pod1"
        );
    }

    fn shell(dir: &Path) -> CreateTask {
        CreateTask {
            shell: Some(Shell {
                args: vec!["/bin/sh".to_owned()],
                term: String::new(),
            }),
            ..task(dir, "coffer-shell-1", vec![])
        }
    }

    #[test]
    fn shell_is_refused_unless_the_config_allows_it() {
        let dir = tempfile::tempdir().unwrap();
        let (kind, text) = kind(host(dir.path(), "").plan_container(&shell(dir.path())));
        assert_eq!(kind, SandboxErrorKind::PermissionDenied);
        assert!(text.contains("set debug.rootfs"), "{text}");
    }

    #[test]
    fn shell_has_the_tools_of_the_config() {
        let dir = tempfile::tempdir().unwrap();
        let tools = dir.path().join("tools");
        std::fs::create_dir_all(tools.join("bin")).unwrap();
        std::fs::write(tools.join("bin/sh"), "tool").unwrap();
        let config = format!("[debug]\nrootfs = {:?}", tools.to_str().unwrap());
        let plan = host(dir.path(), &config)
            .plan_container(&shell(dir.path()))
            .unwrap();
        let ContainerKind::Guest(guest) = plan.kind else {
            panic!("a shell is in the guest")
        };
        let GuestRootfs::Layered(layers) = guest.rootfs else {
            panic!("a directory is an image")
        };
        assert_eq!(layers.len(), 1);
        assert_eq!(layers[0].fs_type, "erofs");
        let spec: serde_json::Value = serde_json::from_slice(&guest.spec_json).unwrap();
        assert_eq!(spec["process"]["args"][0], "/bin/sh");
    }

    #[test]
    fn rootfs_of_unknown_type_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        spec(dir.path(), "{}");
        let mount = |fs_type: &str, target: &str| RootfsMount {
            fs_type: fs_type.to_owned(),
            source: "none".to_owned(),
            target: target.to_owned(),
            options: vec![],
        };
        let host = host(dir.path(), "");
        let unknown = kind(host.plan_container(&task(dir.path(), "pod1", vec![mount("zfs", "")])));
        assert_eq!(
            unknown.0,
            SandboxErrorKind::InvalidArgument,
            "{}",
            unknown.1
        );
        assert!(unknown.1.contains("zfs"), "{}", unknown.1);
        let partial =
            kind(host.plan_container(&task(dir.path(), "pod1", vec![mount("overlay", "/usr")])));
        assert_eq!(partial.0, SandboxErrorKind::Unimplemented);
    }
}
