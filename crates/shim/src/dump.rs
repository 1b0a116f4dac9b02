// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! All that a shim knows, as JSON for people: its sandbox, and its own queues.

use std::path::PathBuf;
use std::sync::Arc;

use sandbox::{SandboxError, SandboxHandle};
use serde_json::{Value, json};

use crate::log::{Log, escaped_len};
use crate::publisher::Publisher;
use crate::telemetry::Telemetry;

/// How many bytes a part of a dump may take of a line of the log, which has to fit into a pipe with its other fields.
const MAX_PART: usize = 3 << 10;

/// The parts of a shim that have something to say.
pub(crate) struct Dump {
    pub(crate) sandbox: SandboxHandle,
    pub(crate) publisher: Publisher,
    pub(crate) log: Arc<Log>,
    pub(crate) telemetry: Option<Arc<Telemetry>>,
    /// The config file that containerd's options name; `None` if that is left to the usual one.
    pub(crate) config_file: Option<PathBuf>,
}

impl Dump {
    /// All that is known. Waits for guest and VMM, 2 s at most.
    pub(crate) async fn take(&self) -> Result<Value, SandboxError> {
        let mut dump = self.sandbox.dump().await?;
        if let Some(fields) = dump.as_object_mut() {
            let shim = json!({
                "version": env!("CARGO_PKG_VERSION"),
                "config_file": self.config_file,
                "events": self.publisher.dump(),
                "log_lines_dropped": self.log.dropped(),
                "telemetry": self.telemetry.as_ref().map(|telemetry| telemetry.dump()),
            });
            fields.insert("shim".to_owned(), shim);
        }
        Ok(dump)
    }

    /// The same in the log, a part on each line.
    pub(crate) async fn log(&self) {
        match self.take().await {
            Ok(dump) => {
                for (path, value) in parts(&dump) {
                    tracing::info!(part = path, dump = %value, "as asked by SIGUSR1");
                }
            }
            Err(error) => tracing::warn!(error = error.report(), "there is nothing to dump"),
        }
    }
}

/// The value cut into parts of at most [`MAX_PART`] bytes, each with where it is. What is longer and has no parts stays
/// as it is.
fn parts(dump: &Value) -> Vec<(String, String)> {
    let mut parts = Vec::new();
    cut(String::new(), dump, &mut parts);
    parts
}

fn cut(path: String, value: &Value, parts: &mut Vec<(String, String)>) {
    let text = value.to_string();
    let fits = escaped_len(&text) <= MAX_PART;
    let inside = |name: &str| match path.as_str() {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    };
    match value {
        Value::Object(fields) if !fits || path.is_empty() => {
            for (name, field) in fields {
                cut(inside(name), field, parts);
            }
        }
        Value::Array(items) if !fits => {
            for (at, item) in items.iter().enumerate() {
                cut(inside(&at.to_string()), item, parts);
            }
        }
        _ => parts.push((path, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dump_is_cut_where_it_is_too_long_for_a_line() {
        let long = "x".repeat(MAX_PART / 2);
        let dump = json!({
            "vm": { "state": "ready", "calls": [] },
            "processes": [ { "id": "a", "more": long }, { "id": "b", "more": long } ],
        });
        let parts = parts(&dump);
        let paths: Vec<&str> = parts.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["processes.0", "processes.1", "vm"]);
        assert_eq!(parts[2].1, r#"{"calls":[],"state":"ready"}"#);
        for (path, part) in &parts {
            assert!(escaped_len(part) <= MAX_PART, "{path}");
            let read: Value = serde_json::from_str(part).unwrap();
            assert!(read.is_object());
        }
    }
}
