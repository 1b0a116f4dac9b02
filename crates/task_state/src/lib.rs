// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pure lifecycle of tasks and execs, and the order of their events.
//!
//! [`TaskTable::step`] takes one [`Input`] (what containerd asks, what the guest tells, what became of work) and gives
//! [`Effect`]s, to be carried out in order by the sandbox's owner task, or a denial. No I/O, no clock, no locks.
//!
//! # Invariants
//! * An exit is never told before its start: one that the guest tells earlier is held until the start is.
//! * An init's exit is the last of its container: execs that still run are told first, and one that is just being
//!   started is waited for.
//! * Every process that was told of ends with exactly one exit, also if the VM dies with it (137), whatever a hostile
//!   guest says. A process that could not be started is not told of at all.
//! * A container is paused and resumed in turn. Nothing is started in one that is paused, and it ends like one that runs.
//! * An OOM kill is told before the exit, once for each task.
//! * Every ticket is answered exactly once, at the latest when its process is deleted.
//! * Outcomes and exits carry a [`ids::Generation`]: what concerns an earlier process of the same name has no effect.
//!
//! The rules are containerd's docs/runtime-v2.md and the behaviour of its runc shim.
#![forbid(unsafe_code)]

mod container;
mod denied;
mod message;
mod outcomes;
mod pause;
mod process;
mod requests;
mod signal;
mod table;
#[cfg(test)]
mod tests;

pub use denied::{Denied, DeniedCode};
pub use message::{Answer, Effect, Event, Input, KillScope, Role, Ticket, View};
pub use process::{Exit, Pid, ProcessId, Status};
pub use table::{MAX_TOMBSTONES, TaskTable};
