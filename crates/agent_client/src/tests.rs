// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The client against the fake agent.

use std::sync::Arc;
use std::time::Duration;

use agent_proto::{CONTROL_PORT, ProcessKey, api};
use async_trait::async_trait;
use driver_fake::{Boot, FakeDriver, FakeVm, Script, fake_spec};
use hypervisor::{Driver, RunningVm};
use ids::{Generation, VsockPort};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::{
    AgentClient, AgentCode, AgentError, AgentEvent, CallDeadlines, EventReader, StreamConnector,
};

const DEADLINES: CallDeadlines = CallDeadlines {
    hello: Duration::from_secs(5),
    create: Duration::from_secs(5),
    call: Duration::from_secs(5),
};

/// A fake VM with a client to its agent.
pub(crate) struct Fixture {
    pub(crate) script: Script,
    pub(crate) vm: Arc<FakeVm>,
    pub(crate) client: Arc<AgentClient>,
}

pub(crate) struct ToVm(pub(crate) Arc<FakeVm>);

#[async_trait]
impl StreamConnector for ToVm {
    async fn connect(&self, port: VsockPort) -> std::io::Result<UnixStream> {
        self.0.connect(port).await.map_err(std::io::Error::other)
    }
}

async fn launch(script: Script) -> Arc<FakeVm> {
    let driver = FakeDriver::new(script);
    driver
        .launch(fake_spec("pod".parse().unwrap()).unwrap())
        .await
        .unwrap();
    driver.vms().remove(0)
}

async fn handshake(script: Script) -> Result<AgentClient, AgentError> {
    let vm = launch(script).await;
    let (_, stream) = vm.accept().await.unwrap();
    AgentClient::handshake(stream, DEADLINES).await
}

pub(crate) async fn fixture() -> Fixture {
    let script = Script::new();
    let vm = launch(script.clone()).await;
    let (port, stream) = vm.accept().await.unwrap();
    assert_eq!(port, CONTROL_PORT);
    let client = AgentClient::handshake(stream, DEADLINES).await.unwrap();
    Fixture {
        script,
        vm,
        client: Arc::new(client),
    }
}

pub(crate) fn key() -> ProcessKey {
    ProcessKey {
        container: "c".parse().unwrap(),
        exec: None,
        generation: Generation(1),
    }
}

