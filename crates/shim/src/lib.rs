// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! containerd-shim-coffer-v2: containerd's shim v2 contract on top of a sandbox.
//!
//! ```text
//! containerd ─ start ──> start ─ spawns ─> serve ─> Server ─> TaskService, SandboxService ─> sandbox::SandboxHandle
//!            ─ ttrpc ────────────────────────┘         Publisher <─ sandbox::EventSink
//!            ─ delete ─> delete
//! ```
//!
//! This crate alone knows containerd; it keeps no state of tasks, and it names no VMM: that is for `main`.
#![deny(unsafe_code)]

mod args;
mod bootstrap;
mod delete;
mod dump;
mod error;
mod events;
mod handover;
mod history;
mod host_cgroup;
mod info;
mod inspect_service;
mod keeper;
mod log;
mod metrics;
mod network;
mod node_host;
mod node_size;
mod pod_source;
mod process;
mod publisher;
mod run;
mod sandbox_service;
mod serve;
mod shells;
mod socket;
mod start;
mod state_dir;
mod status;
mod task_service;
mod telemetry;
mod traffic;

pub use node_host::NodeHost;
pub use pod_source::{DescribedPod, PodSource};
pub use run::{Roots, run};
pub use serve::{Node, PodParts, PodRequest};
pub use status::to_status;
pub use task_service::TaskService;
