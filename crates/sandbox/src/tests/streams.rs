// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Streams and terminals of containers and execs.

use std::io::{Read, Write};
use std::time::Duration;

use driver_fake::Script;
use tokio::time::timeout;

use super::pod::{Known, Pod, exec, init};
use crate::{CreateTask, StdioPaths, TerminalSize};

/// Opens a FIFO whose writer is there already, and reads it to its end.
fn read_to_end(path: String) -> tokio::task::JoinHandle<Vec<u8>> {
    tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    })
}

async fn create_with(pod: &Pod, args: &[&'static str], stdio: StdioPaths) {
    pod.know("web", Known::Guest(args.to_vec(), vec!["layer"]));
    let task = CreateTask {
        stdio,
        ..Pod::task("web")
    };
    pod.sandbox.create(task).await.unwrap();
}

#[tokio::test]
async fn output_of_a_process_that_has_ended_arrives_whole_before_the_delete() {
    let pod = Pod::new(&Script::new());
    let out = pod.fifo("out");
    let stdio = StdioPaths {
        stdout: out.clone(),
        ..StdioPaths::default()
    };
    create_with(&pod, &["print", "0123456789abcdef", "524288"], stdio).await;
    // The sandbox has the FIFO open, so the reader does not wait for it.
    let out = read_to_end(out);
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 0);
    pod.delete(&init("web")).await.unwrap();
    assert_eq!(out.await.unwrap().len(), 8 << 20);
    pod.clean_up(&[]).await;
}

#[tokio::test]
async fn dump_says_whom_a_stream_waits_for() {
    let pod = Pod::new(&Script::new());
    let out = pod.fifo("out");
    let stdio = StdioPaths {
        stdout: out.clone(),
        ..StdioPaths::default()
    };
    create_with(&pod, &["print", "0123456789abcdef", "524288"], stdio).await;
    let stdout = async || {
        let dump = pod.sandbox.dump().await.unwrap();
        dump["processes"][0]["streams"]["stdout"].clone()
    };
    let before = stdout().await;
    assert_eq!(before["waits_for"], "guest", "{before}");
    pod.start(&init("web")).await.unwrap();
    // Nobody reads: the FIFO fills.
    let full = async {
        loop {
            let now = stdout().await;
            if now["waits_for"] == "client" {
                return now;
            }
        }
    };
    let full = timeout(Duration::from_secs(30), full).await.unwrap();
    assert!(full["fifo"]["bytes"].as_u64().unwrap() > 0, "{full}");
    let out = read_to_end(out);
    assert_eq!(pod.wait(&init("web")).await, 0);
    pod.delete(&init("web")).await.unwrap();
    assert_eq!(out.await.unwrap().len(), 8 << 20);
    pod.clean_up(&[]).await;
}

#[tokio::test(start_paused = true)]
async fn exit_does_not_wait_for_output_and_delete_gives_up_on_it() {
    let pod = Pod::new(&Script::new());
    let stdio = StdioPaths {
        stdout: pod.fifo("out"),
        ..StdioPaths::default()
    };
    create_with(&pod, &["linger"], stdio).await;
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 0);
    let begun = tokio::time::Instant::now();
    pod.delete(&init("web")).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 10);
    pod.clean_up(&[]).await;
}

