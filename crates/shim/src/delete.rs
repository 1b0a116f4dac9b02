// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `delete`: removes what a container has left on the host. containerd gives it 5 s.
//!
//! It runs after every normal removal too, and for members of a pod whose VM lives on: it acts on what belongs to its own
//! id. Only a sandbox has a state directory, and only with one are a shim and a VMM ended. May be repeated, and may find
//! anything half done.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use ids::{Namespace, SandboxId};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use sandbox::Exit;

use crate::args::ShimArgs;
use crate::error::ShimError;
use crate::host_cgroup;
use crate::process::ProcessIdentity;
use crate::run::{Roots, bundle};
use crate::socket::remove_socket;
use crate::state_dir::{Leftovers, StateDir};

/// How long a shim may take to end its VM and to report the exits. What is left of containerd's 5 s is for the rest.
const TERM_LIMIT: Duration = Duration::from_secs(2);

/// How long a killed process may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// The most file systems that are unmounted from one rootfs, one over the other.
const MAX_MOUNTS: usize = 64;

/// Removes what is left of the container `args.id`, and answers containerd's `DeleteResponse`.
pub(crate) fn delete(args: &ShimArgs, roots: &Roots) -> Result<Vec<u8>, ShimError> {
    let state = StateDir::of(&roots.state, &args.namespace, &SandboxId::from(&args.id));
    let left = state
        .take()
        .map_err(ShimError::file("take away", state.path()))?;
    let pid = left
        .as_ref()
        .and_then(|left| left.shim)
        .map_or(0, |shim| shim.pid);
    let removed = left.as_ref().map_or(Ok(()), remove_sandbox);
    unmount_all(&bundle(args)?.join("rootfs"))?;
    removed?;
    let mut response = DeleteResponse::new();
    response.pid = u32::try_from(pid).unwrap_or_default();
    response.exit_status = Exit::KILLED;
    response.exited_at = MessageField::some(Timestamp::from(SystemTime::now()));
    response
        .write_to_bytes()
        .map_err(|error| ShimError::Output(error.into()))
}

/// Removes what `start` and its shim have left that were killed before containerd knew them: no `delete` comes for those.
///
/// Best effort: what it cannot remove is left for [`sweep`].
pub(crate) fn abandon(state: &StateDir, start: ProcessIdentity) {
    if let Ok(Some(left)) = state.take_of(start) {
        let _left_for_sweep = remove_sandbox(&left);
    }
}

/// Removes what is left in `namespace` by those who were to remove it and were killed too.
///
/// Best effort: it is done on the way of another sandbox's `start`, and done again by the next one.
pub(crate) fn sweep(roots: &Roots, namespace: &Namespace) {
    for left in StateDir::take_abandoned(&roots.state, namespace).unwrap_or_default() {
        let _left_for_the_next = remove_sandbox(&left);
    }
}

/// Does all that can be done, and then says what could not.
pub(crate) fn remove_sandbox(left: &Leftovers) -> Result<(), ShimError> {
    let shim = end(left.shim, Some(TERM_LIMIT));
    let vmm = end(left.vmm, None);
    let cgroups = host_cgroup::remove(&left.cgroups);
    let socket = left
        .socket
        .as_deref()
        .map(|path| remove_socket(path).map_err(ShimError::file("remove", path)));
    // What a VM that is gone has left in the pod's network namespace.
    let network = left.network.as_deref().map_or(Ok(()), pod_network::sweep);
    shim.and(vmm)
        .map_err(ShimError::file("end the processes of", left.path()))?;
    cgroups?;
    socket.transpose()?;
    left.remove()
        .map_err(ShimError::file("remove", left.path()))?;
    network.map_err(ShimError::Network)
}

/// Ends a process, which may take `grace` to do so by itself.
fn end(process: Option<ProcessIdentity>, grace: Option<Duration>) -> std::io::Result<()> {
    let Some(process) = process.map(ProcessIdentity::open).transpose()?.flatten() else {
        return Ok(());
    };
    if let Some(grace) = grace {
        process.signal(Signal::TERM)?;
        if process.wait(grace)? {
            return Ok(());
        }
    }
    process.signal(Signal::KILL)?;
    if process.wait(KILL_LIMIT)? {
        Ok(())
    } else {
        Err(std::io::ErrorKind::TimedOut.into())
    }
}

fn unmount_all(rootfs: &Path) -> Result<(), ShimError> {
    for _ in 0..MAX_MOUNTS {
        match unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(ShimError::file("unmount", rootfs)(error.into())),
        }
    }
    Ok(())
}
