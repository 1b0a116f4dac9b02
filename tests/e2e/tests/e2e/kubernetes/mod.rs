// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What Kubernetes promises of a pod, a case for each promise, over CRI as a kubelet speaks it.
//!
//! A pod takes seconds to boot in an emulated machine, so the cases of a file share one ([`shared::Shared`]): each looks at
//! it, or runs containers of its own in it. What needs a pod of another kind makes one in its case.
//!
//! `COFFER_E2E_HANDLER=runc` runs the pods under another of containerd's runtime handlers: what fails there too, Kubernetes
//! does not promise. (What runc cannot pass: cases of the VM itself, and those of cgroup v2 on a node with v1.)

mod client;
mod environment;
mod events;
mod exec;
mod exec_stream;
mod idempotence;
mod image_archive;
mod images;
mod init_containers;
mod lifecycle;
mod logs;
mod networking;
mod pods;
mod resources;
mod restarts;
mod security;
mod shared;
mod stats;
mod streaming;
mod volumes;
