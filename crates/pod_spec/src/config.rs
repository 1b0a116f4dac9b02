// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The node's config file: one TOML file, every key optional, no key unknown.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ids::{Mib, VcpuCount};

use crate::config_text::{ConfigEntry, ConfigError, ConfigText};
use crate::endpoint::{self, Endpoint};

/// The largest VM that a config can allow, in MiB (1 TiB).
const MAX_MEMORY_MIB: u32 = 1 << 20;

/// The most that limits can be: a terabit, a billion, a tebibyte.
const MAX_MBIT: u64 = 1_000_000;
const MAX_OPERATIONS: u64 = 1_000_000_000;
const MAX_DISK_MIB: u64 = 1 << 20;
const MBIT_BYTES: u64 = 125_000;

/// The smallest VM that boots the guest kernel with its agent and a small container.
pub const MIN_VM_MEMORY: Mib = Mib(96);

/// The node's config, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `[guest]`: what boots, and how large.
    pub guest: Guest,
    /// `[vmm]`: the embedded VMM.
    pub vmm: Vmm,
    /// `[file_server]`: pods' host directories.
    pub file_server: FileServer,
    /// `[storage]`: images and scratch disks.
    pub storage: Storage,
    /// `[network]`: what pods may reach.
    pub network: Network,
    /// `[limits]`: what a pod's traffic is held to.
    pub limits: Traffic,
    /// `[log]`.
    pub log: Log,
    /// `[annotations]`: what pods may change of their VMs.
    pub annotations: Annotations,
    /// `[telemetry]`.
    pub telemetry: Telemetry,
    /// `[debug]`.
    pub debug: Debug,
}

/// `[guest]`: what boots, and how large.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// `kernel`: the guest kernel, an uncompressed ELF with a PVH entry note.
    pub kernel: PathBuf,
    /// `initramfs`: the archive with the agent.
    pub initramfs: PathBuf,
    /// `kernel_arguments`: appended to the kernel's command line, for debugging.
    pub kernel_arguments: Vec<String>,
    /// `default_vcpus`: virtual CPUs of a pod without a CPU limit.
    pub default_vcpus: VcpuCount,
    /// `max_vcpus`: the most that a pod can have.
    pub max_vcpus: VcpuCount,
    /// `spare_vcpus`: virtual CPUs that a pod can be given while it runs, beyond those it starts with.
    pub spare_vcpus: u8,
    /// `default_memory_mib`: guest memory of a pod without a memory limit.
    pub default_memory: Mib,
    /// `overhead_memory_mib`: what a pod's VM has beyond the pod's memory limit, for the guest kernel and the agent.
    pub overhead_memory: Mib,
    /// `max_memory_mib`: the most that a VM can have.
    pub max_memory: Mib,
    /// `host_namespaces`: what a container gets that asks for the node's PID or IPC namespace, or, without a pod, for its
    /// network.
    pub host_namespaces: HostNamespaces,
    /// `ready_timeout_s`: how long the agent may take to report, from the VM's start. More than 110 s are also what it has
    /// for making a container.
    pub ready_timeout: Duration,
}

/// What a container gets that asks for namespaces of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostNamespaces {
    /// An error that says so.
    Refused,
    /// The guest's, which is the machine that it runs on.
    Guest,
}

/// `[vmm]`: the embedded VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmm {
    /// `path`: the `coffer-vmm` program.
    pub path: PathBuf,
    /// `uid`: the user and group that a jailed VMM runs as; it owns nothing on the node.
    pub uid: u32,
}

/// `[file_server]`: pods' host directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileServer {
    /// `path`: the `coffer-virtiofsd` program.
    pub path: PathBuf,
}

/// `[storage]`: images and scratch disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// `cache_dir`: where image layers are kept as EROFS, and the scratch template.
    pub cache_dir: PathBuf,
    /// `scratch_mib`: the size of a pod's scratch disk. Sparse: it takes only what the pod writes.
    pub scratch: Mib,
    /// `mkfs_erofs`: the program of erofs-utils.
    pub mkfs_erofs: PathBuf,
    /// `mkfs_ext4`: the program of e2fsprogs.
    pub mkfs_ext4: PathBuf,
}

/// `[network]`: what pods may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// `metadata_service`: whether pods reach the node's cloud metadata service, which gives out the node's credentials.
    pub metadata_service: MetadataService,
}

/// `[limits]`: what each pod's traffic is held to; zero for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// `ingress_mbit`: bytes per second to the pod.
    pub ingress_bytes: u64,
    /// `egress_mbit`: bytes per second from the pod.
    pub egress_bytes: u64,
    /// `ingress_packets`: packets per second to the pod; a segment that is not cut up yet is one.
    pub ingress_packets: u64,
    /// `egress_packets`: packets per second from the pod.
    pub egress_packets: u64,
    /// `disk_mib`: bytes per second of all its disks, read and written.
    pub disk_bytes: u64,
    /// `disk_operations`: requests per second to all its disks.
    pub disk_operations: u64,
    /// `burst_ms`: how much of each may pass at once after a rest, as a time of its rate.
    pub burst_ms: u64,
}

