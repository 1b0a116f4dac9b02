// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a sandbox looks like from inside, as JSON for people.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::Console;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::error::{SandboxError, SandboxErrorKind};
use crate::input::Reply;
use crate::owner::{Owner, Shared};
use crate::vm::VmState;

/// How long VMM and agent may take to describe themselves.
const LIMIT: Duration = Duration::from_secs(2);

/// What the owner knows by itself.
pub(crate) fn own(owner: &Owner) -> Value {
    let processes: Vec<Value> = owner
        .table
        .processes()
        .map(|(process, view)| {
            let streams = owner
                .io(&process)
                .and_then(|(_, io)| io.streams())
                .map(|streams| streams.dump());
            json!({
                "container_id": process.container.as_str(),
                "exec_id": process.exec.as_ref().map(|exec| exec.as_str()),
                "generation": view.generation.0,
                "pid": view.pid.get(),
                "status": view.status.as_str(),
                "phase": view.phase,
                "exit_status": view.exit.map(|exit| exit.status),
                "streams": streams,
            })
        })
        .collect();
    let requests: Vec<Value> = owner
        .waiting
        .values()
        .map(|(waiting, since)| json!({ "for": waiting.name(), "ms": milliseconds(since.elapsed()) }))
        .collect();
    json!({
        "sandbox_id": owner.shared.id.as_str(),
        "processes": processes,
        "requests_waiting": requests,
        "oom_score_adj": owner.shared.oom_score.adjustment(),
        "stats_overdue": owner.shared.silence.lasts(),
        "exits_held": owner.held_exits.len(),
        "work_under_way": owner.work.len(),
        "closing": owner.closing,
    })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Adds what VMM and agent say, as far as they do, and answers.
pub(crate) async fn answer(shared: Arc<Shared>, mut own: Value, reply: Reply<Value>) {
    let state = shared.vm.borrow().clone();
    let vm = match state {
        VmState::Starting => json!({ "state": "starting" }),
        VmState::Failed(failure) => json!({ "state": "failed", "reason": failure.report() }),
        VmState::Launched(vm) => {
            let vmm = timeout(LIMIT, vm.dump()).await;
            json!({ "state": "launched", "vmm": described(vmm) })
        }
        VmState::Ready(guest) => {
            let calls: Vec<Value> = guest
                .agent
                .pending()
                .into_iter()
                .map(|call| {
                    json!({
                        "method": call.method,
                        "ms": milliseconds(call.age),
                        "deadline_ms": milliseconds(call.deadline),
                    })
                })
                .collect();
            let (vmm, agent) = tokio::join!(
                timeout(LIMIT, guest.vm.dump()),
                timeout(LIMIT, guest.agent.dump())
            );
            json!({
                "state": "ready",
                "vmm": described(vmm),
                "agent": described(agent),
                "calls_pending": calls,
                "live_volumes": guest.live.dump(),
                "host_folders": guest.folders.dump(),
                "forwarded_ports": guest.forwarded.dump(),
                "size": guest.sizing.dump(),
            })
        }
    };
    if let Some(own) = own.as_object_mut() {
        own.insert("vm".to_owned(), vm);
    }
    // The caller may have gone away.
    drop(reply.send(Ok(own)));
}

/// Answers with the guest's console; of a VM that has ended, with the end of it.
pub(crate) async fn console(shared: Arc<Shared>, from: Option<u64>, reply: Reply<Console>) {
    let state = shared.vm.borrow().clone();
    let vm = match state {
        VmState::Starting => Err(SandboxError::new(
            SandboxErrorKind::FailedPrecondition,
            "the VM is not there yet",
        )),
        VmState::Failed(failure) => {
            drop(reply.send(failure.console(from).ok_or_else(|| failure.to_error())));
            return;
        }
        VmState::Launched(vm) => Ok(vm),
        VmState::Ready(guest) => Ok(Arc::clone(&guest.vm)),
    };
    let console = match vm {
        Ok(vm) => timeout(LIMIT, vm.console(from)).await.map_err(|_| {
            SandboxError::new(
                SandboxErrorKind::DeadlineExceeded,
                "the VMM does not answer",
            )
        }),
        Err(error) => Err(error),
    };
    // The caller may have gone away.
    drop(reply.send(console));
}

fn described<E: std::fmt::Display>(
    answer: Result<Result<String, E>, tokio::time::error::Elapsed>,
) -> Value {
    match answer {
        Ok(Ok(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        Ok(Err(error)) => json!({ "error": error.to_string() }),
        Err(_) => json!({ "error": "no answer" }),
    }
}
