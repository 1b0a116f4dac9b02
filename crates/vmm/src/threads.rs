// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Named threads with small stacks.

use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use crate::VmmError;

/// Stack of every thread but the first: the deepest path (a block request with 254 segments) takes a third of it.
pub(crate) const STACK_BYTES: usize = 128 << 10;

/// Starts a thread, and waits for nothing of it.
///
/// # Errors
/// The host has no thread left.
pub(crate) fn launch(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, VmmError> {
    Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(work)
        .map_err(VmmError::host("start a thread"))
}

/// Starts a thread that runs `before`, whose answer this function waits for, and then `work`.
///
/// # Errors
/// The host has no thread left, or `before` fails; `work` then does not run.
pub(crate) fn spawn(
    name: &str,
    before: impl FnOnce() -> Result<(), VmmError> + Send + 'static,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, VmmError> {
    let (send, ready) = sync_channel(1);
    let thread = launch(name, move || {
        let result = before();
        let go = result.is_ok();
        let _ = send.send(result);
        if go {
            work();
        }
    })?;
    match ready.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(VmmError::host("start a thread")(std::io::Error::other(
            "it ended at once",
        ))),
    }
}
