// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! End-to-end tests: containerd, the shim, a VM, the guest agent, and a container's process in it. Each test ends with
//! an audit of the node. Run by `cargo xtask test`.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod bad_input;
mod block_volumes;
mod churn;
mod cofferctl;
mod complaints;
mod cri;
mod cri_client;
mod empty_dirs;
mod faults;
mod host_folders;
mod isolation;
mod kubernetes;
mod lifecycle;
mod limits;
mod mount_propagation;
mod network;
mod observability;
mod pod_security;
mod resize;
mod resources;
mod sandbox_api;
mod shared_files;
mod software;
mod streaming;
mod streams;
mod terminal;
mod truth;
mod volumes;
mod web_socket;
mod workloads;
