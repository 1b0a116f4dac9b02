// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The Sandbox service as containerd 2.x calls it with `sandboxer = "shim"`: a pod without a pause container.

use std::path::PathBuf;

use containerd_shim_protos::api as task_api;
use containerd_shim_protos::bootstrap_api::{BootstrapResult, Extension};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use rustix::process::Signal;
use tokio::sync::mpsc::UnboundedReceiver;
use ttrpc::Code;
use ttrpc::asynchronous::Server;
use ttrpc::context::{Context, with_duration};

use crate::support::{Containerd, PATIENCE, Watched, options};

const POD: &str = "pod1";

/// The shim of a pod that is not described yet.
struct Pod {
    containerd: Containerd,
    bundle: PathBuf,
    sandbox: SandboxClient,
    task: TaskClient,
    shim: Watched,
    _server: Server,
    events: UnboundedReceiver<Envelope>,
}

fn patiently() -> Context {
    with_duration(PATIENCE)
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

impl Pod {
    /// Started as containerd 2.3 starts the shim of a sandbox: with bootstrap parameters and no spec.
    async fn new() -> Self {
        let containerd = Containerd::new();
        let (server, events) = containerd.events().await;
        let bundle = containerd.path("bundles").join(POD);
        std::fs::create_dir_all(&bundle).unwrap();
        let mut params = containerd.bootstrap_params(POD);
        let config = containerd.path("config.toml");
        let any = options("runtimeoptions.v1.Options", config.to_str().unwrap());
        params.extensions.push(Extension {
            value: Some(Any::parse_from_bytes(&any).unwrap()).into(),
            ..Extension::default()
        });
        let reply = containerd.start_with(POD, &bundle, &params.write_to_bytes().unwrap());
        assert_eq!(String::from_utf8_lossy(&reply.stderr), "");
        let result = BootstrapResult::parse_from_bytes(&reply.stdout).unwrap();
        assert_eq!(result.version, 3, "one start for all of a pod");
        let client = Client::connect(&result.address).await.unwrap();
        Self {
            shim: Watched::new(containerd.shim(POD)),
            containerd,
            bundle,
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client),
            _server: server,
            events,
        }
    }

    fn describe(&self) -> api::CreateSandboxRequest {
        api::CreateSandboxRequest {
            sandbox_id: POD.to_owned(),
            bundle_path: self.bundle.to_str().unwrap().to_owned(),
            ..Default::default()
        }
    }

    async fn create(&self) -> ttrpc::Result<()> {
        let request = self.describe();
        let created = self.sandbox.create_sandbox(patiently(), &request).await;
        created.map(drop)
    }

    async fn start(&self) -> ttrpc::Result<api::StartSandboxResponse> {
        let request = api::StartSandboxRequest {
            sandbox_id: POD.to_owned(),
            ..Default::default()
        };
        self.sandbox.start_sandbox(patiently(), &request).await
    }

    /// A pod whose guest is up.
    async fn ready() -> Self {
        let pod = Self::new().await;
        pod.create().await.unwrap();
        pod.start().await.unwrap();
        pod
    }

    async fn status(&self, verbose: bool) -> ttrpc::Result<api::SandboxStatusResponse> {
        let request = api::SandboxStatusRequest {
            sandbox_id: POD.to_owned(),
            verbose,
            ..Default::default()
        };
        self.sandbox.sandbox_status(patiently(), &request).await
    }

    async fn ping(&self) -> ttrpc::Result<()> {
        let request = api::PingRequest {
            sandbox_id: POD.to_owned(),
            ..Default::default()
        };
        let pong = self.sandbox.ping_sandbox(patiently(), &request).await;
        pong.map(drop)
    }

    async fn wait(&self) -> ttrpc::Result<api::WaitSandboxResponse> {
        let request = api::WaitSandboxRequest {
            sandbox_id: POD.to_owned(),
            ..Default::default()
        };
        self.sandbox.wait_sandbox(patiently(), &request).await
    }

    async fn stop(&self) -> ttrpc::Result<()> {
        let request = api::StopSandboxRequest {
            sandbox_id: POD.to_owned(),
            timeout_secs: 10,
            ..Default::default()
        };
        let stopped = self.sandbox.stop_sandbox(patiently(), &request).await;
        stopped.map(drop)
    }

    async fn shutdown(&self) -> ttrpc::Result<()> {
        let request = api::ShutdownSandboxRequest {
            sandbox_id: POD.to_owned(),
            ..Default::default()
        };
        let ended = self.sandbox.shutdown_sandbox(patiently(), &request).await;
        ended.map(drop)
    }

    async fn create_member(&self, id: &str, args: &[&str]) -> ttrpc::Result<u32> {
        let bundle = self.containerd.program_bundle(id, args);
        let request = task_api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        Ok(self.task.create(patiently(), &request).await?.pid)
    }

    async fn start_member(&self, id: &str) {
        let request = task_api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.task.start(patiently(), &request).await.unwrap();
    }

    async fn wait_for_member(&self, id: &str) -> u32 {
        let request = task_api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let ended = self.task.wait(patiently(), &request).await;
        ended.unwrap().exit_status
    }

    async fn delete_member(&self, id: &str) {
        let request = task_api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.task.delete(patiently(), &request).await.unwrap();
        // containerd calls it after every Delete.
        let request = task_api::ShutdownRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.task.shutdown(patiently(), &request).await.unwrap();
    }

    /// The shim has ended, and nothing is left.
    fn is_gone(&self) {
        assert!(self.shim.ended_within(PATIENCE));
        assert_eq!(self.containerd.leftovers(), [] as [PathBuf; 0]);
    }
}

