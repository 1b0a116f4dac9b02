// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the fake guest's processes do.

use serde_json::Value;

/// A program, named by `process.args` of the OCI spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// `["exit", "3"]`: ends at once.
    Exit(u32),
    /// `["sleep"]`: until a signal ends it.
    Sleep,
    /// `["print", "TEXT", "1000"]`: ends at once with 0, having written the text so many times.
    Print(String, usize),
    /// `["complain", "TEXT"]`: the same once, on stderr.
    Complain(String),
    /// `["leave", "TEXT"]`: ends at once with 1, having written the text to each of its copied files.
    Leave(String),
    /// `["cat"]`: passes stdin on to stdout until it is closed.
    Cat,
    /// `["oom"]`: is ended by the OOM killer.
    OutOfMemory,
    /// `["linger"]`: ends at once, but its stdout stays open (a child of its has it).
    Linger,
}

impl Program {
    /// The program that an OCI spec or an OCI process names.
    pub(crate) fn from_json(json: &[u8]) -> Option<Self> {
        let value: Value = serde_json::from_slice(json).ok()?;
        let process = value.get("process").unwrap_or(&value);
        let args: Vec<&str> = process
            .get("args")?
            .as_array()?
            .iter()
            .filter_map(Value::as_str)
            .collect();
        match args.as_slice() {
            ["exit", status] => status.parse().ok().map(Self::Exit),
            ["sleep"] => Some(Self::Sleep),
            ["print", text, times] => Some(Self::Print((*text).to_owned(), times.parse().ok()?)),
            ["complain", text] => Some(Self::Complain((*text).to_owned())),
            ["leave", text] => Some(Self::Leave((*text).to_owned())),
            ["cat"] => Some(Self::Cat),
            ["oom"] => Some(Self::OutOfMemory),
            ["linger"] => Some(Self::Linger),
            _ => None,
        }
    }

    /// How it ends if nobody makes it, or `None` if it goes on.
    pub(crate) fn ends_at_once(&self) -> Option<u32> {
        match self {
            Self::Exit(status) => Some(*status),
            Self::Print(..) | Self::Complain(_) | Self::Linger => Some(0),
            Self::Leave(_) => Some(1),
            Self::OutOfMemory => Some(137),
            Self::Sleep | Self::Cat => None,
        }
    }
}
