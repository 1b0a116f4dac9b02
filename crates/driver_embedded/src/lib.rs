// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs the embedded VMM as a jailed child process and implements the driver contract.
//!
//! ```text
//!   EmbeddedVm (handle) ── calls ──> control socket <──> coffer-vmm
//!     │                                 │ answers, guest connections, last words
//!     │                              reader task
//!     └─ kill (pidfd)                guardian thread: spawns the process, waits for it, reaps it
//! ```
//! The guardian is a thread and not a task because `PR_SET_PDEATHSIG`, which the VMM sets, means the thread that
//! spawned it. The VMM is not trusted: its messages are capped and parsed as hostile, and no call waits for it longer than
//! a deadline. It ends when the control socket closes, so nothing outlives this process.

mod guardian;
mod guest_memory;
mod link;
mod out_of_memory;
mod vm;
mod vsock;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use hypervisor::{Capabilities, Driver, DriverError, DriverErrorKind, RunningVm, VmSpec};
use vmm::boot::BootProtocol;
use vmm::control::{Config, DiskConfig, JailConfig, MAX_NETWORKS, NetworkConfig, Request};

use vm::EmbeddedVm;
use vsock::GuestSocket;

/// Disks a VM can have at one time: two for each of a dozen containers.
pub const DISK_SLOTS: u16 = 24;
/// The most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 64;

/// Where the driver finds what it needs, and who its VMMs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// The `coffer-vmm` program.
    pub vmm: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// A folder of this process alone, which is removed with the sandbox; a socket is in it for a moment.
    pub private_dir: PathBuf,
    /// The user and group that a VMM becomes; `None` only for tests, and then there is no jail at all.
    pub jail: Option<JailUser>,
}

/// An unprivileged user for a VMM, best one of its own for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JailUser {
    /// User id, not zero.
    pub uid: u32,
    /// Group id, not zero.
    pub gid: u32,
}

/// The driver.
#[derive(Debug)]
pub struct EmbeddedDriver {
    options: EmbeddedOptions,
}

impl EmbeddedDriver {
    /// A driver with these options; nothing is opened before a launch.
    #[must_use]
    pub fn new(options: EmbeddedOptions) -> Self {
        Self { options }
    }

    fn config(&self, spec: &VmSpec) -> Config {
        let disks = spec.disks.iter().map(disk_config).collect();
        let networks = spec.networks.iter().map(|network| NetworkConfig {
            mac: network.mac,
            mtu: network.mtu,
        });
        let networks = networks.collect();
        Config {
            vcpus: spec.vcpus.get(),
            memory_mib: spec.memory.0,
            boot: BootProtocol::Auto,
            kernel_arguments: spec.kernel_arguments.join(" "),
            cid: spec.cid.get(),
            host_ports: spec.host_ports.iter().map(|port| port.0).collect(),
            console_log: spec.console_log.is_some(),
            networks,
            disks,
            limits: spec.limits.into(),
            disk_slots: DISK_SLOTS,
            jail: self.options.jail.map(|user| JailConfig {
                uid: user.uid,
                gid: user.gid,
            }),
        }
    }
}

#[async_trait]
impl Driver for EmbeddedDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "embedded",
            max_disks: DISK_SLOTS,
            max_vcpus: MAX_VCPUS,
            max_networks: u16::try_from(MAX_NETWORKS).unwrap_or(u16::MAX),
        }
    }

    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError> {
        let kvm = File::options()
            .read(true)
            .write(true)
            .open(&self.options.kvm)
            .map_err(|source| {
                let path = self.options.kvm.display();
                let text =
                    format!("cannot open {path}: `cofferctl check` says what this node lacks");
                DriverError::new(DriverErrorKind::Node, text).because(source)
            })?;
        let (listener, socket) = GuestSocket::create(&self.options.private_dir)?;
        let vm = EmbeddedVm::spawn(&self.options.vmm, &spec, socket).await?;
        let mut descriptors = vec![
            kvm.as_fd(),
            spec.kernel.as_fd(),
            spec.initramfs.as_fd(),
            listener.as_fd(),
        ];
        descriptors.extend(spec.console_log.as_ref().map(AsFd::as_fd));
        descriptors.extend(spec.networks.iter().map(|network| network.tap.as_fd()));
        descriptors.extend(spec.disks.iter().map(|disk| disk.file.as_fd()));
        let request = Request::Start(Box::new(self.config(&spec)));
        vm.start(request, &descriptors).await?;
        Ok(Arc::new(vm))
    }
}

pub(crate) fn disk_config(disk: &hypervisor::Disk) -> DiskConfig {
    DiskConfig {
        serial: disk.serial.to_string(),
        access: match disk.access {
            hypervisor::DiskAccess::ReadOnly => vmm::control::DiskAccess::ReadOnly,
            hypervisor::DiskAccess::ReadWrite => vmm::control::DiskAccess::ReadWrite,
        },
    }
}
