// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What shim and VMM say to each other, over one SOCK_SEQPACKET socket: JSON, descriptors beside it.
//!
//! ```text
//! shim                                   VMM
//!   Call{id, Start(config)} + fds ──────>   once, first
//!   <────────────────────────── Answer{id}
//!   Call{id, ...} ──────────────────────>   any time; answered in order
//!   <────────────────────────── Answer{id}
//!   <───────────── GuestConnection{port} + fd
//!   <──────────────────── Ended{code, text}  last, then the process exits
//! ```
//! The shim is trusted, so a message that does not parse ends the VMM. The VMM is not: the shim's side takes every
//! message as hostile (capped size, capped descriptors, unknown fields refused).

mod limits;
mod socket;

use serde::{Deserialize, Serialize};

use crate::boot::BootProtocol;

pub use limits::{LimitConfig, LimitsConfig, RateConfig};
pub use socket::{ControlSocket, Received};

/// The largest message, either way. A dump of a VM with all its devices takes a tenth.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The most descriptors with one message: four of the VM's own, its network cards and its disks.
pub const MAX_DESCRIPTORS: usize = 64;
/// The most network cards.
pub const MAX_NETWORKS: usize = 8;
/// The most bytes of the console in an answer: each may take two in JSON.
pub const MAX_CONSOLE_BYTES: usize = 24 << 10;
/// The most bytes of the console's end in last words, and in an answer to who asks for no part of it.
pub const MAX_CONSOLE_TAIL_BYTES: usize = 4096;

/// A call of the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Repeated in the answer.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// What the shim can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Build the VM, close the jail, let the guest run. Descriptors: see [`Config`].
    Start(Box<Config>),
    /// Put a disk into a free slot. One descriptor: the disk.
    AttachDisk(DiskConfig),
    /// Empty the slot of the disk with this serial.
    DetachDisk {
        /// Its serial.
        serial: String,
    },
    /// Put a file system device into a free slot; a VM has at most one. Descriptors, in this order: the vhost-user
    /// connection to the file server; a file for guest memory, as large as it and sealed against shrinking; this process's
    /// `pagemap`.
    AttachFileSystem {
        /// The name by which the guest mounts it, at most 36 bytes.
        tag: String,
    },
    /// Hold traffic to these limits from now on; what is not in them is not limited.
    SetLimits(LimitsConfig),
    /// What the guest has printed on its console, from byte number `from` on; the last of it without.
    Console {
        /// Counted from the VM's start. What is not kept any more is left out.
        from: Option<u64>,
    },
    /// All counters and states, as JSON.
    Dump,
    /// Be of another size, as far as the guest does its part. May be asked again to learn how far it has.
    Resize {
        /// Virtual CPUs that the guest may bring up.
        vcpus: u8,
        /// Guest memory.
        memory_mib: u32,
    },
    /// Stop the vCPUs and the devices.
    Pause,
    /// Let them run again.
    Resume,
}

/// What a VM is made of.
///
/// Descriptors of [`Request::Start`], in this order: KVM, kernel, initramfs, a listening unix socket for connections to
/// the guest, the console log if there is one, then the tap of each network card, then each disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u8,
    /// The most virtual CPUs that it can be resized to, 1 to 64; 0 for those that it starts with.
    #[serde(default)]
    pub max_vcpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// The most memory that it can be resized to; 0 for what it starts with.
    #[serde(default)]
    pub max_memory_mib: u32,
    /// Which entry of the kernel to take.
    #[serde(default)]
    pub boot: BootProtocol,
    /// Kernel arguments after the VMM's own.
    #[serde(default)]
    pub kernel_arguments: String,
    /// The guest's vsock address.
    pub cid: u32,
    /// Host ports that the guest may dial.
    #[serde(default)]
    pub host_ports: Vec<u32>,
    /// Whether there is a console log.
    pub console_log: bool,
    /// Disks that are there at boot.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network cards, at most [`MAX_NETWORKS`].
    #[serde(default)]
    pub networks: Vec<NetworkConfig>,
    /// What traffic is held to.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// How many disks there can be at one time.
    pub disk_slots: u16,
    /// Who the VMM is once it is in its jail; none for tests that run without root.
    pub jail: Option<JailConfig>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// The address by which the guest finds it.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet.
    pub mtu: u16,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The name by which the guest finds it, at most 20 bytes.
    pub serial: String,
    /// Whether the guest may not write.
    pub access: DiskAccess,
}

