// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! End-to-end tests: containerd, the shim, a VM, the guest agent, and a container's process in it. Each test ends with
//! an audit of the node. Run by `cargo xtask test`.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod bad_input;
mod cofferctl;
mod cri;
mod cri_client;
mod faults;
mod host_folders;
mod isolation;
mod lifecycle;
mod network;
mod observability;
mod resources;
mod software;
mod streams;
mod terminal;
mod volumes;
