// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The phases of a pod's start as OpenTelemetry spans, for nodes whose config names a collector.
//!
//! ```text
//! phase events (tracing) ─> SpanLayer ─ bounded queue ─> a thread ─ OTLP/HTTP, JSON ─> the node's collector
//! ```
//!
//! A pod never waits for a collector: a span for which there is no room in the queue is dropped and counted, and so is what
//! a collector does not take at the first try. Without a collector in the config there is neither layer nor thread. The
//! protocol is spoken by hand, a POST for each batch: the exporters that there are bring an HTTP client and a gRPC stack
//! along, which is more than the shim itself.

mod otlp;
mod post;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use pod_spec::Endpoint;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use self::otlp::{Span, Trace};

/// The most spans that wait to be sent. The start of a pod with ten containers has some fifty.
const MAX_QUEUED: usize = 256;

/// The most spans in one request: some 30 KiB.
const MAX_BATCH: usize = 64;

/// How long a first span waits for others.
const BATCH_TIME: Duration = Duration::from_secs(1);

/// How long the last spans may take to reach the collector when the shim ends. `delete` gives the shim 2 s in all.
const FLUSH_LIMIT: Duration = Duration::from_millis(300);

/// The phases of a start; what comes later is no trace of it.
const PHASES: [&str; 8] = [
    "plan",
    "launch",
    "boot",
    "configure",
    "prepare",
    "attach",
    "create",
    "start",
];

/// The span above all others.
const ROOT: &str = "pod start";

/// The way to the collector.
pub(crate) struct Telemetry {
    queue: Mutex<Option<SyncSender<Span>>>,
    counters: Arc<Counters>,
    trace: Arc<Trace>,
    begun: SystemTime,
    root_ended: AtomicBool,
    /// Says that the thread has ended.
    ended: Mutex<Receiver<()>>,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, spans: usize) {
        counter.fetch_add(u64::try_from(spans).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Telemetry {
    /// The way to `endpoint` for the start of a sandbox that begins now. Makes a thread.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub(crate) fn start(
        endpoint: Endpoint,
        namespace: &str,
        sandbox: &str,
    ) -> io::Result<Arc<Self>> {
        let begun = SystemTime::now();
        let trace = Arc::new(Trace::new(namespace, sandbox, begun));
        let counters = Arc::<Counters>::default();
        let (queue, received) = sync_channel(MAX_QUEUED);
        let (end, ended) = sync_channel(1);
        let exporter = Exporter {
            endpoint,
            trace: Arc::clone(&trace),
            counters: Arc::clone(&counters),
        };
        thread::Builder::new()
            .name("telemetry".to_owned())
            .spawn(move || {
                exporter.run(&received);
                // Nobody may wait for it.
                let _alone = end.send(());
            })?;
        Ok(Arc::new(Self {
            queue: Mutex::new(Some(queue)),
            counters,
            trace,
            begun,
            root_ended: AtomicBool::new(false),
            ended: Mutex::new(ended),
        }))
    }

    /// What makes spans of the events of this process.
    pub(crate) fn layer<S>(self: &Arc<Self>) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        SpanLayer(Arc::clone(self)).with_filter(LevelFilter::from_level(Level::INFO))
    }

    /// Sends what there is, as far as that takes no longer than 300 ms. Later spans are dropped.
    pub(crate) fn end(&self) {
        drop(self.queue().take());
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        // In time or not: the shim ends.
        let _in_time = ended.recv_timeout(FLUSH_LIMIT);
    }

    /// The counters, as JSON for people.
    pub(crate) fn dump(&self) -> serde_json::Value {
        serde_json::json!({
            "spans_sent": self.counters.sent.load(Ordering::Relaxed),
            "spans_dropped": self.counters.dropped.load(Ordering::Relaxed),
        })
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Option<SyncSender<Span>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a phase that has just ended.
    fn phase(&self, phase: Phase) {
        if !PHASES.contains(&phase.name.as_str()) {
            return;
        }
        let end = SystemTime::now();
        let start = end.checked_sub(phase.elapsed).unwrap_or(end);
        // The pod has started when its first container runs, or when there is no VM for it.
        let ends_root = phase.name == "start" || (!phase.ok && phase.container.is_none());
        let ok = phase.ok;
        self.send(Span {
            id: self.trace.next_id(),
            parent: Some(self.trace.root()),
            name: phase.name,
            start,
            end,
            container: phase.container,
            ok,
        });
        if ends_root && !self.root_ended.swap(true, Ordering::Relaxed) {
            self.send(Span {
                id: self.trace.root(),
                parent: None,
                name: ROOT.to_owned(),
                start: self.begun,
                end,
                container: None,
                ok,
            });
        }
    }

    fn send(&self, span: Span) {
        let taken = self.queue().as_ref().map(|queue| queue.try_send(span));
        if !matches!(taken, Some(Ok(()))) {
            Counters::add(&self.counters.dropped, 1);
        }
    }
}

/// Takes the phases out of a process's events.
struct SpanLayer(Arc<Telemetry>);

impl<S: Subscriber> Layer<S> for SpanLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().fields().field("phase").is_none() {
            return;
        }
        let mut phase = Phase::default();
        event.record(&mut phase);
        self.0.phase(phase);
    }
}

/// A phase as its event tells it.
#[derive(Default)]
struct Phase {
    name: String,
    elapsed: Duration,
    ok: bool,
    container: Option<String>,
}

impl Visit for Phase {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "phase" => value.clone_into(&mut self.name),
            "container_id" => self.container = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "elapsed_us" {
            self.elapsed = Duration::from_micros(value);
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        if field.name() == "ok" {
            self.ok = value;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// The thread that sends.
struct Exporter {
    endpoint: Endpoint,
    trace: Arc<Trace>,
    counters: Arc<Counters>,
}

impl Exporter {
    /// Sends until the queue is closed and empty.
    fn run(&self, queue: &Receiver<Span>) {
        let mut refused = false;
        while let Ok(first) = queue.recv() {
            let batch = batch(first, queue);
            let body = self.trace.request(&batch).to_string();
            match post::post(&self.endpoint, body.as_bytes()) {
                Ok(()) => {
                    Counters::add(&self.counters.sent, batch.len());
                    if std::mem::take(&mut refused) {
                        tracing::info!("the collector takes spans again");
                    }
                }
                Err(error) => {
                    Counters::add(&self.counters.dropped, batch.len());
                    if !std::mem::replace(&mut refused, true) {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            collector = %self.endpoint.address,
                            "the collector takes no spans: they are dropped"
                        );
                    }
                }
            }
        }
    }
}

/// `first`, and what else comes while it waits.
fn batch(first: Span, queue: &Receiver<Span>) -> Vec<Span> {
    let begun = Instant::now();
    let mut batch = vec![first];
    while batch.len() < MAX_BATCH {
        match queue.recv_timeout(BATCH_TIME.saturating_sub(begun.elapsed())) {
            Ok(span) => batch.push(span),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    batch
}
