// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

use std::path::Path;

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use sandbox::Pid;
use tokio::sync::mpsc;
use ttrpc::asynchronous::{Server, TtrpcContext};

use super::*;
use crate::status::status;

const QUICK: Patience = Patience {
    call: Duration::from_secs(5),
    first_retry: Duration::from_millis(1),
    last_retry: Duration::from_millis(5),
};

/// containerd, as far as events go: reports each event's container and topic, and refuses those of "refused".
struct Containerd {
    taken: mpsc::UnboundedSender<(String, String)>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        use containerd_shim_protos::events::task::TaskStart;
        use containerd_shim_protos::protobuf::Message;
        let start = TaskStart::parse_from_bytes(&request.envelope.event.value).unwrap();
        let _test_over = self
            .taken
            .send((start.container_id.clone(), request.envelope.topic.clone()));
        if start.container_id == "refused" {
            return Err(status(Code::INVALID_ARGUMENT, "no"));
        }
        Ok(Empty::new())
    }
}

async fn containerd(path: &Path) -> (Server, mpsc::UnboundedReceiver<(String, String)>) {
    let (taken, events) = mpsc::unbounded_channel();
    let address = format!("unix://{}", path.display());
    let mut server = Server::new()
        .bind(&address)
        .unwrap()
        .register_service(create_events(Arc::new(Containerd { taken })));
    server.start().await.unwrap();
    (server, events)
}

fn publisher(path: &Path) -> Publisher {
    Publisher::spawn("k8s.io".parse().unwrap(), path.to_str().unwrap(), QUICK)
}

fn started(container: &str) -> TaskEvent {
    TaskEvent::Started {
        container: container.parse().unwrap(),
        pid: Pid::of_host_process(1),
    }
}

#[tokio::test]
async fn events_arrive_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    let (_server, mut events) = containerd(&path).await;
    let publisher = publisher(&path);
    for number in 0..100 {
        publisher.publish(started(&format!("c{number}")));
    }
    publisher.flushed().await;
    for number in 0..100 {
        let event = events.recv().await.unwrap();
        assert_eq!(event, (format!("c{number}"), "/tasks/start".to_owned()));
    }
}

#[tokio::test]
async fn containerd_that_is_down_gets_everything_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    let publisher = publisher(&path);
    publisher.publish(started("before"));
    let (mut server, mut events) = containerd(&path).await;
    assert_eq!(events.recv().await.unwrap().0, "before");
    publisher.flushed().await;

    server.shutdown().await.unwrap();
    drop(server);
    std::fs::remove_file(&path).unwrap();
    for container in ["one", "two", "three"] {
        publisher.publish(started(container));
    }
    // Long enough for tries that fail: each takes 5 ms at most.
    assert!(
        timeout(Duration::from_millis(50), publisher.flushed())
            .await
            .is_err()
    );
    let (_server, mut events) = containerd(&path).await;
    publisher.flushed().await;
    for container in ["one", "two", "three"] {
        assert_eq!(events.recv().await.unwrap().0, container);
    }
    assert!(events.try_recv().is_err(), "nothing came twice");
}

#[tokio::test]
async fn refused_event_is_given_up_and_the_next_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    let (_server, mut events) = containerd(&path).await;
    let publisher = publisher(&path);
    publisher.publish(started("refused"));
    publisher.publish(started("next"));
    publisher.flushed().await;
    for _ in 0..=MAX_REFUSALS {
        assert_eq!(events.recv().await.unwrap().0, "refused");
    }
    assert_eq!(events.recv().await.unwrap().0, "next");
}

#[tokio::test]
async fn full_queue_loses_its_oldest_event() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    let publisher = publisher(&path);
    // The task has not run yet: nothing is under way.
    for number in 0..=MAX_QUEUED {
        publisher.publish(started(&format!("c{number}")));
    }
    let (_server, mut events) = containerd(&path).await;
    publisher.flushed().await;
    for number in 1..=MAX_QUEUED {
        assert_eq!(events.recv().await.unwrap().0, format!("c{number}"));
    }
    assert!(events.try_recv().is_err());
}
