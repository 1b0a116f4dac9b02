// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's figures: asked of the guest one call at a time, and kept for when it does not answer.
//!
//! containerd asks for a pod's containers one after the other, and its caller wants the last of them within a second. So
//! only the first question that is overdue is waited for: until the guest answers any, all callers have at once what it
//! said last. It is asked all the same, and heard again with its next answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_client::AgentError;
use agent_proto::api;
use ids::ContainerId;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::convert;
use crate::error::{SandboxError, SandboxErrorKind};
use crate::input::Reply;
use crate::owner::Shared;
use crate::request::{CgroupStats, TaskStats};
use crate::vm::{self, Failure};
use crate::work::container_ref;

/// How long to wait for the guest: containerd gives a call 2 s, of which a loaded node needs its share.
const LIMIT: Duration = Duration::from_millis(700);

/// Whether somebody has waited in vain since the guest last answered a question, about any container.
#[derive(Debug, Default)]
pub(crate) struct Silence(AtomicBool);

impl Silence {
    /// Whether it lasts; then nobody waits.
    pub(crate) fn lasts(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, lasts: bool) {
        self.0.store(lasts, Ordering::Relaxed);
    }
}

/// What the guest has said of a container, and whether it is being asked. A guest that does not answer is asked again
/// only after it has, or after the call's own deadline: questions do not pile up.
#[derive(Default)]
pub(crate) struct Figures(watch::Sender<State>);

#[derive(Default)]
struct State {
    /// When the question is overdue that is under way.
    due: Option<Instant>,
    last: Option<Box<api::ContainerStats>>,
    /// Why the last question has no answer.
    failure: Option<Failure>,
}

impl Figures {
    /// Whether the caller is to ask.
    pub(crate) fn begin(&self) -> bool {
        self.0.send_if_modified(|state| {
            let begins = state.due.is_none();
            let now = Instant::now();
            state
                .due
                .get_or_insert_with(|| now.checked_add(LIMIT).unwrap_or(now));
            begins
        })
    }

    fn end(&self, answer: Result<api::ContainerStats, SandboxError>) {
        self.0.send_modify(|state| {
            state.due = None;
            match answer {
                Ok(stats) => (state.last, state.failure) = (Some(Box::new(stats)), None),
                Err(error) => state.failure = Some(Failure::from(&error)),
            }
        });
    }
}

/// Answers with the guest's figures, or with those that it gave last; without any to be had of it, the host's count.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    container: ContainerId,
    figures: Option<Arc<Figures>>,
    reply: Reply<TaskStats>,
) {
    let stands_for_the_pod = figures.is_none() || container.as_str() == shared.id.as_str();
    let (cgroup, interfaces) = tokio::join!(
        async {
            match &figures {
                Some(figures) => {
                    let mut state = figures.0.subscribe();
                    let due = state.borrow().due;
                    let due = due.filter(|due| *due > Instant::now() && !shared.silence.lasts());
                    if let Some(due) = due {
                        let answered = state.wait_for(|state| state.due.is_none());
                        if timeout_at(due, answered).await.is_err() {
                            shared.silence.set(true);
                        }
                    }
                    // In time or not: what there is now is the answer.
                    latest(figures, &container)
                }
                None => Ok(CgroupStats::Host),
            }
        },
        async {
            if !stands_for_the_pod {
                return Vec::new();
            }
            let host = Arc::clone(&shared.host);
            let read = timeout(LIMIT, vm::blocking(move || host.interfaces())).await;
            read.ok().and_then(Result::ok).unwrap_or_default()
        }
    );
    // The caller may have gone away.
    drop(reply.send(cgroup.map(|cgroup| TaskStats { cgroup, interfaces })));
}

/// Asks the guest; [`Figures::begin`] says when.
pub(crate) async fn ask(shared: Arc<Shared>, container: ContainerId, figures: Arc<Figures>) {
    let answer = async {
        let guest = vm::ready(shared.vm.subscribe()).await?;
        let stats = guest.agent.stats(&container_ref(&container)).await;
        if !matches!(stats, Err(AgentError::Timeout { .. })) {
            shared.silence.set(false);
        }
        stats.map_err(|error| convert::agent(format!("measure container {container}"), error))
    }
    .await;
    figures.end(answer);
}

fn latest(figures: &Figures, container: &ContainerId) -> Result<CgroupStats, SandboxError> {
    let state = figures.0.borrow();
    match (&state.last, &state.failure) {
        (Some(last), _) => Ok(CgroupStats::Guest(last.clone())),
        (None, Some(failure)) => Err(failure.to_error()),
        (None, None) => Err(SandboxError::new(
            SandboxErrorKind::DeadlineExceeded,
            format!(
                "container {container}: the guest does not say what it uses, and has not before"
            ),
        )),
    }
}
