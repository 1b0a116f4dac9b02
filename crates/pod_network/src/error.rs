// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a pod's network could not be set up.

use std::io;
use std::path::PathBuf;

/// A failure of a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The network namespace cannot be entered.
    #[error("enter the network namespace {}", path.display())]
    Namespace {
        /// Where it should be.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The namespace is the node's own.
    #[error(
        "{} is the node's own network: a pod in a VM cannot have it, remove hostNetwork",
        .0.display()
    )]
    NodeNamespace(PathBuf),
    /// The kernel refused a step.
    #[error(
        "{operation} {interface} in the pod's network namespace{}",
        hint(source)
    )]
    Step {
        /// What was tried.
        operation: &'static str,
        /// With which interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace has something that a pod in a VM cannot have yet.
    #[error(
        "{interface} has {what}, which pods in a VM do not support: have the CNI plugin leave it out"
    )]
    Unsupported {
        /// The interface.
        interface: String,
        /// What it is.
        what: String,
    },
    /// The namespace has more of something than is allowed.
    #[error("the pod's network namespace has {count} {what}, at most {most} are possible")]
    TooMany {
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
}

/// What to do about errors whose words do not say it.
fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP) => {
            " (the node's kernel needs tun, sch_ingress, cls_u32, cls_bpf and act_mirred)"
        }
        Some(libc::EEXIST) => " (something else has put a qdisc there)",
        Some(libc::EBUSY) => " (another pod's VM is joined to it)",
        _ => "",
    }
}

impl NetError {
    pub(crate) fn step(
        operation: &'static str,
        interface: &str,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let interface = interface.to_owned();
        move |source| Self::Step {
            operation,
            interface,
            source,
        }
    }
}
