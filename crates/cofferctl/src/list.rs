// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `list` and `inspect`: which sandboxes are there, and what is in one.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::node::Sandbox;
use crate::output::Table;
use crate::shim::{Dump, Shim};

/// A line of `list`.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    namespace: String,
    sandbox_id: String,
    /// The VM's state; "unreachable" if no shim answers.
    state: String,
    containers: Option<usize>,
    shim_pid: Option<i32>,
    vmm_pid: Option<i32>,
    age_s: Option<u64>,
}

/// One row for each sandbox; the shims are asked beside each other.
pub(crate) async fn rows(sandboxes: Vec<Sandbox>) -> Result<Vec<Row>> {
    let asked: Vec<_> = sandboxes
        .into_iter()
        .map(|sandbox| tokio::spawn(row(sandbox)))
        .collect();
    let mut rows = Vec::new();
    for row in asked {
        rows.push(row.await.context("ask a shim")?);
    }
    Ok(rows)
}

async fn row(sandbox: Sandbox) -> Row {
    let dump = async { Shim::connect(&sandbox).await?.state().await }.await;
    let (state, containers) = match dump {
        Ok(dump) => {
            let inits = dump.processes.iter();
            let inits = inits.filter(|process| process.exec_id.is_none()).count();
            (dump.vm.state, Some(inits))
        }
        Err(_) => ("unreachable".to_owned(), None),
    };
    Row {
        state,
        containers,
        shim_pid: sandbox.shim_pid(),
        vmm_pid: sandbox.vmm_pid(),
        age_s: sandbox.age().map(|age| age.as_secs()),
        namespace: sandbox.namespace,
        sandbox_id: sandbox.id,
    }
}

/// The rows for people.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SANDBOX",
        "STATE",
        "CONTAINERS",
        "SHIM",
        "VMM",
        "AGE",
    ]);
    for row in rows {
        table.row([
            row.namespace.clone(),
            row.sandbox_id.clone(),
            row.state.clone(),
            cell(row.containers),
            cell(row.shim_pid),
            cell(row.vmm_pid),
            row.age_s.map(age).unwrap_or_default(),
        ]);
    }
    table.text()
}

fn cell(number: Option<impl ToString>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

/// A duration in its largest unit.
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// What `inspect` shows of a sandbox: everything that its shim says, and where its processes are.
pub(crate) async fn inspect(sandbox: &Sandbox) -> Result<Value> {
    let mut dump = Shim::connect(sandbox).await?.dump().await?;
    if let Some(fields) = dump.as_object_mut() {
        fields.insert("namespace".to_owned(), sandbox.namespace.clone().into());
        fields.insert("shim_pid".to_owned(), sandbox.shim_pid().into());
        fields.insert("vmm_pid".to_owned(), sandbox.vmm_pid().into());
    }
    Ok(dump)
}

/// The beginning of it for people; the rest is for JSON and YAML.
pub(crate) fn inspect_table(dump: &Value) -> String {
    let mut text = String::new();
    for name in ["namespace", "sandbox_id", "shim_pid", "vmm_pid"] {
        let shown = match dump.get(name) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => "-".to_owned(),
            Some(other) => other.to_string(),
        };
        text.push_str(&format!("{:12}{shown}\n", format!("{name}:")));
    }
    match serde_json::from_value::<Dump>(dump.clone()) {
        Ok(dump) => {
            text.push_str(&format!("{:12}{}", "vm:", dump.vm.state));
            if let Some(reason) = &dump.vm.reason {
                text.push_str(&format!(" ({reason})"));
            }
            text.push_str("\n\n");
            text.push_str(&processes(&dump));
        }
        Err(_) => text.push_str("more: as JSON or YAML\n"),
    }
    text
}

fn processes(dump: &Dump) -> String {
    let mut table = Table::new(&["CONTAINER", "EXEC", "PID", "STATUS", "EXIT"]);
    for process in &dump.processes {
        table.row([
            process.container_id.clone(),
            process.exec_id.clone().unwrap_or_default(),
            process.pid.to_string(),
            process.status.clone(),
            cell(process.exit_status),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn age_is_in_its_largest_unit() {
        for (seconds, expected) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7200, "2h"),
            (172_800, "2d"),
        ] {
            assert_eq!(age(seconds), expected);
        }
    }

    #[test]
    fn inspect_for_people_shows_processes_and_why_a_vm_failed() {
        let dump = json!({
            "namespace": "k8s.io",
            "sandbox_id": "pod1",
            "shim_pid": 7,
            "vmm_pid": null,
            "processes": [
                { "container_id": "c1", "exec_id": null, "pid": 8, "status": "stopped", "exit_status": 137, "more": [] },
            ],
            "vm": { "state": "failed", "reason": "the guest's kernel panicked" },
        });
        let expected = "\
namespace:  k8s.io
sandbox_id: pod1
shim_pid:   7
vmm_pid:    -
vm:         failed (the guest's kernel panicked)

CONTAINER  EXEC  PID  STATUS   EXIT
c1         -     8    stopped  137
";
        assert_eq!(inspect_table(&dump), expected);
    }
}
