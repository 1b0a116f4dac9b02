// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a VM is made of, and how it ends.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use ids::{DiskSerial, GuestCid, Limits, Mib, SandboxId, VcpuCount, VsockPort};

/// What a driver needs to start a VM.
#[derive(Debug)]
pub struct VmSpec {
    /// Names the VM in logs and in its process title.
    pub sandbox: SandboxId,
    /// Virtual CPUs, all online at boot.
    pub vcpus: VcpuCount,
    /// The most that the VM can be resized to; each beyond `vcpus` costs the guest a little memory from the start.
    pub max_vcpus: VcpuCount,
    /// Guest memory.
    pub memory: Mib,
    /// The most that the VM can be resized to.
    pub max_memory: Mib,
    /// The guest kernel: an uncompressed ELF with a PVH entry note.
    pub kernel: File,
    /// The initramfs with the agent: an uncompressed cpio archive.
    pub initramfs: File,
    /// Kernel arguments after the driver's own, for debugging; from the node's config only, never from a pod.
    pub kernel_arguments: Vec<String>,
    /// Network cards.
    pub networks: Vec<NetworkInterface>,
    /// Disks that are there at boot.
    pub disks: Vec<Disk>,
    /// What the VM's traffic is held to.
    pub limits: Limits,
    /// The guest's vsock address.
    pub cid: GuestCid,
    /// The host ports that the guest may dial; every other one is reset.
    pub host_ports: Vec<VsockPort>,
    /// Where the guest's console goes besides memory. The driver stops writing at its cap.
    pub console_log: Option<File>,
}

/// A network card.
#[derive(Debug)]
pub struct NetworkInterface {
    /// A tap, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-blocking; its interface goes when it is closed.
    pub tap: OwnedFd,
    /// The address by which the guest finds the card.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet.
    pub mtu: u16,
}

/// A disk to attach.
#[derive(Debug)]
pub struct Disk {
    /// The name by which the guest finds it.
    pub serial: DiskSerial,
    /// An image file or a block device, opened as [`Disk::access`] demands.
    pub file: File,
    /// Whether the guest may write.
    pub access: DiskAccess,
}

/// Whether a guest may write to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    /// Many VMs may share the file.
    ReadOnly,
    /// The file is this VM's alone; blocks that the guest discards are given back to the host.
    ReadWrite,
}

/// A part of what a guest has printed on its console. The guest has written it: it is not to be believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console {
    /// The number of its first byte, counted from the VM's start.
    pub from: u64,
    /// The number of the byte after its last.
    pub next: u64,
    /// Printable characters, tabs and ends of lines.
    pub text: String,
}

/// A disk that was attached while the VM ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedDisk {
    /// The name by which the guest finds it.
    pub serial: DiskSerial,
    /// The platform device that the guest must bind first ("virtio-mmio.9"), where the guest does not learn of a new
    /// disk by itself.
    pub bind_device: Option<String>,
}

/// A file system that another process serves.
#[derive(Debug)]
pub struct FileSystem {
    /// The name by which the guest mounts it, 1 to 36 bytes (virtio v1.3 §5.11.4).
    pub tag: String,
    /// A vhost-user connection to the file server, which nobody has spoken on. The server gets the guest's memory.
    pub connection: UnixStream,
}

/// A file system that was attached while the VM ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedFileSystem {
    /// The platform device that the guest must bind first, as in [`AttachedDisk::bind_device`].
    pub bind_device: Option<String>,
}

/// What VMs of a driver can do beyond the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The driver's name, as in the config file.
    pub name: &'static str,
    /// How many disks a VM can have at one time.
    pub max_disks: u16,
    /// The most vCPUs of a VM.
    pub max_vcpus: u8,
    /// The most network cards of a VM.
    pub max_networks: u16,
}

/// The host processes of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmProcesses {
    /// The VMM's process id.
    pub vmm: u32,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The guest asked for power-off or reset. An agent that ends the sandbox does this, and so does a kernel panic:
    /// the console tells.
    Guest,
    /// [`RunningVm::kill`](crate::RunningVm::kill) ended it.
    Killed,
    /// The host's OOM killer ended the VMM: the pod's cgroup had no room for the VM.
    OutOfMemory,
    /// Another signal ended the VMM; a seccomp violation is `SIGSYS`.
    Signal(i32),
    /// The VMM gave up, with this exit code and last words.
    Failed {
        /// The VMM's exit code.
        code: i32,
        /// What it said.
        message: String,
    },
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest => f.write_str("the guest shut down"),
            Self::Killed => f.write_str("the VM was stopped"),
            Self::OutOfMemory => f.write_str(
                "the node's OOM killer ended the VMM: the memory limit of the pod's cgroup has no room for its VM, raise the \
                 runtime class's overhead or the pod's limits",
            ),
            Self::Signal(signal) => write!(f, "the VMM was ended by signal {signal}"),
            Self::Failed { code, message } => {
                write!(f, "the VMM failed with exit code {code}: {message}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_read_as_sentences() {
        assert_eq!(
            VmExit::Signal(9).to_string(),
            "the VMM was ended by signal 9"
        );
        let memory = VmExit::OutOfMemory.to_string();
        assert!(memory.contains("the pod's cgroup has no room"), "{memory}");
        let failed = VmExit::Failed {
            code: 3,
            message: "open /dev/kvm: no such file".to_owned(),
        };
        assert_eq!(
            failed.to_string(),
            "the VMM failed with exit code 3: open /dev/kvm: no such file"
        );
    }
}
