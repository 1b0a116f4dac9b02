// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Host end of the guest agent: handshake, calls, stdio streams and events.

mod stdio;

pub use stdio::{StdioPaths, TerminalSize};
