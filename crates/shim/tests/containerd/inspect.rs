// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a shim tells the operator.

use std::fs;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use shim_api::api::{ConsoleRequest, DumpRequest, LinesRequest};
use shim_api::service::InspectClient;
use tokio::time::timeout;
use ttrpc::context::{Context, with_duration};

use crate::support::{Containerd, NAMESPACE, PATIENCE, address, eventually};

fn patiently() -> Context {
    with_duration(PATIENCE)
}

/// A container that was made and does not run yet, and both services of its shim.
struct Shim {
    containerd: Containerd,
    task: TaskClient,
    inspect: InspectClient,
}

impl Shim {
    async fn new() -> Self {
        let containerd = Containerd::new();
        let bundle = containerd.plain_bundle("c1");
        address(&containerd.start("c1", &bundle));
        // As an operator's tool finds it.
        let state = containerd.path("state").join(NAMESPACE).join("c1");
        let socket = fs::read_to_string(state.join(shim_api::SOCKET_FILE)).unwrap();
        let client = Client::connect(&format!("unix://{socket}")).await.unwrap();
        let task = TaskClient::new(client.clone());
        let create = CreateTaskRequest {
            id: "c1".to_owned(),
            bundle: bundle.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        task.create(patiently(), &create).await.unwrap();
        Self {
            containerd,
            task,
            inspect: InspectClient::new(client),
        }
    }

    async fn events(&self, from: u64, wait: bool) -> (Vec<serde_json::Value>, u64) {
        let request = lines(from, wait);
        let events = self.inspect.events(patiently(), &request).await.unwrap();
        let parsed = events.lines.iter();
        let parsed = parsed.map(|line| serde_json::from_str(line).unwrap());
        (parsed.collect(), events.next)
    }
}

fn lines(from: u64, wait: bool) -> LinesRequest {
    LinesRequest {
        from,
        wait,
        ..Default::default()
    }
}

#[tokio::test]
async fn dump_and_console_are_answered_beside_the_task_service() {
    let shim = Shim::new().await;
    let request = DumpRequest::new();
    let dump = shim.inspect.dump(patiently(), &request).await.unwrap();
    let dump: serde_json::Value = serde_json::from_str(&dump.json).unwrap();
    assert_eq!(dump["sandbox_id"], "c1");
    assert_eq!(dump["processes"][0]["container_id"], "c1");
    assert_eq!(dump["vm"]["state"], "ready");
    let request = ConsoleRequest::new();
    let console = shim.inspect.console(patiently(), &request).await.unwrap();
    assert_eq!(console.tail, "Linux version 6.12 (fake)\n");
}

#[tokio::test]
async fn log_lines_are_there_though_nobody_reads_the_fifo() {
    let shim = Shim::new().await;
    let request = lines(0, false);
    let log = shim.inspect.logs(patiently(), &request).await.unwrap();
    assert!(
        log.lines.iter().any(|line| line.contains("msg=serving")),
        "{log:?}"
    );
    assert_eq!(u64::try_from(log.lines.len()).unwrap(), log.next);
}

#[tokio::test]
async fn events_are_numbered_waited_for_and_end_with_the_sandbox() {
    let shim = Shim::new().await;
    let (events, next) = shim.events(0, true).await;
    assert_eq!((events.len(), next), (1, 1));
    assert_eq!(events[0]["topic"], "/tasks/create");
    assert_eq!(events[0]["container_id"], "c1");
    assert!(events[0]["timestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(shim.events(1, false).await, (vec![], 1));

    let inspect = shim.inspect.clone();
    let waiting = tokio::spawn(async move { inspect.events(patiently(), &lines(1, true)).await });
    let shutdown = ShutdownRequest {
        id: "c1".to_owned(),
        now: true,
        ..Default::default()
    };
    shim.task.shutdown(patiently(), &shutdown).await.unwrap();
    let answered = timeout(Duration::from_secs(5), waiting).await.unwrap();
    // The end of the sandbox is the exit of its task, if the answer still came through.
    if let Ok(events) = answered.unwrap() {
        let topics = events.lines.join("\n");
        assert!(topics.contains("/tasks/exit"), "{topics}");
    }
    eventually("the sandbox is gone", || {
        shim.containerd.leftovers().is_empty().then_some(())
    });
}
