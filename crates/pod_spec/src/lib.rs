// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! OCI spec, CRI annotations and node config become a validated pod and its containers.
//!
//! ```text
//! config.toml ──RuntimeConfig::parse──> RuntimeConfig ─┐
//! config.json ──Bundle::parse──> Bundle ──────────────┼─> Bundle::pod ───────> PodSpec        (sizes the VM)
//! CreateSandbox ───────────────> PodDescription ───────┼─> PodDescription::pod ─> PodSpec
//! mountinfo ────HostMounts::parse──> HostMounts ───────┴─> Bundle::container ─> ContainerSpec  (what the agent gets)
//! ```
//!
//! Pure: nothing here opens a file. What a spec asks for is either translated for the guest, or refused with an error
//! that says what to do. The few fields that are left out on purpose, because another layer does their work, are listed
//! at [`Bundle::container`].
#![forbid(unsafe_code)]

mod annotations;
mod block_devices;
mod bundle;
mod config;
mod config_print;
mod config_text;
mod description;
mod devices;
mod endpoint;
mod error;
mod host_folders;
mod host_mounts;
mod ledger;
mod mounts;
mod namespaces;
mod refusals;
mod shell;
mod sizing;
mod traffic;
mod translate;
mod update;
mod volumes;

pub use annotations::{ANNOTATIONS, Annotation, Overrides, PREFIX as ANNOTATION_PREFIX};
pub use block_devices::BlockDevice;
pub use bundle::{Bundle, ContainerSpec, HostCopy, MAX_SPEC_BYTES, PodSpec, Role, SubPath};
pub use config::{
    Annotations, Debug, FileServer, Guest, HostNamespaces, Log, LogLevel, MIN_VM_MEMORY,
    MetadataService, Network, RuntimeConfig, Storage, Telemetry, Traffic, Vmm,
};
pub use config_print::print_config;
pub use config_text::{ConfigEntry, ConfigError, ConfigMistake, ConfigOrigin};
pub use description::PodDescription;
pub use endpoint::Endpoint;
pub use error::SpecError;
pub use host_folders::{FolderAccess, FolderPropagation, HostFolder, MAX_WRITABLE_MOUNTS};
pub use host_mounts::HostMounts;
pub use ledger::Ledger;
pub use shell::shell_spec;
pub use sizing::{Limits, PodSize, VmSize};
pub use traffic::is_traffic_annotation;
pub use translate::exec_process;
pub use update::{LimitChanges, MAX_RESOURCES_BYTES, ResourceUpdate};
pub use volumes::{
    EmptyDir, LiveVolume, MAX_TERMINATION_MESSAGE, MAX_WRITTEN_BACK, Medium, VolumeKind, WriteBack,
    classify, disk_empty_dirs,
};
