// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The embedded KVM virtual machine monitor and its control messages.
//!
//! One VM is one process, `coffer-vmm`: what a hostile guest breaks is a process with no paths, no capabilities and
//! nothing but its own descriptors. Everything it needs comes as data and descriptors over the control socket
//! ([`control`]); after that it resolves no path.
//!
//! ```text
//! control thread   server ── calls ──> Machine ── pause, attach, dump ──┐
//! vcpuN threads    vcpu ── exits ──> devices::Bus ── DRIVER_OK ─────────┤
//! io, disk threads devices::IoThread <── workers, kicks ────────────────┘
//! ```
//! Layers: `layout` and `boot` (pure but for reading files) → `cpu`, `state` (what KVM is told) → `devices` (knows no
//! KVM) → `machine` (puts them together) → `server` (speaks with the shim) → `jail` (what the process may).

pub mod boot;
pub mod control;
pub mod cpu;
pub mod devices;
mod ends;
mod error;
pub mod jail;
mod kvm;
pub mod layout;
mod machine;
pub mod memory;
#[cfg(test)]
#[path = "../tests/common/pvh_kernel.rs"]
mod pvh_kernel;
mod server;
mod sharing;
mod slots;
pub mod state;
mod threads;
mod vcpu;

pub use ends::{End, Ends};
pub use error::{ExitCode, VmmError};
pub use machine::{FileSystemParts, Machine, Resources};
pub use server::serve;
pub use vcpu::{ExitCounters, SpareVcpu, Surroundings, Vcpu, VcpuThread};
