// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Says what is being done: a line when a step ends, with its time, and signs of life during long ones.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A step that takes longer is announced, so that nobody waits before a silent terminal.
const ANNOUNCE_AFTER: Duration = Duration::from_secs(1);
/// A step that was announced says that it is still at work once in this time.
const REMIND_EVERY: Duration = Duration::from_secs(20);

/// Runs `work` as the step `name`.
///
/// # Errors
/// Those of `work`, with the step's name.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let (done, watch) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut wait = ANNOUNCE_AFTER;
            while watch.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                if wait == ANNOUNCE_AFTER {
                    eprintln!("    {name} ...");
                } else {
                    eprintln!(
                        "    {name}: still at work after {:.0} s",
                        begin.elapsed().as_secs_f64()
                    );
                }
                wait = REMIND_EVERY;
            }
        });
        let result = work();
        drop(done);
        finish(name, begin, result)
    })
}

/// Runs `work`, which itself says what it does.
///
/// # Errors
/// Those of `work`, with the step's name.
pub(crate) fn section<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    eprintln!("==> {name}");
    finish(name, begin, work())
}

fn finish<T>(name: &str, begin: Instant, result: Result<T>) -> Result<T> {
    let verdict = if result.is_ok() { "" } else { "failed after " };
    eprintln!("==> {name}: {verdict}{}", seconds(begin.elapsed()));
    result.with_context(|| name.to_owned())
}

/// A duration as people read it.
pub(crate) fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_durations_have_their_units() {
        assert_eq!(seconds(Duration::from_millis(43)), "43 ms");
        assert_eq!(seconds(Duration::from_millis(2345)), "2.3 s");
    }

    #[test]
    fn failed_step_carries_its_name() {
        let failed: Result<()> = step("guest kernel", || anyhow::bail!("no space"));
        assert_eq!(
            format!("{:#}", failed.unwrap_err()),
            "guest kernel: no space"
        );
    }
}
