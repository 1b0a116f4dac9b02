// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The Task service through a ttrpc client, and the events that containerd gets (containerd docs/runtime-v2.md).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskCreate, TaskExecStarted, TaskExit};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::process::Signal;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::Server;
use ttrpc::context::{Context, with_duration};

use crate::support::{Containerd, NAMESPACE, PATIENCE, Watched, address, client, eventually};

/// A pod under a containerd that takes its events.
struct Pod {
    containerd: Containerd,
    bundle: PathBuf,
    task: TaskClient,
    shim: Watched,
    server: Server,
    events: UnboundedReceiver<Envelope>,
}

fn patiently() -> Context {
    with_duration(PATIENCE)
}

impl Pod {
    /// A container without a pod, whose process is `args`. Its task is not created yet.
    async fn of(args: &[&str]) -> Self {
        let containerd = Containerd::new();
        let (server, events) = containerd.events().await;
        let bundle = containerd.program_bundle("c1", args);
        let address = address(&containerd.start("c1", &bundle));
        let shim = Watched::new(containerd.shim("c1"));
        let task = client(&address).await;
        Self {
            containerd,
            bundle,
            task,
            shim,
            server,
            events,
        }
    }

    async fn create(&self) -> ttrpc::Result<u32> {
        let request = api::CreateTaskRequest {
            id: "c1".to_owned(),
            bundle: self.bundle.to_str().unwrap().to_owned(),
            ..api::CreateTaskRequest::default()
        };
        Ok(self.task.create(patiently(), &request).await?.pid)
    }

    async fn start(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        Ok(self.task.start(patiently(), &request).await?.pid)
    }

    async fn exec(&self, exec: &str, args: &[&str]) -> ttrpc::Result<()> {
        let process =
            serde_json::json!({ "cwd": "/", "args": args, "user": { "uid": 0, "gid": 0 } });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        };
        let request = api::ExecProcessRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.task.exec(patiently(), &request).await.map(drop)
    }

    async fn wait(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let response = self.task.wait(patiently(), &request).await?;
        assert!(response.exited_at.seconds > 0);
        Ok(response.exit_status)
    }

    async fn kill(&self, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            signal,
            ..Default::default()
        };
        self.task.kill(patiently(), &request).await.map(drop)
    }

    async fn delete(&self, exec: &str) -> ttrpc::Result<api::DeleteResponse> {
        let request = api::DeleteRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.task.delete(patiently(), &request).await
    }

    async fn state(&self, exec: &str) -> ttrpc::Result<api::StateResponse> {
        let request = api::StateRequest {
            id: "c1".to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        self.task.state(patiently(), &request).await
    }

    async fn pause(&self) -> ttrpc::Result<()> {
        let request = api::PauseRequest {
            id: "c1".to_owned(),
            ..Default::default()
        };
        self.task.pause(patiently(), &request).await.map(drop)
    }

    async fn resume(&self) -> ttrpc::Result<()> {
        let request = api::ResumeRequest {
            id: "c1".to_owned(),
            ..Default::default()
        };
        self.task.resume(patiently(), &request).await.map(drop)
    }

    async fn stats(&self) -> ttrpc::Result<Any> {
        let request = api::StatsRequest {
            id: "c1".to_owned(),
            ..Default::default()
        };
        let response = self.task.stats(patiently(), &request).await?;
        Ok(response.stats.unwrap_or_default())
    }

    async fn update(&self, type_url: &str, json: &str) -> ttrpc::Result<()> {
        let request = api::UpdateTaskRequest {
            id: "c1".to_owned(),
            resources: Some(resources(type_url, json)).into(),
            ..Default::default()
        };
        self.task.update(patiently(), &request).await.map(drop)
    }

    async fn shutdown(&self, now: bool) {
        let request = api::ShutdownRequest {
            id: "c1".to_owned(),
            now,
            ..Default::default()
        };
        self.task.shutdown(patiently(), &request).await.unwrap();
    }

    /// The topics of the next `count` events.
    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        for _ in 0..count {
            topics.push(self.event().await.topic);
        }
        topics
    }

    async fn event(&mut self) -> Envelope {
        timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event")
            .unwrap()
    }

    fn delete_verb(&self) -> Output {
        self.containerd.delete("c1", &self.bundle)
    }

    /// The shim has ended, and nothing is left.
    fn is_gone(&self) {
        assert!(self.shim.ended_within(PATIENCE));
        assert_eq!(self.containerd.leftovers(), [] as [PathBuf; 0]);
    }
}

