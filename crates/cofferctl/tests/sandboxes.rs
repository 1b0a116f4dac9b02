// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The program beside shims that answer what these tests say.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use containerd_shim_protos::api::{StatsRequest, StatsResponse};
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, Metrics};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim_async::{Task, create_task};
use serde_json::Value;
use shim_api::api;
use shim_api::service::{Inspect, create_inspect};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::{Duration, timeout};
use ttrpc::asynchronous::{Server, TtrpcContext};

const DUMP: &str = r#"{"sandbox_id":"abc1","processes":[
    {"container_id":"c1","exec_id":null,"pid":10,"status":"running","exit_status":null},
    {"container_id":"c1","exec_id":"e1","pid":11,"status":"stopped","exit_status":3},
    {"container_id":"c2","exec_id":null,"pid":12,"status":"created","exit_status":null}],
    "vm":{"state":"ready","vmm":{"vcpus":2}}}"#;

const EVENTS: [&str; 2] = [
    r#"{"timestamp":"2026-01-02T03:04:05Z","topic":"/tasks/create","container_id":"c1","pid":10}"#,
    r#"{"timestamp":"2026-01-02T03:04:06Z","topic":"/tasks/start","container_id":"c1","pid":10}"#,
];

/// A shim whose sandbox has ended once somebody has waited for its third event.
#[derive(Default)]
struct FakeShim {
    /// Somebody has seen all of the console.
    console_seen: AtomicBool,
}

#[async_trait]
impl Inspect for FakeShim {
    async fn dump(
        &self,
        _: &TtrpcContext,
        _: api::DumpRequest,
    ) -> ttrpc::Result<api::DumpResponse> {
        Ok(api::DumpResponse {
            json: DUMP.to_owned(),
            ..Default::default()
        })
    }

    async fn console(
        &self,
        _: &TtrpcContext,
        request: api::ConsoleRequest,
    ) -> ttrpc::Result<api::ConsoleResponse> {
        let (from, next, text) = match request.from {
            Some(0) => (5, 12, "kernel\n"),
            Some(12) => (12, 15, "up\n"),
            Some(15) if !self.console_seen.swap(true, Ordering::SeqCst) => (15, 15, ""),
            _ => return Err(ttrpc::Error::Others("the sandbox has ended".to_owned())),
        };
        Ok(api::ConsoleResponse {
            text: text.to_owned(),
            from,
            next,
            ..Default::default()
        })
    }

