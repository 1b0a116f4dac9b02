// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The bodies of all fuzz targets: each takes bytes and panics if an invariant breaks.
//!
//! The same bodies run under libFuzzer (`cargo +nightly fuzz run <name>`) and, on seeds and on
//! seeded random input, as a plain test (`cargo test -p fuzz_smoke`). A target is a function of its
//! bytes alone: no clock, no randomness, nothing left over from the run before.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a panic is how a target says that it has found something"
)]

mod agent;
mod guest;
mod input;
mod machine;
mod mem;
mod net;
mod virtio;
mod vsock;

pub use guest::Guest;
pub use input::Input;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of its libFuzzer binary and of its folder of seeds.
    pub name: &'static str,
    /// What it does with bytes.
    pub run: fn(&[u8]),
}

/// Every target; `fuzz_smoke` runs them all, and checks that each has its libFuzzer binary.
pub const TARGETS: &[Target] = &[
    Target {
        name: "agent_messages",
        run: agent::messages,
    },
    Target {
        name: "balloon",
        run: virtio::balloon,
    },
    Target {
        name: "block",
        run: virtio::block,
    },
    Target {
        name: "block_read_only",
        run: virtio::block_read_only,
    },
    Target {
        name: "console",
        run: virtio::console,
    },
    Target {
        name: "control_message",
        run: machine::control_message,
    },
    Target {
        name: "device_state",
        run: virtio::device_state,
    },
    Target {
        name: "kernel",
        run: machine::kernel,
    },
    Target {
        name: "mem",
        run: mem::mem,
    },
    Target {
        name: "mmio_registers",
        run: machine::registers,
    },
    Target {
        name: "net",
        run: net::net,
    },
    Target {
        name: "queue",
        run: virtio::queue,
    },
    Target {
        name: "rng",
        run: virtio::rng,
    },
    Target {
        name: "virtio_wire",
        run: virtio::wire,
    },
    Target {
        name: "vsock",
        run: virtio::vsock,
    },
    Target {
        name: "vsock_connection",
        run: vsock::connection,
    },
    Target {
        name: "vsock_packet",
        run: vsock::packet,
    },
];

/// Runs the target of this name; for the libFuzzer binaries.
///
/// # Panics
/// There is no such target, or it has found something.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target of this name in TARGETS");
    (target.run)(data);
}
