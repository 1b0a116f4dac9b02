// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent's log: the kernel's ring buffer, which keeps the order with the kernel's own lines and limits their rate
//! (`printk.devkmsg`), and from there the console.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::OnceLock;

/// The longest line that the kernel takes (`PRINTKRB_RECORD_MAX`, less the prefix).
const MAX_LINE_LEN: usize = 900;

static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Something went wrong that the host is not told of otherwise.
pub fn warn(text: &str) {
    line(4, text);
}

/// Something worth knowing when reading the console.
pub fn info(text: &str) {
    line(6, text);
}

fn line(level: u8, text: &str) {
    let text: String = text
        .chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .take(MAX_LINE_LEN)
        .collect();
    let kmsg = KMSG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
    // One write is one record. A line that cannot be written has nowhere else to go.
    let _ = match kmsg {
        Some(file) if std::process::id() == 1 => {
            (&*file).write_all(format!("<{level}>coffer-agent: {text}\n").as_bytes())
        }
        _ => writeln!(std::io::stderr(), "coffer-agent: {text}"),
    };
}
