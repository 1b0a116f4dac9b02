// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One log line for each phase of a start or stop; the benchmarks read them.

use std::future::Future;
use std::time::Instant;

use ids::{ContainerId, SandboxId};
use task_state::ProcessId;

use crate::error::SandboxError;

/// Whose phase it is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Of<'a> {
    Sandbox(&'a SandboxId),
    Container(&'a SandboxId, &'a ContainerId),
    Process(&'a SandboxId, &'a ProcessId),
}

/// Runs a phase and logs how long it took, in microseconds.
pub(crate) async fn phase<T>(
    of: Of<'_>,
    name: &'static str,
    work: impl Future<Output = Result<T, SandboxError>>,
) -> Result<T, SandboxError> {
    let begun = Instant::now();
    let result = work.await;
    let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    let ok = result.is_ok();
    let (sandbox, container, exec) = match of {
        Of::Sandbox(sandbox) => (sandbox, None, None),
        Of::Container(sandbox, container) => (sandbox, Some(container.as_str()), None),
        Of::Process(sandbox, process) => (
            sandbox,
            Some(process.container.as_str()),
            process.exec.as_ref().map(|exec| exec.as_str()),
        ),
    };
    tracing::info!(
        sandbox_id = sandbox.as_str(),
        container_id = container,
        exec_id = exec,
        phase = name,
        elapsed_us,
        ok,
        "phase"
    );
    result
}
