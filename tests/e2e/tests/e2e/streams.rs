// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Output and input of containers: every byte, in order, whoever is slow and whoever ends first.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use e2e::{BUSYBOX, Container, Node, RUNTIME, eventually, spawn};
use sha2::{Digest, Sha256};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let _node = Node::new("stdout_and_stderr_stay_apart");
    let output = Container::run("apart", &sh("echo out; echo err >&2; echo out2"));
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\nout2\n", "err\n")
    );
}

#[test]
fn output_of_200_mb_reaches_a_slow_reader_byte_for_byte() {
    const BYTES: usize = 200_000_000;
    const LINE: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz\n";
    let _node = Node::new("output_of_200_mb_reaches_a_slow_reader_byte_for_byte");
    let script = format!("yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c {BYTES}");
    let arguments = [
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        "flood",
        "sh",
        "-c",
        &script,
    ];
    let mut ctr = spawn("ctr", &arguments);
    let mut stdout = ctr.stdout.take().unwrap();
    // Whatever a read brings, it lies within one run of the repeated line.
    let lines = LINE.repeat((1 << 20) / LINE.len() + 2);
    let (mut total, mut buffer, mut next_pause) = (0, vec![0; 1 << 20], 0);
    loop {
        let read = stdout.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        let phase = total % LINE.len();
        assert!(
            buffer[..read] == lines[phase..phase + read],
            "not the right bytes after {total}"
        );
        total += read;
        if total >= next_pause {
            // The slowness under test, not a wait for anything.
            thread::sleep(Duration::from_millis(100));
            next_pause = total + 16_000_000;
        }
    }
    assert!(ctr.wait().unwrap().success());
    assert_eq!(total, BYTES);
}

#[test]
fn output_written_just_before_the_end_arrives_whole() {
    let _node = Node::new("output_written_just_before_the_end_arrives_whole");
    let output = Container::run(
        "last-words",
        &sh("head -c 8388608 /dev/zero | tr '\\0' x; exit 3"),
    );
    assert_eq!((output.code, output.stdout.len()), (3, 8 << 20));
}

#[test]
fn stdin_is_read_to_its_end() {
    let _node = Node::new("stdin_is_read_to_its_end");
    let input: Vec<u8> = (0..3_000_000_u32)
        .map(|number| number.to_le_bytes()[0] ^ 0x55)
        .collect();
    let output = Container::run_with_input("stdin", BUSYBOX, &[], &["sha256sum"], &input).success();
    assert_eq!(
        output.stdout.split(' ').next().unwrap(),
        hex(&Sha256::digest(&input))
    );
}

#[test]
fn stdin_of_an_exec_is_read_to_its_end() {
    let node = Node::new("stdin_of_an_exec_is_read_to_its_end");
    let container = Container::start("exec-stdin", &["sleep", "infinity"]);
    let mut exec = container.spawn_exec("cat", &["cat"]);
    let mut stdin = exec.stdin.take().unwrap();
    let writer = thread::spawn(move || stdin.write_all(&[b'y'; 1 << 20]));
    let mut text = String::new();
    exec.stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    writer.join().unwrap().unwrap();
    assert!(exec.wait().unwrap().success());
    assert_eq!(text.len(), 1 << 20);

    // And of one that does not read it, the log says whose it was.
    let mut deaf = container.spawn_exec("deaf", &sh("exec < /dev/null; sleep infinity"));
    let mut stdin = deaf.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        // How much of it is taken is not what this is about.
        let _ = stdin.write_all(&[b'y'; 1 << 20]);
    });
    eventually("the log names the exec", || {
        let log = node.log();
        let mut lines = log.lines().filter(|line| line.contains("stdin broke off"));
        let names = |line: &str| {
            line.contains(" container_id=exec-stdin ") && line.contains(" exec_id=deaf ")
        };
        lines.any(names).then_some(())
    });
    container.kill("SIGKILL").success();
    deaf.wait().unwrap();
    writer.join().unwrap();
}

#[test]
fn program_that_ignores_its_stdin_ends_all_the_same() {
    let _node = Node::new("program_that_ignores_its_stdin_ends_all_the_same");
    let output =
        Container::run_with_input("ignores", BUSYBOX, &[], &["echo", "done"], &[0; 1 << 20]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "done\n"));
}

#[test]
fn exit_does_not_wait_for_a_child_that_holds_stdout() {
    let _node = Node::new("exit_does_not_wait_for_a_child_that_holds_stdout");
    let container = Container::start("holder", &["sleep", "infinity"]);
    let mut exec = container.spawn_exec("parent", &sh("sleep 1000 & echo parent; exit 6"));
    // ctr waits for the streams' end as well, so containerd's view of the exec is what counts.
    eventually("the exec is gone from the task's processes", || {
        let listed = e2e::run("ctr", &["task", "ps", "holder"]).stdout;
        (!listed.contains("parent")).then_some(())
    });
    container.kill("SIGKILL").success();
    container.wait_stopped();
    exec.wait().unwrap();
}

#[test]
fn twenty_execs_write_at_once_and_keep_their_output_apart() {
    let _node = Node::new("twenty_execs_write_at_once_and_keep_their_output_apart");
    let container = Container::start("chorus", &["sleep", "infinity"]);
    thread::scope(|scope| {
        for number in 0..20 {
            let container = &container;
            scope.spawn(move || {
                let script =
                    format!("i=0; while [ $i -lt 200 ]; do echo {number}; i=$((i+1)); done");
                let output = container
                    .exec(&format!("voice-{number}"), &sh(&script))
                    .success();
                assert_eq!(output.stdout, format!("{number}\n").repeat(200));
            });
        }
    });
}