/// The type of an update's resources.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

fn resources(type_url: &str, json: &str) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: json.as_bytes().to_vec(),
        ..Any::default()
    }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn first_create_lets_the_keeper_go() {
    let pod = Pod::of(&["sleep"]).await;
    assert_eq!(pod.containerd.processes("c1").len(), 2);
    pod.create().await.unwrap();
    eventually("the shim is alone", || {
        (pod.containerd.processes("c1").len() == 1).then_some(())
    });
}

#[tokio::test]
async fn task_lives_from_create_to_delete_with_its_events_in_order() {
    for status in [0, 1, 77, 137] {
        let mut pod = Pod::of(&["exit", &status.to_string()]).await;
        let pid = pod.create().await.unwrap();
        assert!(pid > 0);
        let state = pod.state("").await.unwrap();
        assert_eq!(
            (state.status(), state.pid, state.id.as_str()),
            (api::Status::CREATED, pid, "c1")
        );
        assert_eq!(state.bundle, pod.bundle.to_str().unwrap());
        assert_eq!(pod.start("").await.unwrap(), pid);
        assert_eq!(pod.wait("").await.unwrap(), status);
        assert_eq!(pod.wait("").await.unwrap(), status, "also later");
        let state = pod.state("").await.unwrap();
        assert_eq!(
            (state.status(), state.exit_status),
            (api::Status::STOPPED, status)
        );
        let deleted = pod.delete("").await.unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (pid, status));
        assert_eq!(code(pod.state("").await), Code::NOT_FOUND);
        assert_eq!(
            pod.topics(4).await,
            [
                "/tasks/create",
                "/tasks/start",
                "/tasks/exit",
                "/tasks/delete"
            ]
        );
        pod.shutdown(false).await;
        pod.is_gone();
    }
}

#[tokio::test]
async fn events_carry_what_containerd_reads() {
    let mut pod = Pod::of(&["exit", "3"]).await;
    let pid = pod.create().await.unwrap();
    pod.start("").await.unwrap();
    let created = pod.event().await;
    assert_eq!(created.namespace, NAMESPACE);
    let created = TaskCreate::parse_from_bytes(&created.event.value).unwrap();
    assert_eq!((created.container_id.as_str(), created.pid), ("c1", pid));
    assert_eq!(created.bundle, pod.bundle.to_str().unwrap());
    pod.event().await;
    let exited = pod.event().await;
    assert_eq!(exited.event.type_url, "containerd.events.TaskExit");
    let exited = TaskExit::parse_from_bytes(&exited.event.value).unwrap();
    assert_eq!(
        (exited.container_id.as_str(), exited.id.as_str()),
        ("c1", "c1")
    );
    assert_eq!((exited.pid, exited.exit_status), (pid, 3));
    assert!(exited.exited_at.seconds > 0);
}

#[tokio::test]
async fn exec_has_a_life_of_its_own_and_init_exits_last() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    let init = pod.start("").await.unwrap();
    pod.exec("e1", &["exit", "7"]).await.unwrap();
    assert_eq!(
        code(pod.exec("e1", &["exit", "7"]).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(pod.kill("e1", 9).await),
        Code::FAILED_PRECONDITION,
        "not started"
    );
    let pid = pod.start("e1").await.unwrap();
    assert_ne!(pid, init, "each process has a number of its own");
    assert_eq!(pod.wait("e1").await.unwrap(), 7);
    assert_eq!(pod.delete("e1").await.unwrap().exit_status, 7);
    pod.exec("e2", &["sleep"]).await.unwrap();
    let second = pod.start("e2").await.unwrap();
    let request = api::PidsRequest {
        id: "c1".to_owned(),
        ..Default::default()
    };
    let pids = pod.task.pids(patiently(), &request).await.unwrap();
    let mut pids: Vec<u32> = pids.processes.iter().map(|process| process.pid).collect();
    pids.sort_unstable();
    let mut expected = [init, second];
    expected.sort_unstable();
    assert_eq!(pids, expected);

    pod.kill("", 15).await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 143);
    assert_eq!(
        pod.topics(5).await,
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit"
        ]
    );
    assert_eq!(
        pod.topics(2).await,
        ["/tasks/exec-added", "/tasks/exec-started"]
    );
    let exec = TaskExit::parse_from_bytes(&pod.event().await.event.value).unwrap();
    assert_eq!((exec.id.as_str(), exec.pid), ("e2", second));
    let last = TaskExit::parse_from_bytes(&pod.event().await.event.value).unwrap();
    assert_eq!((last.id.as_str(), last.exit_status), ("c1", 143));
}

