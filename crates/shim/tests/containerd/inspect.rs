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
        let address = format!("unix://{socket}");
        // A connection each: a call that comes too late breaks its own connection only.
        let task = TaskClient::new(Client::connect(&address).await.unwrap());
        let inspect = InspectClient::new(Client::connect(&address).await.unwrap());
        let create = CreateTaskRequest {
            id: "c1".to_owned(),
            bundle: bundle.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        task.create(patiently(), &create).await.unwrap();
        Self {
            containerd,
            task,
            inspect,
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

/// The tests of debugging shells; here `args` are programs of the fake guest.
mod shells {
    use containerd_shim_protos::api::{DeleteRequest, KillRequest, StartRequest, StateRequest};
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use shim_api::api::ExecRequest;
    use tokio::io::AsyncReadExt;
    use tokio::net::unix::pipe;
    use ttrpc::Code;

    use super::*;

    const ID: &str = "coffer-shell-1";

    fn shell(args: &[&str]) -> ExecRequest {
        ExecRequest {
            id: ID.to_owned(),
            args: args.iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
        match result {
            Err(ttrpc::Error::RpcStatus(status)) => status.code(),
            other => panic!("{other:?}"),
        }
    }

    impl Shim {
        async fn exec(&self, request: &ExecRequest) -> ttrpc::Result<u32> {
            let response = self.inspect.exec(patiently(), request).await?;
            Ok(response.exit_status)
        }

        /// Starts a shell that goes on, and waits until it runs.
        async fn lasting(&self) -> tokio::task::JoinHandle<ttrpc::Result<u32>> {
            let inspect = self.inspect.clone();
            let shell = tokio::spawn(async move {
                let response = inspect.exec(patiently(), &shell(&["sleep"])).await?;
                Ok(response.exit_status)
            });
            let running = async {
                let begun = |event: &serde_json::Value| {
                    event["container_id"] == ID && event["topic"] == "/tasks/start"
                };
                let (mut events, mut next) = self.events(0, true).await;
                while !events.iter().any(begun) {
                    (events, next) = self.events(next, true).await;
                }
            };
            timeout(PATIENCE, running).await.unwrap();
            shell
        }

        async fn state(&self, id: &str) -> ttrpc::Result<()> {
            let request = StateRequest {
                id: id.to_owned(),
                ..Default::default()
            };
            self.task.state(patiently(), &request).await.map(drop)
        }

        async fn remove_container(&self) {
            let id = || "c1".to_owned();
            let start = StartRequest {
                id: id(),
                ..Default::default()
            };
            self.task.start(patiently(), &start).await.unwrap();
            let kill = KillRequest {
                id: id(),
                signal: 9,
                ..Default::default()
            };
            self.task.kill(patiently(), &kill).await.unwrap();
            let wait = containerd_shim_protos::api::WaitRequest {
                id: id(),
                ..Default::default()
            };
            self.task.wait(patiently(), &wait).await.unwrap();
            let delete = DeleteRequest {
                id: id(),
                ..Default::default()
            };
            self.task.delete(patiently(), &delete).await.unwrap();
        }
    }

    #[tokio::test]
    async fn shell_has_an_exit_status_and_leaves_nothing() {
        let shim = Shim::new().await;
        assert_eq!(shim.exec(&shell(&["exit", "7"])).await.unwrap(), 7);
        assert_eq!(code(shim.state(ID).await), Code::NOT_FOUND);
        assert_eq!(shim.exec(&shell(&["exit", "0"])).await.unwrap(), 0);
        let refused = shim.exec(&shell(&["no such program"])).await;
        assert!(refused.is_err());
        assert_eq!(code(shim.state(ID).await), Code::NOT_FOUND);
    }

    #[tokio::test]
    async fn output_of_a_shell_is_whole_when_the_call_is_answered() {
        let shim = Shim::new().await;
        let path = shim.containerd.path("shell-stdout");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        // Opened before there is a shell, as cofferctl does: what one that nobody reads has written goes with it.
        let mut stdout = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let reader = tokio::spawn(async move {
            let mut output = Vec::new();
            stdout.read_to_end(&mut output).await.unwrap();
            output
        });
        let request = ExecRequest {
            stdout: path.to_str().unwrap().to_owned(),
            ..shell(&["print", "0123456789abcdef", "4096"])
        };
        assert_eq!(shim.exec(&request).await.unwrap(), 0);
        let output = timeout(PATIENCE, reader).await.unwrap().unwrap();
        assert_eq!(output, "0123456789abcdef".repeat(4096).into_bytes());
    }

    #[tokio::test]
    async fn containerd_does_not_hear_of_shells() {
        let shim = Shim::new().await;
        let (_server, mut heard) = shim.containerd.events().await;
        assert_eq!(shim.exec(&shell(&["exit", "0"])).await.unwrap(), 0);
        shim.remove_container().await;
        let mut topics = Vec::new();
        while topics.last().is_none_or(|topic| topic != "/tasks/delete") {
            let envelope = timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
            topics.push(envelope.topic);
        }
        assert_eq!(
            topics,
            [
                "/tasks/create",
                "/tasks/start",
                "/tasks/exit",
                "/tasks/delete"
            ]
        );
        let (all, _) = shim.events(0, false).await;
        assert!(all.iter().any(|event| event["container_id"] == ID));
    }

    #[tokio::test]
    async fn id_of_a_container_or_of_another_shell_is_refused() {
        let shim = Shim::new().await;
        let named = |id: &str| ExecRequest {
            id: id.to_owned(),
            ..shell(&["exit", "0"])
        };
        assert_eq!(code(shim.exec(&named("c1")).await), Code::INVALID_ARGUMENT);
        assert_eq!(code(shim.exec(&named("..")).await), Code::INVALID_ARGUMENT);
        let _lasting = shim.lasting().await;
        assert_eq!(code(shim.exec(&named(ID)).await), Code::ALREADY_EXISTS);
        assert_eq!(shim.exec(&named("coffer-shell-2")).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn shell_ends_with_its_caller() {
        let shim = Shim::new().await;
        let state = shim.containerd.path("state").join(NAMESPACE).join("c1");
        let socket = fs::read_to_string(state.join(shim_api::SOCKET_FILE)).unwrap();
        let other = Client::connect(&format!("unix://{socket}")).await.unwrap();
        let caller = Shim {
            containerd: Containerd::new(),
            task: TaskClient::new(other.clone()),
            inspect: InspectClient::new(other),
        };
        let shell = caller.lasting().await;
        shim.state(ID).await.unwrap();
        shell.abort();
        let _aborted = shell.await;
        drop(caller);
        let gone = async {
            while shim.state(ID).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, gone).await.unwrap();
    }

    #[tokio::test]
    async fn shell_keeps_no_sandbox_alive_and_ends_with_it_alone() {
        let shim = Shim::new().await;
        let shell = shim.lasting().await;
        let shutdown = ShutdownRequest {
            id: "c1".to_owned(),
            ..Default::default()
        };
        shim.task.shutdown(patiently(), &shutdown).await.unwrap();
        shim.state(ID).await.unwrap();
        shim.remove_container().await;
        shim.state(ID).await.unwrap();
        shim.task.shutdown(patiently(), &shutdown).await.unwrap();
        let ended = timeout(PATIENCE, shell).await.unwrap().unwrap();
        assert_eq!(ended.unwrap(), 137);
        eventually("the sandbox is gone", || {
            shim.containerd.leftovers().is_empty().then_some(())
        });
    }
}
