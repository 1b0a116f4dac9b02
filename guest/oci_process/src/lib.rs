// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Turns an OCI spec into a container's init, or into a further process, in a child process of its own.
//!
//! The agent calls [`launch_init`] and [`launch_exec`]; they start the agent's own program afresh as a helper
//! ([`helper_main`]), which clones the process into its namespaces and its cgroup and ends. The process is then a child of
//! the agent. It makes its mounts, takes on its user, capabilities and seccomp filter, and waits to be started.
//!
//! Invariants: everything in a spec is enforced or refused ([`check_spec`]); no step trusts a path of the image
//! (`rootfs`); an error of any step reaches the agent as text, and a process that fails ends.

mod capabilities;
mod channel;
mod check;
mod child;
mod error;
mod hooks;
mod launch;
mod pause;
mod process;
mod rootfs;
mod seccomp;
mod sys;
mod terminal;

pub use check::{MAX_MOUNTS, MAX_STRINGS, MAX_STRINGS_LEN, check_process, check_spec};
pub use child::{helper_main, shared_pid_namespace, write_sysctl};
pub use error::Error;
pub use launch::{Job, Launched, Ready, Streams, launch_exec, launch_init};
pub use pause::pause_main;
pub use sys::loopback_up;

/// The only argument of a program that is to be [`pause_main`], its own name.
pub const PAUSE: &str = "/pause";