/// Whether pods reach the cloud's metadata service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataService {
    /// What they send to it is dropped.
    Denied,
    /// As far as the CNI's policies let them.
    Allowed,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// `level`: the least severe lines that are written; containerd's `-debug` overrides it.
    pub level: LogLevel,
}

/// `[annotations]`: what pods may change of their VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotations {
    /// `allow`: the keys that a pod may have, of [`crate::ANNOTATIONS`]; a pod with another one is refused.
    pub allow: BTreeSet<&'static str>,
}

/// `[telemetry]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Telemetry {
    /// `otlp_endpoint`: where the spans of a pod's phases go; nowhere without one.
    pub otlp_endpoint: Option<Endpoint>,
}

/// `[debug]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Debug {
    /// `rootfs`: a directory with the tools of debugging shells, which are refused without one.
    pub rootfs: Option<PathBuf>,
}

/// The least severe lines that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed and somebody must look.
    Error,
    /// Something is not as it should be, and Coffer goes on.
    Warn,
    /// The life of pods and containers.
    Info,
    /// What a developer wants to see.
    Debug,
}

impl RuntimeConfig {
    /// Where the config is if nobody says otherwise. It need not exist.
    pub const DEFAULT_PATH: &str = "/etc/coffer/config.toml";

    /// The config from the text of its file.
    ///
    /// # Errors
    /// [`ConfigError::Toml`] if it is no TOML, [`ConfigError::Mistakes`] with every mistake in it.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut text = ConfigText::parse(text)?;
        let config = Self::read(&mut text);
        text.finish()?;
        Ok(config)
    }

    /// Every key with the value that it has by the text of a config file, and whether that says so itself.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn entries(text: &str) -> Result<Vec<ConfigEntry>, ConfigError> {
        let mut text = ConfigText::parse(text)?;
        Self::read(&mut text);
        text.finish()
    }

    fn read(text: &mut ConfigText) -> Self {
        Self {
            guest: Guest::read(text),
            vmm: Vmm {
                path: text.path("vmm.path", "/opt/coffer/bin/coffer-vmm"),
                uid: text.number("vmm.uid", 64_936, (1, u32::MAX - 1)),
            },
            file_server: FileServer {
                path: text.path("file_server.path", "/opt/coffer/bin/coffer-virtiofsd"),
            },
            storage: Storage {
                cache_dir: text.path("storage.cache_dir", "/var/lib/coffer"),
                scratch: Mib(text.number("storage.scratch_mib", 10_240, (64, MAX_MEMORY_MIB))),
                mkfs_erofs: text.path("storage.mkfs_erofs", "/usr/bin/mkfs.erofs"),
                mkfs_ext4: text.path("storage.mkfs_ext4", "/usr/sbin/mkfs.ext4"),
            },
            network: Network {
                metadata_service: text.choice(
                    "network.metadata_service",
                    &[
                        ("denied", MetadataService::Denied),
                        ("allowed", MetadataService::Allowed),
                    ],
                    MetadataService::Denied,
                ),
            },
            limits: Traffic::read(text),
            log: Log {
                level: text.choice(
                    "log.level",
                    &[
                        ("error", LogLevel::Error),
                        ("warn", LogLevel::Warn),
                        ("info", LogLevel::Info),
                        ("debug", LogLevel::Debug),
                    ],
                    LogLevel::Info,
                ),
            },
            annotations: Annotations {
                allow: text.annotations("annotations.allow"),
            },
            telemetry: Telemetry {
                otlp_endpoint: text.optional(
                    "telemetry.otlp_endpoint",
                    endpoint::EXPECTED,
                    Endpoint::parse,
                ),
            },
            debug: Debug {
                rootfs: text.optional_path("debug.rootfs"),
            },
        }
    }
}

impl Default for RuntimeConfig {
    /// The config of a node without a config file.
    fn default() -> Self {
        Self::read(&mut ConfigText::default())
    }
}

impl Traffic {
    fn read(text: &mut ConfigText) -> Self {
        let mut number = |key: &'static str, most: u64| text.number(key, 0, (0, most));
        Self {
            ingress_bytes: number("limits.ingress_mbit", MAX_MBIT).saturating_mul(MBIT_BYTES),
            egress_bytes: number("limits.egress_mbit", MAX_MBIT).saturating_mul(MBIT_BYTES),
            ingress_packets: number("limits.ingress_packets", MAX_OPERATIONS),
            egress_packets: number("limits.egress_packets", MAX_OPERATIONS),
            disk_bytes: number("limits.disk_mib", MAX_DISK_MIB).saturating_mul(1 << 20),
            disk_operations: number("limits.disk_operations", MAX_OPERATIONS),
            burst_ms: text.number("limits.burst_ms", 100, (10, 10_000)),
        }
    }
}