#[tokio::test]
async fn sandbox_outlives_its_containers_and_ends_with_its_stop() {
    let mut pod = Pod::new().await;
    pod.create().await.unwrap();
    assert_eq!(pod.status(false).await.unwrap().state, "SANDBOX_NOTREADY");
    let started = pod.start().await.unwrap();
    assert!(started.pid > 0 && started.created_at.seconds > 0);
    let status = pod.status(true).await.unwrap();
    assert_eq!(
        (
            status.state.as_str(),
            status.pid,
            status.sandbox_id.as_str()
        ),
        ("SANDBOX_READY", started.pid, POD)
    );
    assert_eq!(status.created_at, started.created_at);
    assert_eq!(status.info["pid"], status.pid.to_string());
    assert_eq!(status.info["state"], status.state);
    let dump: serde_json::Value = serde_json::from_str(&status.info["dump"]).unwrap();
    assert_eq!(dump["sandbox_id"], POD);
    pod.ping().await.unwrap();

    for id in ["one", "two"] {
        assert!(pod.create_member(id, &["exit", "7"]).await.unwrap() > 0);
        pod.start_member(id).await;
        assert_eq!(pod.wait_for_member(id).await, 7);
        pod.delete_member(id).await;
    }
    assert_eq!(pod.status(false).await.unwrap().state, "SANDBOX_READY");

    let waiting = pod.wait();
    let (ended, stopped) = tokio::join!(waiting, pod.stop());
    stopped.unwrap();
    let ended = ended.unwrap();
    assert_eq!(ended.exit_status, 137);
    let status = pod.status(false).await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert_eq!(status.exited_at, ended.exited_at);
    assert_eq!(code(pod.ping().await).0, Code::UNAVAILABLE);
    pod.stop().await.expect("a second stop");
    assert_eq!(pod.wait().await.unwrap().exit_status, 137, "a late waiter");
    pod.shutdown().await.unwrap();
    pod.is_gone();

    let mut topics = Vec::new();
    while let Ok(event) = pod.events.try_recv() {
        topics.push(event.topic);
    }
    let of_one = ["create", "start", "exit", "delete"].map(|verb| format!("/tasks/{verb}"));
    assert_eq!(
        topics,
        [of_one.clone(), of_one].concat(),
        "a sandbox has no events of a task's"
    );
}

#[tokio::test]
async fn containers_that_run_at_the_stop_end_with_137() {
    let pod = Pod::ready().await;
    pod.create_member("web", &["sleep"]).await.unwrap();
    pod.start_member("web").await;
    pod.stop().await.unwrap();
    assert_eq!(pod.wait_for_member("web").await, 137);
    pod.delete_member("web").await;
    pod.shutdown().await.unwrap();
    pod.is_gone();
}