#[tokio::test]
async fn stdin_ends_with_close_io() {
    let pod = Pod::new(&Script::new());
    let (input, out) = (pod.fifo("in"), pod.fifo("out"));
    let stdio = StdioPaths {
        stdin: input.clone(),
        stdout: out.clone(),
        ..StdioPaths::default()
    };
    create_with(&pod, &["cat"], stdio).await;
    let out = read_to_end(out);
    pod.start(&init("web")).await.unwrap();
    let write = tokio::task::spawn_blocking(move || {
        let mut client = std::fs::File::options().write(true).open(input).unwrap();
        client.write_all(b"hello").unwrap();
    });
    write.await.unwrap();
    pod.sandbox.close_stdin(init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 0);
    assert_eq!(out.await.unwrap(), b"hello");
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn stdin_of_an_exec_can_be_closed_before_its_start() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    let cat = exec("web", "cat");
    let mut task = Pod::exec_task(&cat, &["cat"]);
    task.stdio.stdin = pod.fifo("in");
    task.stdio.stdout = pod.fifo("out");
    pod.sandbox.exec(task).await.unwrap();
    pod.sandbox.close_stdin(cat.clone()).await.unwrap();
    pod.start(&cat).await.unwrap();
    assert_eq!(pod.wait(&cat).await, 0);
    pod.delete(&cat).await.unwrap();
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn terminal_size_is_kept_before_the_start_and_set_after_it() {
    let pod = Pod::new(&Script::new());
    let stdio = StdioPaths {
        terminal: true,
        stdout: pod.fifo("out"),
        ..StdioPaths::default()
    };
    create_with(&pod, &["sleep"], stdio).await;
    let size = |columns, rows| TerminalSize { columns, rows };
    pod.sandbox
        .resize_pty(init("web"), size(80, 24))
        .await
        .unwrap();
    assert_eq!(pod.vm().terminal_size("web", ""), Some((80, 24)));
    pod.start(&init("web")).await.unwrap();
    let top = exec("web", "top");
    let mut task = Pod::exec_task(&top, &["sleep"]);
    task.stdio.terminal = true;
    task.stdio.stdout = pod.fifo("exec-out");
    pod.sandbox.exec(task).await.unwrap();
    pod.sandbox
        .resize_pty(top.clone(), size(100, 30))
        .await
        .unwrap();
    pod.start(&top).await.unwrap();
    assert_eq!(pod.vm().terminal_size("web", "top"), Some((100, 30)));
    pod.sandbox
        .resize_pty(top.clone(), size(120, 40))
        .await
        .unwrap();
    assert_eq!(pod.vm().terminal_size("web", "top"), Some((120, 40)));
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn size_without_a_terminal_is_no_error() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    pod.sandbox
        .resize_pty(init("web"), TerminalSize::default())
        .await
        .unwrap();
    assert!(!pod.script.calls().contains(&"ResizePty".to_owned()));
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn stdio_that_cannot_be_opened_fails_the_create() {
    let pod = Pod::new(&Script::new());
    pod.know("web", Known::Guest(vec!["sleep"], vec!["layer"]));
    let mut task = Pod::task("web");
    task.stdio.stdout = "binary:///bin/logger".to_owned();
    let error = pod.sandbox.create(task).await.unwrap_err();
    assert_eq!(error.kind(), crate::SandboxErrorKind::Unimplemented);
    pod.clean_up(&[]).await;
}

#[tokio::test]
async fn container_whose_streams_cannot_be_connected_is_taken_away_again() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    script.refuse_streams(true);
    pod.know("web", Known::Guest(vec!["exit", "0"], vec!["layer"]));
    let mut task = Pod::task("web");
    task.stdio.stdout = pod.fifo("out");
    let error = pod.sandbox.create(task.clone()).await.unwrap_err();
    assert_eq!(error.kind(), crate::SandboxErrorKind::Unavailable);
    assert_eq!(
        error.report(),
        "create container web: connect Stdout to the guest: nobody listens on port 1025"
    );
    assert_eq!(pod.vm().disks(), Vec::<String>::new());
    assert!(script.calls().contains(&"RemoveContainer web".to_owned()));

    script.refuse_streams(false);
    pod.sandbox.create(task).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 0);
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn exec_whose_streams_cannot_be_connected_is_killed() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.refuse_streams(true);
    let top = exec("web", "top");
    let mut task = Pod::exec_task(&top, &["sleep"]);
    task.stdio.stdout = pod.fifo("out");
    pod.sandbox.exec(task).await.unwrap();
    assert!(pod.start(&top).await.is_err());
    script.called("Signal 9").await;
    assert_eq!(pod.wait(&top).await, 255);
    pod.delete(&top).await.unwrap();
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
    assert!(
        !pod.events()
            .iter()
            .any(|event| event.contains("exited web/"))
    );
}
