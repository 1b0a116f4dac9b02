// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Virtio devices on their way to the guest: register windows, interrupts, and the thread that does the work.
//!
//! ```text
//!   vCPU thread ── register access ──> Bus ──> Window (lock) ──> Transport ──> VirtioDevice
//!                                                                  │ DRIVER_OK: workers
//!   guest kick ── ioeventfd ──────────> IoThread <─────────────────┘
//!                                        └── Signals ── irqfd ──> guest
//! ```

mod bus;
mod io_thread;
#[cfg(test)]
mod io_thread_tests;
mod signals;
#[cfg(test)]
mod tests;
mod transport;

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

pub use bus::{Bus, Place};
pub use io_thread::IoThread;
pub use signals::Signals;
pub use transport::{Doorbells, Transport, TransportParts, TransportState, WorkerHost, registers};

/// Guest memory as devices hold it.
pub type Memory = Arc<GuestMemoryMmap>;
