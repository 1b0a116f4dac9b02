// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where things are: the checkout, cargo's target folder and the cache.

use std::env;
use std::path::{Path, PathBuf};

/// The checkout that this xtask was built from.
pub(crate) fn root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir
        .ancestors()
        .nth(2)
        .unwrap_or(crate_dir)
        .to_path_buf()
}

/// Cargo's target folder; built trees and artefacts are kept under `coffer/` in it.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The built tree, laid out as on a node: `bin/`, `share/coffer/`, `images/`, `tests/`.
pub(crate) fn dist() -> PathBuf {
    target().join("coffer/dist")
}

/// Logs of the build steps, one file each, overwritten by the next run.
pub(crate) fn logs() -> PathBuf {
    target().join("coffer/logs")
}

/// Everything that is expensive to make and named by its content, shared by all checkouts of a user:
/// `$COFFER_CACHE`, else `~/.cache/coffer`.
pub(crate) fn cache() -> PathBuf {
    env::var_os("COFFER_CACHE").map_or_else(
        || {
            env::var_os("HOME")
                .map_or_else(|| PathBuf::from("/root"), PathBuf::from)
                .join(".cache/coffer")
        },
        PathBuf::from,
    )
}
