// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Work in another network namespace.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use crate::NetError;

/// Where the calling process's own namespace is.
const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `work` on a thread that is in the namespace at `path`, and waits for it. No other thread changes its namespace. The
/// caller's own namespace, which is the node's, is refused: whoever names it means hostNetwork.
pub(crate) fn run_in<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    let failed = |source| NetError::Namespace {
        path: path.to_path_buf(),
        source,
    };
    let namespace = File::open(path).map_err(failed)?;
    let identity = |found: &Metadata| (found.dev(), found.ino());
    let own = fs::metadata(OWN).map_err(failed)?;
    if identity(&namespace.metadata().map_err(failed)?) == identity(&own) {
        return Err(NetError::NodeNamespace(path.to_path_buf()));
    }
    let thread = std::thread::Builder::new()
        .name("pod-network".to_owned())
        .spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
            drop(namespace);
            Ok(work())
        })
        .map_err(failed)?;
    match thread.join() {
        Ok(result) => result.map_err(failed)?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
