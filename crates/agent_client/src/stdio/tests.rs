// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Streams against the fake agent and real FIFOs.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_proto::{StreamKind, api};
use rustix::event::{PollFd, PollFlags};
use tempfile::TempDir;

use super::{HostStdio, StdioError, StdioPaths, Streams, TerminalSize};
use crate::tests::{Fixture, ToVm, container, create, fixture, key};
use crate::{AgentEvent, EventReader};

struct Fifos {
    dir: TempDir,
}

impl Fifos {
    fn new(names: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        for name in names {
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join(name), mode).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

/// Reads a FIFO to its end, on a thread of its own. Open when this returns, as containerd has it before a Create.
fn reader(path: &Path) -> std::thread::JoinHandle<Vec<u8>> {
    let mut fifo = open_reader(path);
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            // Says nothing until a first writer has come.
            let mut fds = [PollFd::new(&fifo, PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            match fifo.read(&mut buffer) {
                Ok(0) => return bytes,
                Ok(len) => bytes.extend_from_slice(&buffer[..len]),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    })
}

fn open_reader(path: &Path) -> std::fs::File {
    std::fs::File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .unwrap()
}

/// Makes, connects and starts a container, and passes its events on to its streams.
async fn run(fixture: &Fixture, args: &str, paths: &StdioPaths) -> Arc<Streams> {
    let host = HostStdio::open(paths).unwrap();
    let streams = host.streams();
    create(fixture, args, host.wanted(TerminalSize::default())).await;
    let connector = ToVm(Arc::clone(&fixture.vm));
    host.connect(&key(), &connector, &fixture.client)
        .await
        .unwrap();
    fixture.client.start_container(&container()).await.unwrap();
    streams.begin_stdin();
    let mut events = EventReader::new(Arc::clone(&fixture.client));
    let passed_on = Arc::clone(&streams);
    tokio::spawn(async move {
        while let Ok(next) = events.next().await {
            for event in next {
                if let AgentEvent::StreamEnded { kind, bytes, .. } = event {
                    passed_on.ended(kind, bytes);
                }
            }
        }
    });
    streams
}

#[tokio::test]
async fn output_arrives_whole_and_the_fifo_ends() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out", "err"]);
    let (out, err) = (reader(&fifos.path("out")), reader(&fifos.path("err")));
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        stderr: fifos.uri("err"),
        ..StdioPaths::default()
    };
    // 8 MiB, written by a process that has ended already: shimtest's FastExitOutput.
    let args = "[\"print\", \"0123456789abcde\\n\", \"524288\"]";
    let streams = run(&fixture, args, &paths).await;
    streams.drained().await;
    let read = tokio::task::spawn_blocking(move || (out.join().unwrap(), err.join().unwrap()));
    let (out, err) = read.await.unwrap();
    assert_eq!(out, b"0123456789abcde\n".repeat(524_288));
    assert_eq!(err, b"");
    assert_eq!(streams.dump()["stdout"]["bytes"], 8 << 20);
}

#[tokio::test]
async fn slow_reader_stops_its_own_stream_only() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out", "err"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        stderr: fifos.uri("err"),
        ..StdioPaths::default()
    };
    // Nobody reads stdout.
    let err = reader(&fifos.path("err"));
    let connector = ToVm(Arc::clone(&fixture.vm));
    let host = HostStdio::open(&paths).unwrap();
    let streams = host.streams();
    let args = "[\"print\", \"0123456789abcdef\", \"524288\"]";
    create(&fixture, args, host.wanted(TerminalSize::default())).await;
    host.connect(&key(), &connector, &fixture.client)
        .await
        .unwrap();
    streams.ended(StreamKind::Stderr, 0);
    let err = tokio::task::spawn_blocking(move || err.join().unwrap());
    assert_eq!(err.await.unwrap(), b"");
    assert_eq!(streams.dump()["stdout"]["done"], false);
    assert_eq!(streams.dump()["stderr"]["done"], true);
}

#[tokio::test]
async fn reader_that_comes_late_or_again_misses_nothing() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let streams = run(&fixture, "[\"print\", \"0123456789\", \"400000\"]", &paths).await;
    // The first reader takes a little and goes away, as containerd does in a restart.
    let path = fifos.path("out");
    let taken = tokio::task::spawn_blocking(move || {
        let mut first = [0; 10];
        std::fs::File::open(&path)
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        let mut rest = Vec::new();
        std::fs::File::open(&path)
            .unwrap()
            .read_to_end(&mut rest)
            .unwrap();
        [first.to_vec(), rest].concat()
    });
    assert_eq!(taken.await.unwrap(), b"0123456789".repeat(400_000));
    streams.drained().await;
}

#[tokio::test]
async fn output_of_an_ended_process_waits_for_its_reader() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    // containerd is away from before the process's start until after its end.
    let streams = run(&fixture, "[\"print\", \"0123456789\", \"1000\"]", &paths).await;
    streams.drained().await;
    let path = fifos.path("out");
    let taken = tokio::task::spawn_blocking(move || reader(&path).join().unwrap());
    assert_eq!(taken.await.unwrap(), b"0123456789".repeat(1000));
    drop(streams);
}