    async fn logs(
        &self,
        _: &TtrpcContext,
        _: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        Ok(api::LinesResponse {
            lines: vec!["level=info msg=serving".to_owned()],
            next: 5,
            ..Default::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: api::LinesRequest,
    ) -> ttrpc::Result<api::LinesResponse> {
        let kept = match (request.from, request.wait) {
            (0, false) => &EVENTS[..1],
            (1, true) => &EVENTS[1..],
            _ => return Err(ttrpc::Error::Others("the sandbox has ended".to_owned())),
        };
        Ok(api::LinesResponse {
            lines: kept.iter().map(|line| (*line).to_owned()).collect(),
            next: request.from + 1,
            ..Default::default()
        })
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecRequest,
    ) -> ttrpc::Result<api::ExecResponse> {
        if request.args.first().is_some_and(|first| first == "/bin/sh") {
            let refusal = ttrpc::get_status(ttrpc::Code::PERMISSION_DENIED, "set debug.rootfs");
            return Err(ttrpc::Error::RpcStatus(refusal));
        }
        assert!(request.id.starts_with(shim_api::SHELL_PREFIX));
        assert!(request.terminal.is_none(), "a test has none");
        let copied = tokio::task::spawn_blocking(move || copy_shell(&request));
        Ok(api::ExecResponse {
            exit_status: copied.await.unwrap(),
            ..Default::default()
        })
    }
}

/// A shell that copies its stdin to stdout, complains, and ends with 5.
fn copy_shell(request: &api::ExecRequest) -> u32 {
    // As a shim opens them: outputs also for reading.
    let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
    let (mut out, mut err) = (open(&request.stdout), open(&request.stderr));
    let mut input = Vec::new();
    File::open(&request.stdin)
        .unwrap()
        .read_to_end(&mut input)
        .unwrap();
    out.write_all(&input).unwrap();
    err.write_all(request.args.join(" ").as_bytes()).unwrap();
    5
}

#[async_trait]
impl Task for FakeShim {
    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        if request.id != "c1" {
            let refusal = ttrpc::get_status(ttrpc::Code::UNAVAILABLE, "the guest is silent");
            return Err(ttrpc::Error::RpcStatus(refusal));
        }
        let metrics = Metrics {
            cpu: MessageField::some(CPUStat {
                usage_usec: 1_500_000,
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: "io.containerd.cgroups.v2.Metrics".to_owned(),
                value: metrics.write_to_bytes().unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

/// A node with a sandbox `abc1` whose shim answers, and one `dead` whose shim was killed.
async fn node(root: &Path) -> Server {
    let socket = root.join("shim.sock");
    for (id, socket) in [("abc1", &socket), ("dead", &root.join("gone.sock"))] {
        let dir = root.join("state/k8s.io").join(id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("socket"), socket.to_str().unwrap()).unwrap();
        fs::write(dir.join("shim.json"), r#"{"pid":7,"start_time":8}"#).unwrap();
    }
    let shim = Arc::new(FakeShim::default());
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))
        .unwrap()
        .register_service(create_inspect(shim.clone()))
        .register_service(create_task(shim));
    server.start().await.unwrap();
    server
}

fn command(root: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferctl"));
    command
        .arg("--state-dir")
        .arg(root.join("state"))
        .args(words)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn cofferctl(root: &Path, words: &[&str]) -> Output {
    let run = command(root, words).output();
    timeout(Duration::from_secs(60), run)
        .await
        .unwrap()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn list_shows_the_living_and_the_dead() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let output = cofferctl(dir.path(), &["list", "-o", "json"]).await;
    let rows = json(&output);
    let row = |at: usize, key: &str| rows.get(at).unwrap().get(key).unwrap().clone();
    assert_eq!(
        (row(0, "sandbox_id"), row(0, "state")),
        ("abc1".into(), "ready".into())
    );
    assert_eq!(
        (row(0, "containers"), row(0, "shim_pid")),
        (2.into(), 7.into())
    );
    assert_eq!(row(0, "vmm_pid"), Value::Null);
    assert_eq!(
        (row(1, "sandbox_id"), row(1, "state")),
        ("dead".into(), "unreachable".into())
    );
    let table = stdout(&cofferctl(dir.path(), &["list"]).await);
    assert!(table.starts_with("NAMESPACE  SANDBOX  STATE "), "{table}");
    let other = stdout(&cofferctl(dir.path(), &["list", "-n", "default"]).await);
    assert_eq!(other.lines().count(), 1, "{other}");
}

#[tokio::test]
async fn inspect_takes_the_beginning_of_an_id_and_has_all_in_yaml() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let table = stdout(&cofferctl(dir.path(), &["inspect", "ab"]).await);
    assert!(
        table.contains("c1         e1    11   stopped  3"),
        "{table}"
    );
    let yaml = stdout(&cofferctl(dir.path(), &["inspect", "ab", "-o", "yaml"]).await);
    assert!(
        yaml.contains("vm:\n  state: ready\n  vmm:\n    vcpus: 2\n"),
        "{yaml}"
    );
    let unknown = cofferctl(dir.path(), &["inspect", "zz"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(stderr(&unknown).contains("no sandbox \"zz\""));
    let dead = cofferctl(dir.path(), &["inspect", "dead"]).await;
    assert_eq!(dead.status.code(), Some(1));
    assert!(
        stderr(&dead).contains("its shim does not serve"),
        "{dead:?}"
    );
}

#[tokio::test]
async fn console_is_shown_as_far_as_it_is_kept_and_followed_to_the_end_of_the_sandbox() {
    for arguments in [&["console", "abc1"][..], &["console", "-f", "abc1"]] {
        let dir = tempfile::tempdir().unwrap();
        let _server = node(dir.path()).await;
        let output = cofferctl(dir.path(), arguments).await;
        assert!(output.status.success(), "{output:?}");
        assert_eq!(stdout(&output), "kernel\nup\n");
        assert_eq!(stderr(&output), "(5 older bytes are not kept)\n");
    }
}

#[tokio::test]
async fn logs_say_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let output = cofferctl(dir.path(), &["logs", "abc1"]).await;
    assert_eq!(stdout(&output), "level=info msg=serving\n");
    assert_eq!(stderr(&output), "(4 older lines are not kept)\n");
}

#[tokio::test]
async fn events_are_followed_to_the_end_of_the_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let now = stdout(&cofferctl(dir.path(), &["events", "abc1"]).await);
    assert_eq!(now.lines().count(), 1, "{now}");
    let output = cofferctl(dir.path(), &["events", "-f", "-o", "json", "abc1"]).await;
    assert!(output.status.success(), "{output:?}");
    let text = stdout(&output);
    let topics: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|event| event.get("topic").unwrap().clone())
        .collect();
    assert_eq!(topics, ["/tasks/create", "/tasks/start"]);
}

#[tokio::test]
async fn shell_has_the_callers_streams_and_its_exit_code_is_the_callers() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let mut child = command(dir.path(), &["exec", "abc1", "tool", "-x", "--", "y"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input = "0123456789abcdef".repeat(40_000);
    let mut stdin = child.stdin.take().unwrap();
    let bytes = input.clone().into_bytes();
    let writer = tokio::spawn(async move { stdin.write_all(&bytes).await });
    let output = timeout(Duration::from_secs(60), child.wait_with_output());
    let output = output.await.unwrap().unwrap();
    writer.await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(stdout(&output), input);
    assert_eq!(stderr(&output), "tool -x -- y");
}

#[tokio::test]
async fn shell_that_is_not_allowed_is_refused_in_the_shims_words() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let output = cofferctl(dir.path(), &["exec", "abc1"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "cofferctl: run the shell: set debug.rootfs\n"
    );
}

#[tokio::test]
async fn stats_show_what_is_measured_and_tell_what_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    let output = cofferctl(dir.path(), &["stats", "abc1", "-o", "json"]).await;
    assert_eq!(output.status.code(), Some(1), "one could not be measured");
    let figures = json(&output);
    let first = figures.get(0).unwrap();
    assert_eq!(first.get("cpu_usage_us").unwrap(), 1_500_000);
    assert_eq!(figures.as_array().unwrap().len(), 1);
    assert_eq!(stderr(&output), "measure c2: the guest is silent\n");
}

#[tokio::test]
async fn node_without_sandboxes_has_empty_lists() {
    let dir = tempfile::tempdir().unwrap();
    let list = cofferctl(dir.path(), &["list"]).await;
    assert_eq!(list.status.code(), Some(0));
    assert_eq!(stdout(&list).lines().count(), 1, "the headings");
    for words in [["list", "-o", "json"], ["stats", "-o", "json"]] {
        assert_eq!(stdout(&cofferctl(dir.path(), &words).await), "[]\n");
    }
    let inspect = cofferctl(dir.path(), &["inspect", "abc"]).await;
    assert_eq!(inspect.status.code(), Some(1));
    assert!(stderr(&inspect).contains("cofferctl list"), "{inspect:?}");
}

#[tokio::test]
async fn reader_that_goes_away_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let _server = node(dir.path()).await;
    for words in [
        &["list"][..],
        &["config", "--default"],
        &["logs", "abc1"],
        &["events", "-f", "abc1"],
        &["console", "-f", "abc1"],
        &["completions", "bash"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = command(dir.path(), words)
            .stdout(writer)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let status = timeout(Duration::from_secs(60), child.wait()).await;
        assert_eq!(status.unwrap().unwrap().code(), Some(0), "{words:?}");
    }
}

#[tokio::test]
async fn config_is_printed_as_a_config_file_and_a_wrong_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    fs::write(&file, "[guest]\ndefault_vcpus = 2\n").unwrap();
    let config = file.to_str().unwrap();
    let output = cofferctl(dir.path(), &["config", "--config", config]).await;
    assert!(
        stdout(&output).contains(&format!("default_vcpus = 2 # {config}\n")),
        "{output:?}"
    );
    fs::write(&file, stdout(&output)).unwrap();
    let again = cofferctl(dir.path(), &["config", "--config", config]).await;
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    fs::write(&file, "[guest]\ndefault_vcpu = 2\n").unwrap();
    let output = cofferctl(dir.path(), &["config", "--config", config]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("did you mean guest.default_vcpus?"),
        "{output:?}"
    );
}

#[tokio::test]
async fn completions_and_man_pages_have_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let verbs = [
        "check", "config", "list", "inspect", "console", "logs", "events", "stats", "exec",
    ];
    for shell in ["bash", "zsh", "fish"] {
        let text = stdout(&cofferctl(dir.path(), &["completions", shell]).await);
        for verb in verbs {
            assert!(text.contains(verb), "{shell} {verb}");
        }
    }
    let output = cofferctl(dir.path(), &["man", dir.path().to_str().unwrap()]).await;
    assert!(output.status.success(), "{output:?}");
    for verb in verbs {
        let page = dir.path().join(format!("cofferctl-{verb}.1"));
        assert!(
            fs::read_to_string(page).unwrap().starts_with(".ie"),
            "{verb}"
        );
    }
}