/// Whether the guest may write to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAccess {
    /// It may not.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// The user that the VMM becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User id, not zero.
    pub uid: u32,
    /// Group id, not zero.
    pub gid: u32,
}

/// A message of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The answer to a call.
    Answer {
        /// The call's.
        id: u64,
        /// What came of it.
        result: Result<Answer, Refusal>,
    },
    /// The guest has connected to a host port. One descriptor: the stream.
    GuestConnection {
        /// Which port.
        port: u32,
    },
    /// The VM has ended; the process exits with this code.
    Ended {
        /// See [`crate::ExitCode`].
        code: u8,
        /// One line for people.
        text: String,
        /// The end of the console's output.
        console: String,
    },
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// It was done.
    Done,
    /// The disk or file system is there, under this platform device of the guest.
    Attached {
        /// Its name.
        device: String,
    },
    /// Text: the dump.
    Text(String),
    /// How large the VM is now.
    Size(Size),
    /// A part of the console's output.
    Console {
        /// The number of its first byte.
        from: u64,
        /// The number of the byte after its last.
        next: u64,
        /// Printable characters, tabs and ends of lines.
        text: String,
    },
}

/// How large a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Virtual CPUs that the guest can bring up.
    pub vcpus: u8,
    /// Memory that the guest has, by its own account.
    pub memory_mib: u32,
    /// The guest's platform device for memory that is plugged, once there is one.
    pub device: Option<String>,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// What the caller decides by.
    pub kind: RefusalKind,
    /// What was wrong and what to do, for people.
    pub text: String,
}

/// What a caller decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// Bad configuration.
    Config,
    /// Kernel or initramfs.
    Artifact,
    /// KVM.
    Kvm,
    /// All slots are in use.
    Exhausted,
    /// The serial is in use.
    Conflict,
    /// Anything else.
    Failed,
}

impl From<&crate::VmmError> for Refusal {
    fn from(error: &crate::VmmError) -> Self {
        use crate::VmmError as E;
        let kind = match error {
            E::Control { .. } | E::Config { .. } | E::State { .. } => RefusalKind::Config,
            E::NotAKernel { .. } | E::Artifact { .. } | E::TooLarge { .. } => RefusalKind::Artifact,
            E::Kvm { .. } => RefusalKind::Kvm,
            E::NoSlot { .. } => RefusalKind::Exhausted,
            E::SerialInUse { .. } | E::FileSystemInUse { .. } => RefusalKind::Conflict,
            E::Host { .. }
            | E::Device { .. }
            | E::Jail { .. }
            | E::DiskBusy { .. }
            | E::FileServer { .. }
            | E::Vcpu { .. } => RefusalKind::Failed,
        };
        Self {
            kind,
            text: error.chain(),
        }
    }
}

/// Reads a call.
///
/// # Errors
/// It is not one; the parser's words.
pub fn parse_call(bytes: &[u8]) -> Result<Call, serde_json::Error> {
    serde_json::from_slice(bytes)
}

/// Reads a message of the VMM, which may be hostile.
///
/// # Errors
/// It is not one; the parser's words.
pub fn parse_message(bytes: &[u8]) -> Result<Message, serde_json::Error> {
    serde_json::from_slice(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_refused_both_ways() {
        assert!(parse_call(br#"{"id":1,"request":"dump","more":1}"#).is_err());
        assert!(parse_call(br#"{"id":1,"request":{"detach_disk":{"serial":"a","x":1}}}"#).is_err());
        assert!(parse_message(br#"{"guest_connection":{"port":1,"x":2}}"#).is_err());
        assert!(parse_call(br#"{"id":1,"request":"dump"}"#).is_ok());
    }

    #[test]
    fn messages_survive_the_trip() {
        let message = Message::Answer {
            id: 7,
            result: Err(Refusal {
                kind: RefusalKind::Exhausted,
                text: "all 24 disk slots are in use".to_owned(),
            }),
        };
        let bytes = serde_json::to_vec(&message).unwrap();
        assert_eq!(parse_message(&bytes).unwrap(), message);
    }
}
