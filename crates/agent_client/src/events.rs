// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The guest's events, in order and without gaps.

use std::sync::Arc;
use std::time::SystemTime;

use agent_proto::{MAX_EVENTS, ProcessKey, StreamKind, api};
use ids::{ContainerId, Generation};

use crate::client::AgentClient;
use crate::error::AgentError;

const METHOD: &str = "NextEvents";

/// Something that happened in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// A process has ended.
    Exited {
        /// Which.
        process: ProcessKey,
        /// The exit code, or 128 plus the signal: 0 to 255.
        status: u32,
        /// When the host learnt of it. The guest's own clock is not believed.
        at: SystemTime,
    },
    /// An output stream has ended.
    StreamEnded {
        /// Whose.
        process: ProcessKey,
        /// Which.
        kind: StreamKind,
        /// How many bytes it had.
        bytes: u64,
    },
    /// The OOM killer has struck.
    OutOfMemory(ContainerId),
}

/// Reads a guest's events, one answer at a time.
pub struct EventReader {
    client: Arc<AgentClient>,
    last: u64,
}

impl EventReader {
    /// A reader from the first event on.
    pub fn new(client: Arc<AgentClient>) -> Self {
        Self { client, last: 0 }
    }

    /// Waits for the next events, at most [`MAX_EVENTS`]; none if nothing happened for a while.
    ///
    /// # Errors
    /// As every call; [`AgentError::Protocol`] if the guest leaves one out, repeats one, or names what cannot be. The
    /// events up to there are lost: a guest that does this has to be ended.
    pub async fn next(&mut self) -> Result<Vec<AgentEvent>, AgentError> {
        let answer = self.client.next_events(self.last).await?;
        let events = parse_events(answer, self.last, SystemTime::now())?;
        let count = u64::try_from(events.len()).unwrap_or(u64::MAX);
        self.last = self.last.saturating_add(count);
        Ok(events)
    }
}

/// The events of an answer to `NextEvents`, all of them after event number `after`; `at` dates the exits. Pure.
///
/// # Errors
/// [`AgentError::Protocol`] for more than [`MAX_EVENTS`], for a gap or a repetition, and for an event that cannot be.
pub fn parse_events(
    answer: api::Events,
    after: u64,
    at: SystemTime,
) -> Result<Vec<AgentEvent>, AgentError> {
    if answer.events.len() > MAX_EVENTS {
        let what = format!("{} events, at most {MAX_EVENTS}", answer.events.len());
        return Err(AgentError::protocol(METHOD, what));
    }
    let mut last = after;
    let mut events = Vec::with_capacity(answer.events.len());
    for event in answer.events {
        let expected = last.saturating_add(1);
        if event.sequence != expected {
            let what = format!("event {} came instead of {expected}", event.sequence);
            return Err(AgentError::protocol(METHOD, what));
        }
        last = expected;
        events.push(decode(event, at)?);
    }
    Ok(events)
}

fn decode(event: api::Event, at: SystemTime) -> Result<AgentEvent, AgentError> {
    use api::event::Event;
    match event.event {
        Some(Event::Exited(exited)) => Ok(AgentEvent::Exited {
            process: process(exited.process)?,
            // wait(2) knows no higher status.
            status: exited.exit_status.min(255),
            at,
        }),
        Some(Event::StreamEnded(ended)) => Ok(AgentEvent::StreamEnded {
            process: process(ended.process)?,
            kind: match ended.kind.enum_value() {
                Ok(api::StreamKind::STDOUT) => StreamKind::Stdout,
                Ok(api::StreamKind::STDERR) => StreamKind::Stderr,
                _ => return Err(AgentError::protocol(METHOD, "no such output stream")),
            },
            bytes: ended.bytes,
        }),
        Some(Event::OutOfMemory(oom)) => Ok(AgentEvent::OutOfMemory(container(&oom.container_id)?)),
        _ => Err(AgentError::protocol(METHOD, "an event of no known kind")),
    }
}

fn container(id: &str) -> Result<ContainerId, AgentError> {
    id.parse()
        .map_err(|error| AgentError::protocol(METHOD, error))
}

fn process(process: protobuf::MessageField<api::ProcessRef>) -> Result<ProcessKey, AgentError> {
    let Some(process) = process.into_option() else {
        return Err(AgentError::protocol(METHOD, "an event without a process"));
    };
    let exec = match process.exec_id.as_str() {
        "" => None,
        id => Some(
            id.parse()
                .map_err(|error| AgentError::protocol(METHOD, error))?,
        ),
    };
    Ok(ProcessKey {
        container: container(&process.container_id)?,
        exec,
        generation: Generation(process.generation),
    })
}
