// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a shim shows to the operator: the files of its state directory and the Inspect service.
//!
//! Each sandbox of a node has a directory, [`STATE_ROOT`]`/<namespace>/<sandbox id>`, for root alone. Its file
//! [`SOCKET_FILE`] holds the path of the socket on which the shim serves containerd, and beside it
//! [`service::Inspect`]. A directory whose socket nobody serves is of a shim that was killed; containerd removes it.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Deserialize;

/// Where the sandboxes of a node have their directories.
pub const STATE_ROOT: &str = "/run/coffer";

/// The file with the path of the shim's socket. It is there before the socket is.
pub const SOCKET_FILE: &str = "socket";

/// The file with the shim's process, a [`ProcessRecord`].
pub const SHIM_FILE: &str = "shim.json";

/// The file with the VMM's process, a [`ProcessRecord`]; not there before the VMM is.
pub const VMM_FILE: &str = "vmm.json";

/// In the name of a directory that is being removed, and in no sandbox's id.
pub const REMOVED: &str = "..removed";

/// How the id of every debugging shell begins.
pub const SHELL_PREFIX: &str = "coffer-shell-";

/// How long an answer to [`api::LinesRequest`] waits for a line.
pub const LINES_WAIT: Duration = Duration::from_secs(10);

/// A process as a state directory has it. There is more in the file, for the shim itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: i32,
}

pub use inspect as api;

/// Messages of `proto/inspect.proto`; the service's code wants this name for them.
#[expect(
    missing_docs,
    nonstandard_style,
    unused_mut,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod inspect {
    include!(concat!(env!("OUT_DIR"), "/inspect.rs"));
}

/// The ttrpc service of `proto/inspect.proto`.
#[expect(
    missing_docs,
    unused_imports,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod service {
    include!(concat!(env!("OUT_DIR"), "/inspect_ttrpc.rs"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_with_more_in_it_is_read() {
        let record: ProcessRecord = serde_json::from_str(r#"{"pid":7,"start_time":8}"#).unwrap();
        assert_eq!(record, ProcessRecord { pid: 7 });
    }
}
