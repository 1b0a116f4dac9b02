// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the end-to-end tests stand on: commands with deadlines, containers that are removed, and the audit of the node
//! that runs after every test.
//!
//! The tests run in a node (`cargo xtask test`): as root, with containerd, Coffer's programs and the test images, one
//! test at a time, for the audit compares the whole node before and after.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a harness fails by panicking"
)]

mod audit;
mod command;
mod container;
mod kill;
mod node;
mod processes;
mod scale;
mod watchdog;

pub use audit::Audit;
pub use command::{DEADLINE, Output, eventually, run, run_with_input, spawn};
pub use container::{Container, metrics};
pub use kill::{ContainerdDown, kill_9};
pub use node::{ConfigChange, Node};
pub use processes::{children_named, named, parent_of, process_exists, running};
pub use scale::{Random, count};

/// The runtime that `ctr` is told to use.
pub const RUNTIME: &str = "io.containerd.coffer.v2";

/// An image with busybox and nothing else.
pub const BUSYBOX: &str = "coffer.test/busybox:latest";
