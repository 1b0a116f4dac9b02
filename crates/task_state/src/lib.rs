// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pure lifecycle of tasks and execs, and the order of their events.
#![forbid(unsafe_code)]

mod process;

pub use process::{Exit, Pid, ProcessId, Status};