impl Guest {
    fn read(text: &mut ConfigText) -> Self {
        let memory = |text: &mut ConfigText, key, default, least| {
            Mib(text.number(key, default, (least, MAX_MEMORY_MIB)))
        };
        let vcpus = |text: &mut ConfigText, key, default| {
            VcpuCount::new(text.number(key, default, (1, 64))).unwrap_or(VcpuCount::ONE)
        };
        Self {
            kernel: text.path("guest.kernel", "/opt/coffer/share/coffer/vmlinux"),
            initramfs: text.path("guest.initramfs", "/opt/coffer/share/coffer/initramfs"),
            kernel_arguments: text.strings("guest.kernel_arguments"),
            host_namespaces: text.choice(
                "guest.host_namespaces",
                &[
                    ("refused", HostNamespaces::Refused),
                    ("guest", HostNamespaces::Guest),
                ],
                HostNamespaces::Refused,
            ),
            default_vcpus: vcpus(text, "guest.default_vcpus", 1),
            max_vcpus: vcpus(text, "guest.max_vcpus", 64),
            spare_vcpus: text.number("guest.spare_vcpus", 3, (0, 63)),
            default_memory: memory(text, "guest.default_memory_mib", 512, MIN_VM_MEMORY.0),
            overhead_memory: memory(text, "guest.overhead_memory_mib", 64, 32),
            max_memory: memory(
                text,
                "guest.max_memory_mib",
                MAX_MEMORY_MIB,
                MIN_VM_MEMORY.0,
            ),
            ready_timeout: Duration::from_secs(text.number("guest.ready_timeout_s", 30, (1, 600))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_file_gives_the_defaults() {
        let config = RuntimeConfig::parse("").unwrap();
        assert_eq!(config.guest.default_memory, Mib(512));
        assert_eq!(config.vmm.path, PathBuf::from("/opt/coffer/bin/coffer-vmm"));
        assert_eq!(config.log.level, LogLevel::Info);
        assert_eq!(
            config.debug.rootfs, None,
            "no shell unless the node says so"
        );
    }

    #[test]
    fn values_replace_defaults() {
        let text = "[guest]\ndefault_vcpus = 2\nkernel = \"/k\"\nkernel_arguments = [\"a=b\"]\n[log]\nlevel = \"debug\"\n[debug]\nrootfs = \"/d\"";
        let config = RuntimeConfig::parse(text).unwrap();
        assert_eq!(config.guest.default_vcpus.get(), 2);
        assert_eq!(config.guest.kernel, PathBuf::from("/k"));
        assert_eq!(config.guest.kernel_arguments, ["a=b"]);
        assert_eq!(config.log.level, LogLevel::Debug);
        assert_eq!(config.debug.rootfs, Some(PathBuf::from("/d")));
    }

    #[test]
    fn unknown_key_names_the_nearest_one() {
        let error = RuntimeConfig::parse("[guest]\ndefault_vcpu = 2").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the config has 1 mistake(s): unknown key guest.default_vcpu: did you mean guest.default_vcpus?"
        );
    }

    #[test]
    fn every_mistake_is_in_one_report() {
        let text =
            "zzz = 1\n[guest]\nkernel = \"relative\"\ndefault_vcpus = 0\n[log]\nlevel = \"loud\"";
        let Err(ConfigError::Mistakes(mistakes)) = RuntimeConfig::parse(text) else {
            panic!("accepted")
        };
        let texts: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "guest.kernel must be an absolute path, not \"relative\"",
                "guest.default_vcpus must be a whole number from 1 to 64, not 0",
                "log.level must be one of \"error\", \"warn\", \"info\", \"debug\", not \"loud\"",
                "unknown key zzz",
            ]
        );
    }

    #[test]
    fn every_key_is_documented_and_no_other() {
        let page = include_str!("../../../docs/config.md");
        let documented = page
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        let entries = RuntimeConfig::entries("").unwrap();
        let known: Vec<&str> = entries.iter().map(|entry| entry.key).collect();
        assert_eq!(documented.collect::<Vec<_>>(), known);
    }

    #[test]
    fn annotations_are_known_ones_only() {
        let allow = |text: &str| {
            RuntimeConfig::parse(text)
                .map(|config| config.annotations.allow.into_iter().collect::<Vec<_>>())
        };
        assert_eq!(allow("").unwrap(), [""; 0], "none unless the node says so");
        assert_eq!(
            allow("[annotations]\nallow = [\"io.coffer.vm.vcpus\"]").unwrap(),
            ["io.coffer.vm.vcpus"]
        );
        for (annotation, hint) in [
            ("io.coffer.vm.vcpu", ": did you mean io.coffer.vm.vcpus?"),
            ("io.coffer.*", ""),
        ] {
            let error = allow(&format!("[annotations]\nallow = [{annotation:?}]")).unwrap_err();
            let expected = format!(
                "the config has 1 mistake(s): annotations.allow has {annotation:?}, which is no annotation of Coffer's{hint}"
            );
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn text_that_is_no_toml_is_refused() {
        assert!(matches!(
            RuntimeConfig::parse("[guest"),
            Err(ConfigError::Toml(_))
        ));
    }
}
