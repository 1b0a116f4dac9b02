// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What can go wrong in the VMM, and which exit code it becomes.

use std::io;

use virtio_device::DeviceError;

/// An error of the VMM. Display says what was tried and what to do; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The control socket failed or brought something that is no message.
    #[error("control message {reason}: the shim and the VMM must be of one version")]
    Control {
        /// What is wrong with it.
        reason: &'static str,
        /// What the socket or the parser said.
        source: Option<io::Error>,
    },
    /// A configuration that no VM can have.
    #[error("VM configuration: {reason}")]
    Config {
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// The kernel cannot be booted.
    #[error(
        "the guest kernel cannot be booted: {reason}; install the kernel that belongs to this release"
    )]
    NotAKernel {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Kernel or initramfs cannot be loaded.
    #[error("cannot {operation}: check that the file is whole and readable")]
    Artifact {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Kernel, initramfs and command line do not fit into guest memory.
    #[error("{what} does not fit into guest memory: give the VM more than {memory_mib} MiB")]
    TooLarge {
        /// Which of them.
        what: &'static str,
        /// What the VM has.
        memory_mib: u64,
    },
    /// KVM refused.
    #[error("KVM: cannot {operation}: see the cause, and check this node's KVM")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// The host refused a resource.
    #[error("cannot {operation}: see the cause, then the limits of the pod's cgroup")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A device could not be made or saved.
    #[error("virtio device {name} failed")]
    Device {
        /// Which one.
        name: &'static str,
        /// What it said.
        source: DeviceError,
    },
    /// A step of the jail failed; the guest has not run.
    #[error("jail: cannot {step}: the VMM does not run outside its jail")]
    Jail {
        /// Which step.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// All disk slots are taken.
    #[error("all {slots} disk slots are in use: detach a disk first, or raise the number of slots")]
    NoSlot {
        /// How many there are.
        slots: u16,
    },
    /// A disk of that serial is attached.
    #[error("a disk with serial {serial} is attached already")]
    SerialInUse {
        /// Its serial.
        serial: String,
    },
    /// The guest still drives a disk.
    #[error("the guest still uses the disk with serial {serial}: it must unbind the driver first")]
    DiskBusy {
        /// Its serial.
        serial: String,
    },
    /// The VM has a file system device.
    #[error(
        "a file system with tag {tag} is attached already: a VM has one, with all directories in it"
    )]
    FileSystemInUse {
        /// Its tag.
        tag: String,
    },
    /// The file server is gone or misbehaves. A guest does not recover from that.
    #[error("the pod's shared directories are lost: {reason}")]
    FileServer {
        /// What happened, with its cause.
        reason: String,
    },
    /// A vCPU cannot go on.
    #[error("vCPU {vcpu} stopped: {reason}")]
    Vcpu {
        /// Which one.
        vcpu: u8,
        /// Why, with registers.
        reason: String,
    },
    /// A saved state does not fit this VM.
    #[error("saved state cannot be restored: {reason}; boot the pod afresh")]
    State {
        /// Why not.
        reason: &'static str,
    },
}

/// How the VMM process ends; the table is in [`ExitCode::meaning`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest shut down or reset itself.
    Guest = 0,
    /// Standard input is no control socket.
    Usage = 2,
    /// The control socket brought nonsense, or a configuration no VM can have.
    Config = 3,
    /// Kernel or initramfs cannot be loaded.
    Artifact = 4,
    /// KVM refused.
    Kvm = 5,
    /// The host refused a resource.
    Host = 6,
    /// The jail is not tight.
    Jail = 7,
    /// A vCPU cannot go on.
    Vcpu = 8,
    /// The shim closed the control socket.
    Orphaned = 9,
    /// The file server is gone or misbehaves.
    FileServer = 10,
}

impl ExitCode {
    /// Every code, for documentation and tests.
    pub const ALL: [Self; 10] = [
        Self::Guest,
        Self::Usage,
        Self::Config,
        Self::Artifact,
        Self::Kvm,
        Self::Host,
        Self::Jail,
        Self::Vcpu,
        Self::Orphaned,
        Self::FileServer,
    ];

    /// One line for people.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Guest => "the guest shut down",
            Self::Usage => "the VMM was not started by a shim",
            Self::Config => "bad configuration or control message",
            Self::Artifact => "kernel or initramfs cannot be loaded",
            Self::Kvm => "KVM refused",
            Self::Host => "the host refused a resource",
            Self::Jail => "the jail could not be closed",
            Self::Vcpu => "a vCPU could not go on",
            Self::Orphaned => "the shim is gone",
            Self::FileServer => "the file server is gone",
        }
    }
}

impl VmmError {
    /// The exit code of a VMM that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Control { .. } | Self::Config { .. } | Self::State { .. } => ExitCode::Config,
            Self::NotAKernel { .. } | Self::Artifact { .. } | Self::TooLarge { .. } => {
                ExitCode::Artifact
            }
            Self::Kvm { .. } => ExitCode::Kvm,
            Self::Host { .. }
            | Self::Device { .. }
            | Self::NoSlot { .. }
            | Self::SerialInUse { .. }
            | Self::DiskBusy { .. }
            | Self::FileSystemInUse { .. } => ExitCode::Host,
            Self::FileServer { .. } => ExitCode::FileServer,
            Self::Jail { .. } => ExitCode::Jail,
            Self::Vcpu { .. } => ExitCode::Vcpu,
        }
    }

    /// The message with all its causes, for a reader in another process.
    #[must_use]
    pub fn chain(&self) -> String {
        chain_of(self)
    }

    pub(crate) fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation, source }
    }

    pub(crate) fn host<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host {
            operation,
            source: source.into(),
        }
    }
}

/// An error's message with all its causes.
pub(crate) fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_has_each_cause_once() {
        let error = VmmError::Artifact {
            operation: "read the kernel",
            source: io::Error::from(io::ErrorKind::UnexpectedEof),
        };
        assert_eq!(
            error.chain(),
            "cannot read the kernel: check that the file is whole and readable: unexpected end of file"
        );
        assert_eq!(error.exit_code(), ExitCode::Artifact);
    }

    #[test]
    fn exit_codes_are_distinct_and_explained() {
        let mut codes: Vec<u8> = ExitCode::ALL.iter().map(|code| *code as u8).collect();
        codes.dedup();
        assert_eq!(codes.len(), ExitCode::ALL.len());
        assert!(ExitCode::ALL.iter().all(|code| !code.meaning().is_empty()));
    }
}
