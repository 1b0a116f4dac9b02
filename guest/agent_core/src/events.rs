// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What has happened, in order, until the host has taken note of it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use agent_proto::api;
use agent_proto::{MAX_EVENTS, NEXT_EVENTS_WAIT, ProcessKey, StreamKind};
use ids::ContainerId;
use tokio::sync::Notify;

use crate::plan::{process_ref, stream_kind};

/// The queue of events. How long it gets is the host's doing: each event but [`Events::out_of_memory`], of which there is
/// at most one unread for a container, answers a request of the host's.
#[derive(Debug, Default)]
pub struct Events {
    log: Mutex<Log>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Log {
    last: u64,
    unread: VecDeque<api::Event>,
}

impl Events {
    /// A process has ended.
    pub fn exited(&self, key: &ProcessKey, exit_status: u32, at_unix_ns: u64) {
        self.push(api::event::Event::Exited(api::Exited {
            process: Some(process_ref(key)).into(),
            exit_status,
            at_unix_ns,
            ..Default::default()
        }));
    }

    /// The last byte of an output stream has been sent.
    pub fn stream_ended(&self, key: &ProcessKey, kind: StreamKind, bytes: u64) {
        self.push(api::event::Event::StreamEnded(api::StreamEnded {
            process: Some(process_ref(key)).into(),
            kind: stream_kind(kind).into(),
            bytes,
            ..Default::default()
        }));
    }

    /// The OOM killer has struck in a container.
    pub fn out_of_memory(&self, container: &ContainerId) {
        let told = self.lock().unread.iter().any(|event| {
            matches!(&event.event, Some(api::event::Event::OutOfMemory(oom)) if oom.container_id == container.as_str())
        });
        if !told {
            self.push(api::event::Event::OutOfMemory(api::OutOfMemory {
                container_id: container.to_string(),
                ..Default::default()
            }));
        }
    }

    /// Forgets the events up to `after`, and gives those behind it as soon as there is one; none once
    /// [`NEXT_EVENTS_WAIT`] has passed.
    pub async fn next(&self, after: u64) -> Vec<api::Event> {
        let found = async {
            loop {
                let news = self.news.notified();
                tokio::pin!(news);
                // Registered before looking, so that nothing pushed in between is missed.
                news.as_mut().enable();
                let events = self.take(after);
                if !events.is_empty() {
                    return events;
                }
                news.await;
            }
        };
        tokio::time::timeout(NEXT_EVENTS_WAIT, found)
            .await
            .unwrap_or_default()
    }

    /// How many events the host has not acknowledged, and the number of the last one.
    pub fn state(&self) -> (usize, u64) {
        let log = self.lock();
        (log.unread.len(), log.last)
    }

    fn take(&self, after: u64) -> Vec<api::Event> {
        let mut log = self.lock();
        while log
            .unread
            .front()
            .is_some_and(|event| event.sequence <= after)
        {
            log.unread.pop_front();
        }
        log.unread.iter().take(MAX_EVENTS).cloned().collect()
    }

    fn push(&self, event: api::event::Event) {
        {
            let mut log = self.lock();
            log.last = log.last.saturating_add(1);
            let event = api::Event {
                sequence: log.last,
                event: Some(event),
                ..Default::default()
            };
            log.unread.push_back(event);
        }
        self.news.notify_waiters();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ProcessKey {
        ProcessKey {
            container: "c".parse().unwrap(),
            exec: None,
            generation: ids::Generation(1),
        }
    }

    fn numbers(events: &[api::Event]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_numbered_without_gaps_and_kept_until_acknowledged() {
        let events = Events::default();
        events.exited(&key(), 0, 1);
        events.stream_ended(&key(), StreamKind::Stdout, 5);
        assert_eq!(numbers(&events.next(0).await), [1, 2]);
        assert_eq!(numbers(&events.next(0).await), [1, 2]);
        assert_eq!(numbers(&events.next(1).await), [2]);
        events.exited(&key(), 0, 1);
        assert_eq!(numbers(&events.next(2).await), [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn poll_without_news_ends_empty_after_its_time() {
        let events = Events::default();
        let start = tokio::time::Instant::now();
        assert!(events.next(0).await.is_empty());
        assert_eq!(start.elapsed(), NEXT_EVENTS_WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_poll_is_woken() {
        let events = std::sync::Arc::new(Events::default());
        let waiting = tokio::spawn({
            let events = events.clone();
            async move { events.next(0).await }
        });
        tokio::task::yield_now().await;
        events.exited(&key(), 3, 1);
        assert_eq!(numbers(&waiting.await.unwrap()), [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn unread_oom_is_told_once() {
        let events = Events::default();
        let container: ContainerId = "c".parse().unwrap();
        events.out_of_memory(&container);
        events.out_of_memory(&container);
        assert_eq!(numbers(&events.next(0).await), [1]);
        assert!(events.take(1).is_empty());
        events.out_of_memory(&container);
        assert_eq!(numbers(&events.next(1).await), [2]);
    }
}