pub(crate) async fn create(fixture: &Fixture, args: &str, stdio: api::Stdio) -> u32 {
    let request = api::CreateContainerRequest {
        container_id: "c".to_owned(),
        generation: 1,
        spec_json: format!("{{\"process\":{{\"args\":{args}}}}}").into_bytes(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    fixture.client.create_container(&request).await.unwrap()
}

pub(crate) fn container() -> api::ContainerRef {
    api::ContainerRef {
        container_id: "c".to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn handshake_tells_of_the_agent() {
    let client = handshake(Script::new()).await.unwrap();
    assert_eq!(client.hello().kernel_release, "6.12.0-fake");
}

#[tokio::test]
async fn agent_of_another_release_is_refused() {
    let result = handshake(Script::new().boot(Boot::WrongVersion)).await;
    assert!(matches!(result, Err(AgentError::Hello(_))));
}

#[tokio::test(start_paused = true)]
async fn silence_after_the_connection_is_bounded() {
    let result = handshake(Script::new().boot(Boot::Mute)).await;
    assert!(matches!(result, Err(AgentError::HelloTimeout(_))));
}

#[tokio::test]
async fn hello_past_its_cap_is_refused_before_it_is_read() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    guest.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let result = AgentClient::handshake(host, DEADLINES).await;
    assert!(matches!(result, Err(AgentError::Hello(_))));
}

#[tokio::test]
async fn end_during_the_hello_is_an_error() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    guest.write_all(&[8, 0]).await.unwrap();
    drop(guest);
    let result = AgentClient::handshake(host, DEADLINES).await;
    assert!(matches!(result, Err(AgentError::HelloRead(_))));
}

#[tokio::test]
async fn refusal_keeps_code_and_words() {
    let fixture = fixture().await;
    fixture
        .script
        .refuse("StartContainer", ttrpc::Code::FAILED_PRECONDITION, "not so");
    let error = fixture.client.start_container(&container()).await;
    let error = error.unwrap_err();
    assert_eq!(error.code(), Some(AgentCode::FailedPrecondition));
    assert_eq!(error.to_string(), "not so");
}

#[tokio::test(start_paused = true)]
async fn call_without_an_answer_ends_at_its_deadline() {
    let fixture = fixture().await;
    fixture.script.hold("StartContainer");
    let error = fixture.client.start_container(&container()).await;
    assert!(matches!(error, Err(AgentError::Timeout { .. })));
    assert!(fixture.client.pending().is_empty());
}

#[tokio::test]
async fn held_call_is_seen_as_pending() {
    let fixture = fixture().await;
    fixture.script.hold("StartContainer");
    let client = Arc::clone(&fixture.client);
    let call = tokio::spawn(async move { client.start_container(&container()).await });
    fixture.script.called("StartContainer c").await;
    let methods: Vec<_> = fixture
        .client
        .pending()
        .iter()
        .map(|call| call.method)
        .collect();
    assert_eq!(methods, ["StartContainer"]);
    fixture.script.release("StartContainer");
    assert_eq!(
        call.await.unwrap().unwrap_err().code(),
        Some(AgentCode::NotFound)
    );
}

#[tokio::test]
async fn death_of_the_vm_breaks_calls_at_once() {
    let fixture = fixture().await;
    fixture.script.die_at("StartContainer");
    let error = fixture.client.start_container(&container()).await;
    assert!(matches!(error, Err(AgentError::Disconnected { .. })));
}

#[tokio::test]
async fn request_past_the_cap_is_not_sent() {
    let fixture = fixture().await;
    let request = api::CreateContainerRequest {
        spec_json: vec![b' '; 5 << 20],
        ..Default::default()
    };
    let error = fixture.client.create_container(&request).await;
    assert!(matches!(error, Err(AgentError::RequestTooLong { .. })));
    assert!(fixture.script.calls().iter().all(|call| call == "Launch"));
}

#[tokio::test]
async fn events_come_in_order() {
    let fixture = fixture().await;
    create(&fixture, "[\"oom\"]", api::Stdio::default()).await;
    fixture.client.start_container(&container()).await.unwrap();
    let mut reader = EventReader::new(Arc::clone(&fixture.client));
    let mut events = Vec::new();
    while events.len() < 2 {
        events.extend(reader.next().await.unwrap());
    }
    assert_eq!(events[0], AgentEvent::OutOfMemory("c".parse().unwrap()));
    let AgentEvent::Exited {
        process, status, ..
    } = &events[1]
    else {
        panic!("{events:?}");
    };
    assert_eq!((process, *status), (&key(), 137));
}

#[tokio::test]
async fn events_that_cannot_be_are_refused() {
    let fixture = fixture().await;
    fixture.vm.tell(api::event::Event::Exited(api::Exited {
        process: Some(api::ProcessRef {
            container_id: "../x".to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }));
    let mut reader = EventReader::new(Arc::clone(&fixture.client));
    assert!(matches!(
        reader.next().await,
        Err(AgentError::Protocol { .. })
    ));
}

#[tokio::test]
async fn more_events_than_the_cap_are_refused() {
    let fixture = fixture().await;
    for _ in 0..=agent_proto::MAX_EVENTS {
        let oom = api::OutOfMemory {
            container_id: "c".to_owned(),
            ..Default::default()
        };
        fixture.vm.tell(api::event::Event::OutOfMemory(oom));
    }
    let mut reader = EventReader::new(Arc::clone(&fixture.client));
    assert!(matches!(
        reader.next().await,
        Err(AgentError::Protocol { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn poll_without_events_is_answered_with_none() {
    let fixture = fixture().await;
    let mut reader = EventReader::new(Arc::clone(&fixture.client));
    assert_eq!(reader.next().await.unwrap(), []);
}

#[tokio::test]
async fn shutdown_ends_with_the_connection() {
    let fixture = fixture().await;
    fixture.client.shutdown().await.unwrap();
    assert_eq!(fixture.vm.wait().await, hypervisor::VmExit::Guest);
}