#[tokio::test]
async fn exec_started_event_names_its_number() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    pod.exec("e1", &["sleep"]).await.unwrap();
    let pid = pod.start("e1").await.unwrap();
    pod.topics(3).await;
    let started = TaskExecStarted::parse_from_bytes(&pod.event().await.event.value).unwrap();
    assert_eq!((started.exec_id.as_str(), started.pid), ("e1", pid));
}

#[tokio::test]
async fn oom_is_told_before_the_exit_that_it_causes() {
    let mut pod = Pod::of(&["oom"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 137);
    assert_eq!(
        pod.topics(4).await,
        ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]
    );
}

#[tokio::test]
async fn terminal_and_stdin_calls_are_taken_for_a_process_without_either() {
    let pod = Pod::of(&["sleep"]).await;
    let pid = pod.create().await.unwrap();
    let resize = api::ResizePtyRequest {
        id: "c1".to_owned(),
        width: 80,
        height: 25,
        ..Default::default()
    };
    pod.task.resize_pty(patiently(), &resize).await.unwrap();
    let close = api::CloseIORequest {
        id: "c1".to_owned(),
        stdin: true,
        ..Default::default()
    };
    pod.task.close_io(patiently(), &close).await.unwrap();
    let connect = api::ConnectRequest {
        id: "c1".to_owned(),
        ..Default::default()
    };
    let connected = pod.task.connect(patiently(), &connect).await.unwrap();
    assert_eq!((connected.task_pid, connected.version.as_str()), (pid, "3"));
}

#[tokio::test]
async fn many_waiters_get_the_same_answer() {
    let pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    let waiters: Vec<_> = (0..16)
        .map(|_| {
            let task = pod.task.clone();
            tokio::spawn(async move {
                let request = api::WaitRequest {
                    id: "c1".to_owned(),
                    ..Default::default()
                };
                task.wait(patiently(), &request).await.unwrap().exit_status
            })
        })
        .collect();
    pod.start("").await.unwrap();
    pod.kill("", 9).await.unwrap();
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 137);
    }
}

#[tokio::test]
async fn calls_that_the_state_forbids_say_so() {
    let pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    assert_eq!(code(pod.create().await), Code::ALREADY_EXISTS);
    pod.start("").await.unwrap();
    assert_eq!(code(pod.start("").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.delete("").await), Code::FAILED_PRECONDITION);
    pod.shutdown(false).await;
    assert_eq!(
        pod.state("").await.unwrap().status(),
        api::Status::RUNNING,
        "shutdown with a task does nothing"
    );
    pod.kill("", 9).await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 137);
    assert_eq!(code(pod.kill("", 9).await), Code::NOT_FOUND);
    assert_eq!(code(pod.start("").await), Code::FAILED_PRECONDITION);
    pod.delete("").await.unwrap();
    // A repeat after the caller's timeout is answered like the first, or with NOT_FOUND.
    match pod.delete("").await {
        Ok(again) => assert_eq!(again.exit_status, 137),
        error => assert_eq!(code(error), Code::NOT_FOUND),
    }
}

