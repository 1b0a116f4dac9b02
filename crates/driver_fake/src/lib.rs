// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! An in-memory driver and guest agent with scripted faults, for tests without KVM.
//!
//! ```text
//! Script ──FakeDriver::new──> Driver::launch ──> FakeVm ──> fake agent: the real protocol over socket pairs
//! ```
//!
//! The agent speaks all of `agent_proto`, and its processes are little programs named by `process.args` (see
//! [`Program`]), so that a test says what a container does in the container's spec. What goes wrong is said by the
//! [`Script`], before or while the sandbox runs: boots that never end, calls that are refused, held or that kill the VM.
//!
//! Only tests depend on this crate.
#![forbid(unsafe_code)]

mod agent;
mod driver;
mod guest;
mod program;
mod script;

pub use driver::{FAKE_VMM_PID, FakeDriver, FakeVm, fake_spec};
pub use guest::Files;
pub use program::Program;
pub use script::{Boot, Script};
