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
//! * What a guest sends is filtered between tap and interface, see [`filter`]: a guest cannot spoof.
//! * Work in the namespace is done on a thread of its own, which has entered it and ends with the work.
//! * [`PodNetwork`] undoes on drop; [`detach`] undoes what a process that was killed has left. Both are idempotent. A tap
//!   goes with its last descriptor in any case.

mod apply;
mod error;
mod filter;
mod interface;
mod namespace;
mod read;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub use error::NetError;
pub use interface::{Address, Interface, Neighbour, Route};

/// The most interfaces of a pod.
pub const MAX_INTERFACES: usize = 8;
/// The most addresses, routes and neighbours of an interface, each.
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

/// The network of a pod whose interfaces are joined to taps; undone on drop.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: PathBuf,
}

impl PodNetwork {
    /// Joins every interface of the namespace at `namespace` that is up, but for loopback, to a tap.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind.
    pub fn attach(namespace: &Path, metadata: Metadata) -> Result<(Self, Vec<TapPlan>), NetError> {
        let network = Self {
            namespace: namespace.to_path_buf(),
        };
        // From here on, a failure drops `network`, which undoes.
        let taps = namespace::run_in(namespace, move || {
            let interfaces = read::interfaces()?;
            apply::join_all(interfaces, metadata)
        })?;
        Ok((network, taps))
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        // Who deletes the sandbox tries again, and says what is wrong.
        let _ = detach(&self.namespace);
    }
}

/// Takes from the namespace whatever [`PodNetwork::attach`] has put there; what or which is not there is no error.
///
/// # Errors
/// [`NetError`].
pub fn detach(namespace: &Path) -> Result<(), NetError> {
    if !namespace.exists() {
        return Ok(());
    }
    namespace::run_in(namespace, apply::undo)
}