#[tokio::test]
async fn every_call_about_an_unknown_task_says_so() {
    let pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    for (id, exec) in [("other", ""), ("c1", "other")] {
        let id = || id.to_owned();
        let exec_id = || exec.to_owned();
        let task = &pod.task;
        let state = api::StateRequest {
            id: id(),
            exec_id: exec_id(),
            ..Default::default()
        };
        assert_eq!(code(task.state(patiently(), &state).await), Code::NOT_FOUND);
        let start = api::StartRequest {
            id: id(),
            exec_id: exec_id(),
            ..Default::default()
        };
        assert_eq!(code(task.start(patiently(), &start).await), Code::NOT_FOUND);
        let delete = api::DeleteRequest {
            id: id(),
            exec_id: exec_id(),
            ..Default::default()
        };
        assert_eq!(
            code(task.delete(patiently(), &delete).await),
            Code::NOT_FOUND
        );
        let kill = api::KillRequest {
            id: id(),
            exec_id: exec_id(),
            signal: 9,
            ..Default::default()
        };
        assert_eq!(code(task.kill(patiently(), &kill).await), Code::NOT_FOUND);
        let wait = api::WaitRequest {
            id: id(),
            exec_id: exec_id(),
            ..Default::default()
        };
        assert_eq!(code(task.wait(patiently(), &wait).await), Code::NOT_FOUND);
        let resize = api::ResizePtyRequest {
            id: id(),
            exec_id: exec_id(),
            ..Default::default()
        };
        assert_eq!(
            code(task.resize_pty(patiently(), &resize).await),
            Code::NOT_FOUND
        );
        let close = api::CloseIORequest {
            id: id(),
            exec_id: exec_id(),
            stdin: true,
            ..Default::default()
        };
        assert_eq!(
            code(task.close_io(patiently(), &close).await),
            Code::NOT_FOUND
        );
    }
    let other = || "other".to_owned();
    let pids = api::PidsRequest {
        id: other(),
        ..Default::default()
    };
    assert_eq!(
        code(pod.task.pids(patiently(), &pids).await),
        Code::NOT_FOUND
    );
    let exec = api::ExecProcessRequest {
        id: other(),
        exec_id: "e".to_owned(),
        ..Default::default()
    };
    assert!(matches!(
        code(pod.task.exec(patiently(), &exec).await),
        Code::NOT_FOUND | Code::INVALID_ARGUMENT
    ));
    let connect = api::ConnectRequest {
        id: other(),
        ..Default::default()
    };
    let connected = pod.task.connect(patiently(), &connect).await.unwrap();
    assert_eq!(connected.task_pid, 0);
    let path = api::StateRequest {
        id: "../c1".to_owned(),
        ..Default::default()
    };
    assert_eq!(
        code(pod.task.state(patiently(), &path).await),
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn checkpoints_are_not_there_yet_and_say_so() {
    let pod = Pod::of(&["sleep"]).await;
    let request = api::CheckpointTaskRequest::default();
    match pod.task.checkpoint(patiently(), &request).await {
        Err(ttrpc::Error::RpcStatus(status)) => {
            assert_eq!(status.code(), Code::UNIMPLEMENTED);
            assert_eq!(
                status.message,
                "checkpointing a task is not implemented by the coffer runtime: a microVM's state cannot be saved yet"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn pause_and_resume_show_in_state_and_events() {
    let mut pod = Pod::of(&["sleep"]).await;
    assert_eq!(code(pod.pause().await), Code::NOT_FOUND);
    pod.create().await.unwrap();
    assert_eq!(code(pod.pause().await), Code::FAILED_PRECONDITION);
    pod.start("").await.unwrap();
    assert_eq!(code(pod.resume().await), Code::FAILED_PRECONDITION);
    pod.pause().await.unwrap();
    let state = pod.state("").await.unwrap();
    assert_eq!(state.status(), api::Status::PAUSED);
    assert_eq!(code(pod.pause().await), Code::FAILED_PRECONDITION);
    assert_eq!(
        code(pod.exec("e", &["exit", "0"]).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(pod.delete("").await), Code::FAILED_PRECONDITION);
    pod.resume().await.unwrap();
    let state = pod.state("").await.unwrap();
    assert_eq!(state.status(), api::Status::RUNNING);
    pod.pause().await.unwrap();
    pod.kill("", 9).await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 137);
    pod.delete("").await.unwrap();
    assert_eq!(
        pod.topics(7).await,
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/paused",
            "/tasks/resumed",
            "/tasks/paused",
            "/tasks/exit",
            "/tasks/delete"
        ]
    );
}

#[tokio::test]
async fn metrics_are_of_the_type_that_containerd_reads() {
    let pod = Pod::of(&["sleep"]).await;
    assert_eq!(code(pod.stats().await), Code::NOT_FOUND);
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    let mut last = 0;
    for _ in 0..3 {
        let stats = pod.stats().await.unwrap();
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
        assert!(metrics.cpu.usage_usec > last, "it only grows");
        last = metrics.cpu.usage_usec;
        assert_eq!((metrics.pids.current, metrics.pids.limit), (1, u64::MAX));
    }
}

#[tokio::test]
async fn update_with_a_bandwidth_changes_the_pods_and_needs_no_resources() {
    let pod = Pod::of(&["sleep"]).await;
    let bandwidth = |value: &str| api::UpdateTaskRequest {
        id: "c1".to_owned(),
        annotations: [(
            "kubernetes.io/egress-bandwidth".to_owned(),
            value.to_owned(),
        )]
        .into(),
        ..Default::default()
    };
    let update = async |value| pod.task.update(patiently(), &bandwidth(value)).await;
    assert_eq!(code(update("10M").await), Code::NOT_FOUND);
    pod.create().await.unwrap();
    update("10M").await.unwrap();
    assert_eq!(code(update("fast").await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn update_takes_resources_of_the_oci_spec_and_nothing_else() {
    let pod = Pod::of(&["sleep"]).await;
    let memory = |limit: u64| format!("{{\"memory\":{{\"limit\":{limit}}}}}");
    assert_eq!(
        code(pod.update(RESOURCES, &memory(1 << 20)).await),
        Code::NOT_FOUND
    );
    pod.create().await.unwrap();
    pod.update(RESOURCES, &memory(1 << 20)).await.unwrap();
    pod.start("").await.unwrap();
    pod.update(RESOURCES, &memory(1 << 20)).await.unwrap();
    for (type_url, json, expected) in [
        ("", memory(1), Code::INVALID_ARGUMENT),
        ("containerd.other", memory(1), Code::INVALID_ARGUMENT),
        (RESOURCES, "7".to_owned(), Code::INVALID_ARGUMENT),
        (
            RESOURCES,
            "{\"memory\":{\"disableOOMKiller\":true}}".to_owned(),
            Code::INVALID_ARGUMENT,
        ),
        (RESOURCES, memory(1 << 30), Code::RESOURCE_EXHAUSTED),
    ] {
        let refused = pod.update(type_url, &json).await;
        assert_eq!(code(refused), expected, "{type_url} {json}");
    }
    pod.kill("", 9).await.unwrap();
    pod.wait("").await.unwrap();
    assert_eq!(
        code(pod.update(RESOURCES, "{}").await),
        Code::FAILED_PRECONDITION
    );
}

#[tokio::test]
async fn sandbox_container_has_the_metrics_of_the_pod_on_the_host() {
    let containerd = Containerd::new();
    let (_server, _events) = containerd.events().await;
    let annotations = [("io.kubernetes.cri.container-type", "sandbox")];
    let cgroup = format!("/coffer-metrics-{}", std::process::id());
    let bundle = containerd.bundle("pod1", &annotations, &cgroup);
    let address = address(&containerd.start("pod1", &bundle));
    let task = client(&address).await;
    let create = api::CreateTaskRequest {
        id: "pod1".to_owned(),
        bundle: bundle.to_str().unwrap().to_owned(),
        ..Default::default()
    };
    task.create(patiently(), &create).await.unwrap();
    let request = api::StatsRequest {
        id: "pod1".to_owned(),
        ..Default::default()
    };
    let stats = task.stats(patiently(), &request).await.unwrap().stats;
    // One process, the shim: the fake VM has none.
    let pids = match stats.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = MetricsV1::parse_from_bytes(&stats.value).unwrap();
            assert!(metrics.memory.usage.usage > 0 && metrics.cpu.usage.total > 0);
            metrics.pids.current
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
            assert!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0);
            metrics.pids.current
        }
        other => panic!("{other}"),
    };
    assert!((1..=16).contains(&pids), "threads of one shim, not {pids}");
    let update = api::UpdateTaskRequest {
        id: "pod1".to_owned(),
        resources: Some(resources(RESOURCES, "{}")).into(),
        ..Default::default()
    };
    // It asks for nothing, and what it could ask for is the VM's size: the sandbox container has no cgroup in the guest.
    task.update(patiently(), &update).await.unwrap();
}

#[tokio::test]
async fn version_2_of_the_service_is_the_same() {
    let pod = Pod::of(&["sleep"]).await;
    let pid = pod.create().await.unwrap();
    let address = fs::read_to_string(pod.bundle.join("address")).unwrap();
    let raw = containerd_shim_protos::shim_async::Client::connect(&address)
        .await
        .unwrap();
    let mut request = ttrpc::Request::new();
    request.service = "containerd.task.v2.Task".to_owned();
    request.method = "Connect".to_owned();
    request.payload = api::ConnectRequest {
        id: "c1".to_owned(),
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap();
    let response = raw.request(request).await.unwrap();
    let connected = api::ConnectResponse::parse_from_bytes(&response.payload).unwrap();
    assert_eq!(connected.task_pid, pid);
    assert!(Path::new(&format!("/proc/{}", connected.shim_pid)).exists());
}

#[tokio::test]
async fn task_that_cannot_be_created_leaves_nothing() {
    let pod = Pod::of(&["no such program"]).await;
    let Err(ttrpc::Error::RpcStatus(status)) = pod.create().await else {
        panic!("created")
    };
    assert!(!status.message.is_empty());
    assert_eq!(code(pod.state("").await), Code::NOT_FOUND);
    pod.shutdown(false).await;
    pod.is_gone();
}

#[tokio::test]
async fn shutdown_now_ends_tasks_and_tells() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    pod.shutdown(true).await;
    pod.is_gone();
    assert_eq!(
        pod.topics(3).await,
        ["/tasks/create", "/tasks/start", "/tasks/exit"]
    );
}

#[tokio::test]
async fn signal_reports_the_exit_of_every_task() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    pod.shim.signal(Signal::TERM);
    pod.topics(2).await;
    let exit = TaskExit::parse_from_bytes(&pod.event().await.event.value).unwrap();
    assert_eq!((exit.id.as_str(), exit.exit_status), ("c1", 137));
    pod.is_gone();
}

#[tokio::test]
async fn events_survive_a_restart_of_containerd() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    assert_eq!(pod.topics(1).await, ["/tasks/create"]);
    pod.server.shutdown().await.unwrap();
    let pid = pod.start("").await.unwrap();
    pod.kill("", 9).await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 137);
    pod.delete("").await.unwrap();
    (pod.server, pod.events) = pod.containerd.events().await;
    assert_eq!(
        pod.topics(3).await,
        ["/tasks/start", "/tasks/exit", "/tasks/delete"]
    );
    assert!(pid > 0);
}

#[tokio::test]
async fn killed_shim_with_a_running_task_is_removed_by_delete() {
    let pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    pod.shim.signal(Signal::KILL);
    assert!(pod.shim.ended_within(PATIENCE));
    for _ in 0..2 {
        let said = pod.delete_verb();
        assert!(said.status.success(), "{said:?}");
    }
    pod.is_gone();
}

// containerd takes events while its `delete` runs, so it has a thread of its own.
#[tokio::test(flavor = "multi_thread")]
async fn delete_verb_ends_a_shim_that_still_runs() {
    let mut pod = Pod::of(&["sleep"]).await;
    pod.create().await.unwrap();
    pod.start("").await.unwrap();
    assert_eq!(pod.topics(2).await, ["/tasks/create", "/tasks/start"]);
    let said = pod.delete_verb();
    assert!(said.status.success(), "{said:?}");
    pod.is_gone();
    assert_eq!(pod.topics(1).await, ["/tasks/exit"]);
}
