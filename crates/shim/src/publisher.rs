// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Carries a sandbox's events to containerd, in order, however long containerd is away.
//!
//! ```text
//! publish() ──> queue ──> one task: connect, Forward, retry ──> containerd.services.events.ttrpc.v1.Events
//! ```
//!
//! One event is under way at a time, so a retry cannot overtake. While containerd cannot be reached the task tries for
//! ever, at growing intervals, with a new connection each time. A call that ran into its deadline may have arrived and is
//! sent again: delivery is at least once. An event that containerd itself refuses several times is given up, so that it
//! does not hold up the others.
//!
//! The queue has a cap. When it is full the oldest event goes: containerd asks for states after its restart and does not
//! depend on old events.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use ids::Namespace;
use sandbox::{EventSink, TaskEvent};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

use crate::events;

/// The most events that wait for containerd. At some 200 bytes each they are at most 2 MiB.
pub(crate) const MAX_QUEUED: usize = 8192;

/// How often an event is sent again that containerd has refused.
const MAX_REFUSALS: u32 = 5;

/// How a publisher waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For containerd to take one event (containerd's own publisher: 5 s).
    pub(crate) call: Duration,
    /// Before the first retry; it doubles each time.
    pub(crate) first_retry: Duration,
    /// The longest time between two tries.
    pub(crate) last_retry: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(5),
            first_retry: Duration::from_millis(20),
            last_retry: Duration::from_secs(1),
        }
    }
}

/// The queue to containerd. Cheap to clone; its task ends with the runtime.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: Namespace,
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Envelope>,
    under_way: bool,
    /// Since the last time that it was said.
    dropped: u64,
    delivered: u64,
    lost: u64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Publisher {
    /// Starts the task that sends to `address`, a path with or without `unix://`. Must be called inside a runtime.
    pub(crate) fn spawn(namespace: Namespace, address: &str, patience: Patience) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Notify::new(),
        });
        let path = address
            .strip_prefix("unix://")
            .unwrap_or(address)
            .to_owned();
        let sender = Sender {
            path,
            patience,
            client: None,
        };
        tokio::spawn(sender.run(Arc::clone(&shared)));
        Self { namespace, shared }
    }

    /// The queue, as JSON for people.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let queue = self.shared.queue();
        serde_json::json!({
            "queued": queue.waiting.len(),
            "under_way": queue.under_way,
            "delivered": queue.delivered,
            "lost": queue.lost,
        })
    }

    /// Answers once containerd has every event that was published before.
    pub(crate) async fn flushed(&self) {
        loop {
            let changed = self.shared.changed.notified();
            {
                let queue = self.shared.queue();
                if queue.waiting.is_empty() && !queue.under_way {
                    return;
                }
            }
            changed.await;
        }
    }
}

impl EventSink for Publisher {
    fn publish(&self, event: TaskEvent) {
        let envelope = match events::envelope(&self.namespace, &event, SystemTime::now()) {
            Ok(envelope) => envelope,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "an event cannot be encoded and is lost"
                );
                return;
            }
        };
        let mut queue = self.shared.queue();
        if queue.waiting.len() >= MAX_QUEUED {
            queue.waiting.pop_front();
            if queue.dropped == 0 {
                tracing::warn!(
                    queued = MAX_QUEUED,
                    "containerd is away and the queue of events is full: the oldest are dropped from now on"
                );
            }
            queue.dropped = queue.dropped.saturating_add(1);
            queue.lost = queue.lost.saturating_add(1);
        }
        queue.waiting.push_back(envelope);
        drop(queue);
        self.shared.changed.notify_waiters();
    }
}

/// Why an event was not taken.
enum Failure {
    /// containerd is away.
    Away(String),
    /// containerd does not want it.
    Refused(String),
}

struct Sender {
    path: String,
    patience: Patience,
    client: Option<EventsClient>,
}

impl Sender {
    async fn run(mut self, shared: Arc<Shared>) {
        loop {
            let changed = shared.changed.notified();
            let (next, dropped) = {
                let mut queue = shared.queue();
                let next = queue.waiting.pop_front();
                queue.under_way = next.is_some();
                (next, std::mem::take(&mut queue.dropped))
            };
            if dropped > 0 {
                tracing::warn!(dropped, "events were dropped while containerd was away");
            }
            match next {
                None => changed.await,
                Some(envelope) => {
                    let delivered = self.deliver(envelope).await;
                    let mut queue = shared.queue();
                    queue.under_way = false;
                    let count = match delivered {
                        true => &mut queue.delivered,
                        false => &mut queue.lost,
                    };
                    *count = count.saturating_add(1);
                    drop(queue);
                    shared.changed.notify_waiters();
                }
            }
        }
    }

    /// Whether containerd has it in the end.
    async fn deliver(&mut self, envelope: Envelope) -> bool {
        let mut request = ForwardRequest::new();
        let topic = envelope.topic.clone();
        request.envelope = MessageField::some(envelope);
        let mut pause = self.patience.first_retry;
        let mut refusals: u32 = 0;
        let mut away = false;
        loop {
            match self.forward(&request).await {
                Ok(()) => {
                    if away {
                        tracing::info!(topic, "containerd takes events again");
                    }
                    return true;
                }
                Err(Failure::Away(reason)) => {
                    if !away {
                        tracing::warn!(topic, reason, "containerd does not take events: trying on");
                    }
                    away = true;
                    self.client = None;
                }
                Err(Failure::Refused(reason)) => {
                    refusals = refusals.saturating_add(1);
                    if refusals > MAX_REFUSALS {
                        tracing::error!(
                            topic,
                            reason,
                            "containerd refuses an event: it is given up"
                        );
                        return false;
                    }
                }
            }
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(self.patience.last_retry);
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> Result<(), Failure> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let stream = timeout(self.patience.call, UnixStream::connect(&self.path)).await;
                let stream = stream
                    .map_err(|_| Failure::Away(format!("connect {}: no answer", self.path)))?;
                let stream = stream
                    .map_err(|error| Failure::Away(format!("connect {}: {error}", self.path)))?;
                let client = EventsClient::new(Client::new(Socket::new(stream)));
                self.client.insert(client).clone()
            }
        };
        match client
            .forward(with_duration(self.patience.call), request)
            .await
        {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => match status.code() {
                Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED => {
                    Err(Failure::Away(status.message))
                }
                _ => Err(Failure::Refused(status.message)),
            },
            Err(error) => Err(Failure::Away(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests;
