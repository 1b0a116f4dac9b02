// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Reaps every child: those that were asked for, helpers, and orphans that the kernel gives to PID 1.
//!
//! There is one place that waits, so no status is ever taken by the wrong one. A process's pid is in the table before the
//! process can end (see [`oci_process`]), and its number cannot be used again before it is reaped here.

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};

/// Calls `reaped` with the pid and status (exit code, or 128 plus the signal) of each child that ends, for ever.
///
/// # Errors
/// If the runtime cannot listen to SIGCHLD.
pub async fn run(mut reaped: impl FnMut(u32, u32)) -> std::io::Result<()> {
    let mut ended = signal(SignalKind::child())?;
    loop {
        // One SIGCHLD may stand for many children, and some may have ended before we listened.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let number = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, Some(signal)) => signal.saturating_add(128),
                (None, None) => continue,
            };
            reaped(
                pid.as_raw_nonzero().get().unsigned_abs(),
                number.unsigned_abs(),
            );
        }
        if ended.recv().await.is_none() {
            return Ok(());
        }
    }
}