#[tokio::test]
async fn calls_in_the_wrong_order_say_so() {
    let pod = Pod::new().await;
    let (why, text) = code(pod.start().await);
    assert_eq!(why, Code::FAILED_PRECONDITION);
    assert!(text.contains("call CreateSandbox first"), "{text}");
    assert_eq!(code(pod.status(false).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.wait().await).0, Code::FAILED_PRECONDITION);
    let (why, text) = code(pod.create_member("web", &["sleep"]).await);
    assert_eq!(why, Code::FAILED_PRECONDITION, "{text}");

    pod.create().await.unwrap();
    let mut other = pod.describe();
    other.sandbox_id = "pod2".to_owned();
    for request in [pod.describe(), other] {
        let again = pod.sandbox.create_sandbox(patiently(), &request).await;
        let (why, text) = code(again);
        assert_eq!(why, Code::ALREADY_EXISTS);
        assert!(text.contains("already exists"), "{text}");
    }
    pod.start().await.unwrap();
    assert_eq!(code(pod.start().await).0, Code::FAILED_PRECONDITION);
    let stranger = api::PingRequest {
        sandbox_id: "pod2".to_owned(),
        ..Default::default()
    };
    let answer = pod.sandbox.ping_sandbox(patiently(), &stranger).await;
    assert_eq!(code(answer).0, Code::NOT_FOUND);
    pod.shutdown().await.unwrap();
    pod.is_gone();
}

#[tokio::test]
async fn description_that_is_none_is_refused_and_leaves_the_shim_to_be_shut_down() {
    let pod = Pod::new().await;
    let mut request = pod.describe();
    request.options = Some(Any {
        type_url: "example.v1.Options".to_owned(),
        ..Any::default()
    })
    .into();
    let (why, text) = code(pod.sandbox.create_sandbox(patiently(), &request).await);
    assert_eq!(why, Code::INVALID_ARGUMENT);
    assert!(text.contains("example.v1.Options"), "{text}");
    pod.shutdown().await.unwrap();
    pod.is_gone();
}

#[tokio::test]
async fn platform_is_told_before_there_is_a_sandbox() {
    let pod = Pod::new().await;
    let request = api::PlatformRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let platform = pod.sandbox.platform(patiently(), &request).await.unwrap();
    let platform = platform.platform.unwrap_or_default();
    assert_eq!(
        (platform.os.as_str(), platform.architecture.as_str()),
        ("linux", "amd64")
    );
}

#[tokio::test]
async fn metrics_are_those_of_the_pods_host_processes() {
    let pod = Pod::ready().await;
    let request = api::SandboxMetricsRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let response = pod.sandbox.sandbox_metrics(patiently(), &request).await;
    let metrics = response.unwrap().metrics.unwrap_or_default();
    assert_eq!(metrics.id, POD);
    assert!(metrics.timestamp.seconds > 0);
    let kind = &metrics.data.type_url;
    assert!(
        kind.starts_with("io.containerd.cgroups.v") && kind.ends_with(".Metrics"),
        "{kind}"
    );
}

#[tokio::test]
async fn killed_shim_of_a_sandbox_is_removed_by_delete() {
    let pod = Pod::ready().await;
    pod.shim.signal(Signal::KILL);
    assert!(pod.shim.ended_within(PATIENCE));
    let done = pod.containerd.delete(POD, &pod.bundle);
    assert!(done.status.success(), "{done:?}");
    pod.is_gone();
}

#[tokio::test]
async fn shim_of_a_container_takes_no_sandbox() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let address = crate::support::address(&containerd.start("c1", &bundle));
    let sandbox = SandboxClient::new(Client::connect(&address).await.unwrap());
    let request = api::CreateSandboxRequest {
        sandbox_id: "c1".to_owned(),
        ..Default::default()
    };
    let (why, text) = code(sandbox.create_sandbox(patiently(), &request).await);
    assert_eq!(why, Code::FAILED_PRECONDITION);
    assert!(text.contains("was started for container c1"), "{text}");
}

#[tokio::test]
async fn bundle_with_a_spec_without_a_process_is_a_sandboxs() {
    let containerd = Containerd::new();
    let bundle = containerd.path("bundles").join(POD);
    std::fs::create_dir_all(&bundle).unwrap();
    std::fs::write(bundle.join("config.json"), r#"{"ociVersion":"1.2.0"}"#).unwrap();
    let address = crate::support::address(&containerd.start(POD, &bundle));
    let sandbox = SandboxClient::new(Client::connect(&address).await.unwrap());
    let request = api::CreateSandboxRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let created = sandbox.create_sandbox(patiently(), &request).await;
    created.unwrap();
}
