// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Spans as OTLP's JSON encoding has them (OpenTelemetry Protocol 1.9, "JSON Protobuf Encoding": ids in hex, 64-bit
//! numbers as strings, names in lower camel case). Pure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// `SPAN_KIND_INTERNAL`.
const INTERNAL: u32 = 1;

/// `STATUS_CODE_ERROR`; one that is unset means that nothing went wrong.
const ERROR: u32 = 2;

/// The number of a span in its trace; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SpanId(u64);

/// A span that has ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    pub(super) id: SpanId,
    /// `None` for the root.
    pub(super) parent: Option<SpanId>,
    pub(super) name: String,
    pub(super) start: SystemTime,
    pub(super) end: SystemTime,
    pub(super) container: Option<String>,
    pub(super) ok: bool,
}

/// The trace of one sandbox's start.
#[derive(Debug)]
pub(super) struct Trace {
    /// In hex.
    id: String,
    root: SpanId,
    last: AtomicU64,
    namespace: String,
    sandbox: String,
}

impl Trace {
    /// The trace of the sandbox whose start began at `begun`: another one each time, and nowhere the same.
    pub(super) fn new(namespace: &str, sandbox: &str, begun: SystemTime) -> Self {
        let digest = Sha256::digest(format!("{namespace}/{sandbox}/{}", nanoseconds(begun)));
        let bytes: [u8; 32] = digest.into();
        let (id, rest) = bytes.split_at(16);
        let root = rest
            .first_chunk()
            .map_or(1, |bytes| u64::from_be_bytes(*bytes));
        // Room for every span behind it, none of which is 0.
        let root = root.clamp(1, u64::MAX >> 1);
        Self {
            id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
            root: SpanId(root),
            last: AtomicU64::new(root),
            namespace: namespace.to_owned(),
            sandbox: sandbox.to_owned(),
        }
    }

    /// The span above all others.
    pub(super) fn root(&self) -> SpanId {
        self.root
    }

    /// The id of one more span.
    pub(super) fn next_id(&self) -> SpanId {
        SpanId(self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }

    /// An `ExportTraceServiceRequest`.
    pub(super) fn request(&self, spans: &[Span]) -> Value {
        let spans: Vec<Value> = spans.iter().map(|span| self.span(span)).collect();
        json!({
            "resourceSpans": [{
                "resource": {
                    "attributes": [
                        attribute("service.name", crate::info::PROGRAM),
                        attribute("service.version", env!("CARGO_PKG_VERSION")),
                        attribute("service.instance.id", &self.sandbox),
                    ],
                },
                "scopeSpans": [{
                    "scope": { "name": "coffer", "version": env!("CARGO_PKG_VERSION") },
                    "spans": spans,
                }],
            }],
        })
    }

    fn span(&self, span: &Span) -> Value {
        let mut attributes = vec![
            attribute("containerd.namespace", &self.namespace),
            attribute("sandbox_id", &self.sandbox),
        ];
        if let Some(container) = &span.container {
            attributes.push(attribute("container.id", container));
        }
        let status = match span.ok {
            true => json!({}),
            false => json!({ "code": ERROR }),
        };
        json!({
            "traceId": self.id,
            "spanId": hex(span.id),
            "parentSpanId": span.parent.map_or_else(String::new, hex),
            "name": span.name,
            "kind": INTERNAL,
            "startTimeUnixNano": nanoseconds(span.start).to_string(),
            "endTimeUnixNano": nanoseconds(span.end).to_string(),
            "attributes": attributes,
            "status": status,
        })
    }
}

fn attribute(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn hex(id: SpanId) -> String {
    format!("{:016x}", id.0)
}

fn nanoseconds(at: SystemTime) -> u128 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}
