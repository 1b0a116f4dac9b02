// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Sandboxes over the fake driver: what containerd asks, what goes wrong, and what is left afterwards.

mod boots;
mod changes;
mod empty_dirs;
mod host_folders;
mod live;
mod lives;
mod phases;
mod pod;
mod sizes;
mod soak;
mod streams;
mod waits;
mod write_back;
