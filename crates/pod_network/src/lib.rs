// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From the CNI's network namespace to taps for the VMM and interfaces for the guest.
//!
//! ```text
//!   pod's network namespace                                   guest
//!   eth0 (the CNI's) ── ingress: redirect ──> coffer2 (tap) ──> virtio-net, named eth0:
//!        <── redirect, if the filter passes ── ingress                same MAC, addresses, routes, MTU
//! ```
//!
//! * The CNI's interface stays where its policies are enforced; its addresses stay on it, and no frame reaches the
//!   namespace's own network stack any more.
//! * What a guest sends is filtered between tap and interface, see `filter.rs`: a guest cannot spoof.
//! * Routes, rules and neighbours go along, so that the guest's packets take the way that the CNI has laid out. What cannot
//!   be carried over is refused by name.
//! * Work in the namespace is done on a thread of its own, which has entered it and ends with the work.
//! * [`PodNetwork`] undoes on drop. A tap goes with its last descriptor in any case, and [`sweep`] takes away what a process
//!   that was killed has left besides; so does the next [`PodNetwork::attach`].

mod apply;
mod counters;
mod error;
mod filter;
mod interface;
mod loopback;
mod namespace;
mod netlink;
mod read;
mod read_rules;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub use counters::{Counters, counters};
pub use error::NetError;
pub use interface::{Address, Interface, Neighbour, Route, Rule};
pub use loopback::{LoopbackGuard, LoopbackListener};

/// The most interfaces of a pod.
pub const MAX_INTERFACES: usize = 8;
/// The most addresses, routes and neighbours of an interface, and routing rules, each.
pub const MAX_ENTRIES: usize = 64;

/// Whether a pod may speak to the metadata service of a cloud, which gives out the node's credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// It may not.
    Denied,
    /// It may.
    Allowed,
}

/// A tap and what is behind it.
#[derive(Debug)]
pub struct TapPlan {
    /// The tap, non-blocking, with `IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The interface for the guest.
    pub interface: Interface,
}

/// A pod's network for its VM.
#[derive(Debug)]
pub struct NetworkPlan {
    /// One for each interface, in the order of their indexes.
    pub taps: Vec<TapPlan>,
    /// Routing rules.
    pub rules: Vec<Rule>,
}

/// The network of a pod whose interfaces are joined to taps; undone on drop.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: PathBuf,
    interfaces: Vec<u32>,
}

impl PodNetwork {
    /// Joins every interface of the namespace at `namespace` that is up, but for loopback, to a tap.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind. A namespace that another pod's VM is joined to is refused.
    pub fn attach(namespace: &Path, metadata: Metadata) -> Result<(Self, NetworkPlan), NetError> {
        let plan = namespace::run_in(namespace, move || {
            let read::Found { interfaces, rules } = read::all()?;
            let taps = apply::join_all(interfaces, metadata)?;
            Ok(NetworkPlan { taps, rules })
        })?;
        let network = Self {
            namespace: namespace.to_path_buf(),
            interfaces: plan.taps.iter().map(|tap| tap.interface.index).collect(),
        };
        Ok((network, plan))
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        let interfaces = std::mem::take(&mut self.interfaces);
        if !interfaces.is_empty() && self.namespace.exists() {
            // The namespace may just have gone, and what was in it. If not, `sweep` tries again, and says what is wrong.
            let _ = namespace::run_in(&self.namespace, move || apply::undo(&interfaces));
        }
    }
}

/// Takes from the namespace what is left of a network whose VM has gone; what or which is not there is no error.
///
/// # Errors
/// [`NetError`].
pub fn sweep(namespace: &Path) -> Result<(), NetError> {
    match namespace::run_in(namespace, apply::sweep_all) {
        // Not there, or the file that it was mounted on.
        Err(NetError::Namespace { source, .. })
            if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
        {
            Ok(())
        }
        // Nothing is ever joined to it.
        Err(NetError::NodeNamespace(_)) => Ok(()),
        done => done,
    }
}
