// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Starts the jailed file server of a pod, and puts directories into it.
//!
//! ```text
//!   FileServer::spawn ──> guardian thread ──> coffer-virtiofsd     PID 1 of its own namespaces, an empty root
//!        │                                        │ ready: the vhost-user connection, for the VMM
//!        ├─ add(Share): open_tree, read-only or not, slave or private ── move_mount into the server's namespace
//!        ├─ remove(name)
//!        └─ wait / kill / drop
//! ```
//! One process serves all directories of a pod, each as a folder of one root, so that a pod has one device and one
//! process whatever its volumes are. The server never holds CAP_SYS_ADMIN: mounts are made by a short-lived thread of
//! this process that enters the server's mount namespace through its pidfd. So directories can come while the server
//! runs, as containers are created.
//!
//! The server is not trusted once a guest has spoken to it. What that thread does in its namespace depends on nothing the
//! server could have changed: it cannot mount, and its root is read-only to it.
//!
//! Linux 5.12 or later (`mount_setattr`).

mod error;
mod mounts;
mod server;
mod share;

pub use error::FileServerError;
pub use server::{FileServer, ServerExit};
pub use share::{Access, MAX_SHARES, Propagation, Share, ShareName};