#[tokio::test]
async fn output_that_nobody_reads_goes_with_the_streams() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let streams = run(&fixture, "[\"print\", \"0123456789\", \"1000\"]", &paths).await;
    streams.drained().await;
    drop(streams);
    // No writer is left as soon as the pump has been told.
    let mut fifo = open_reader(&fifos.path("out"));
    let mut rest = Vec::new();
    while let Err(error) = fifo.read_to_end(&mut rest) {
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stdin_is_passed_on_to_its_end() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["in", "out"]);
    let paths = StdioPaths {
        stdin: fifos.uri("in"),
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let out = reader(&fifos.path("out"));
    let streams = run(&fixture, "[\"cat\"]", &paths).await;
    let path = fifos.path("in");
    let write = |text: &'static [u8]| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let mut client = std::fs::File::options().write(true).open(path).unwrap();
            client.write_all(text).unwrap();
        })
    };
    // The first client detaches; stdin goes on with the second.
    write(b"one ").await.unwrap();
    assert_eq!(streams.dump()["stdin"]["held"], true);
    write(b"two").await.unwrap();
    streams.close_stdin();
    streams.drained().await;
    let out = tokio::task::spawn_blocking(move || out.join().unwrap());
    assert_eq!(out.await.unwrap(), b"one two");
    assert!(fixture.script.calls().contains(&"CloseStdin".to_owned()));
}

#[tokio::test]
async fn stdin_that_is_closed_before_the_start_is_empty() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["in", "out"]);
    let paths = StdioPaths {
        stdin: fifos.uri("in"),
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let host = HostStdio::open(&paths).unwrap();
    host.streams().close_stdin();
    drop(host);
    let out = reader(&fifos.path("out"));
    let streams = run(&fixture, "[\"cat\"]", &paths).await;
    streams.close_stdin();
    streams.drained().await;
    let out = tokio::task::spawn_blocking(move || out.join().unwrap());
    assert_eq!(out.await.unwrap(), b"");
}

#[tokio::test]
async fn file_uri_is_appended_to() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&[]);
    std::fs::write(fifos.path("log"), "before ").unwrap();
    let paths = StdioPaths {
        stdout: format!("file://{}", fifos.uri("log")),
        ..StdioPaths::default()
    };
    let streams = run(&fixture, "[\"print\", \"x\", \"100000\"]", &paths).await;
    streams.drained().await;
    let expected = format!("before {}", "x".repeat(100_000));
    assert_eq!(
        std::fs::read_to_string(fifos.path("log")).unwrap(),
        expected
    );
}

#[tokio::test]
async fn cancel_closes_what_nobody_reads() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let streams = run(&fixture, "[\"print\", \"0123456789\", \"100000\"]", &paths).await;
    streams.cancel();
    streams.drained().await;
    // No writer is left, so a reader that does not wait for one finds the end.
    let mut fifo = open_reader(&fifos.path("out"));
    let mut rest = Vec::new();
    fifo.read_to_end(&mut rest).unwrap();
}

#[tokio::test]
async fn death_of_the_vm_ends_the_streams() {
    let fixture = fixture().await;
    let fifos = Fifos::new(&["out"]);
    let paths = StdioPaths {
        stdout: fifos.uri("out"),
        ..StdioPaths::default()
    };
    let streams = run(&fixture, "[\"linger\"]", &paths).await;
    fixture.vm.die(hypervisor::VmExit::Signal(9));
    streams.drained().await;
}

#[test]
fn streams_are_asked_for_as_they_are_named() {
    let fifos = Fifos::new(&["in", "out", "err"]);
    let paths = StdioPaths {
        terminal: true,
        stdin: fifos.uri("in"),
        stdout: fifos.uri("out"),
        stderr: fifos.uri("err"),
    };
    let size = TerminalSize {
        columns: 80,
        rows: 24,
    };
    let wanted = HostStdio::open(&paths).unwrap().wanted(size);
    let expected = api::Stdio {
        terminal: true,
        stdin: true,
        stdout: true,
        stderr: false,
        columns: 80,
        rows: 24,
        ..Default::default()
    };
    assert_eq!(wanted, expected);
    let none = HostStdio::open(&StdioPaths::default()).unwrap();
    assert_eq!(none.wanted(TerminalSize::default()), api::Stdio::default());
}

#[test]
fn what_cannot_be_served_is_refused() {
    let fifos = Fifos::new(&["out"]);
    std::fs::write(fifos.path("plain"), "").unwrap();
    let open = |stdin: &str, stdout: &str| {
        let paths = StdioPaths {
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            ..StdioPaths::default()
        };
        HostStdio::open(&paths).map(|_| ()).unwrap_err()
    };
    assert!(matches!(
        open("", "binary:///bin/logger"),
        StdioError::Scheme { .. }
    ));
    assert!(matches!(open("", "relative"), StdioError::Scheme { .. }));
    assert!(matches!(
        open(&fifos.uri("plain"), ""),
        StdioError::NotFifo { .. }
    ));
    assert!(matches!(
        open("", &fifos.uri("missing/out")),
        StdioError::Open { .. }
    ));
}
