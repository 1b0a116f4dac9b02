// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `kubectl exec`, `attach` and `cp`: streams through containerd's streaming server.

use k8s_cri::v1;

use super::client::{Running, until};
use super::exec_stream::Stream;
use super::shared::Shared;
use crate::volumes::sh;

static POD: Shared<Running> = Shared::new(|| Running::new("streams"));

fn exec(pod: &Running, script: &str) -> Stream {
    Stream::open(&pod.kubelet.url_of_exec(&pod.main, &sh(script), false))
}

fn exec_on_terminal(pod: &Running, script: &str) -> Stream {
    Stream::open(&pod.kubelet.url_of_exec(&pod.main, &sh(script), true))
}

#[test]
fn exec_streams_stdout_stderr_and_exit_code() {
    let pod = POD.case();
    let ended = exec(&pod, "echo out; echo err >&2; exit 42").finish();
    assert_eq!(
        (ended.text().as_str(), ended.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(ended.code(), 42);
}

#[test]
fn exec_that_succeeds_says_so() {
    let pod = POD.case();
    let ended = exec(&pod, "exit 0").finish();
    assert_eq!(ended.code(), 0);
}

#[test]
fn exec_answers_what_it_is_sent() {
    let pod = POD.case();
    let mut stream = exec(
        &pod,
        "while read line; do echo \"<$line>\"; [ \"$line\" = end ] && exit 3; done",
    );
    for word in ["one", "two words"] {
        stream.write(format!("{word}\n").as_bytes());
        stream.expect(&format!("<{word}>\n"));
    }
    stream.write(b"end\n");
    let ended = stream.finish();
    assert_eq!(ended.text(), "<one>\n<two words>\n<end>\n");
    assert_eq!(ended.code(), 3);
}

#[test]
fn exec_on_a_terminal_has_one_and_follows_its_size() {
    let pod = POD.case();
    let mut stream = exec_on_terminal(
        &pod,
        "tty; while :; do stty size; read -t 1 line && break; done; exit 5",
    );
    stream.expect("/dev/pts/");
    stream.resize(97, 31);
    stream.expect("31 97");
    stream.resize(132, 43);
    stream.expect("43 132");
    stream.write(b"over\n");
    assert_eq!(stream.finish().code(), 5);
}

#[test]
fn interrupt_key_ends_what_runs_on_the_terminal() {
    let pod = POD.case();
    let mut stream = exec_on_terminal(
        &pod,
        "trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.1; done",
    );
    stream.expect("ready");
    stream.write(b"\x03");
    let ended = stream.finish();
    assert!(ended.text().contains("interrupted"), "{ended:?}");
    assert_eq!(ended.code(), 7);
}

#[test]
fn shell_on_a_terminal_echoes_and_ends_with_its_last_code() {
    let pod = POD.case();
    let mut stream = exec_on_terminal(&pod, "PS1='$ ' exec sh -i");
    stream.expect("$ ");
    stream.write(b"echo $((6 * 7))\n");
    let seen = stream.expect("42\r\n");
    assert!(
        seen.contains("echo $((6 * 7))\r\n"),
        "what is typed is shown: {seen:?}"
    );
    stream.write(b"exit 9\n");
    assert_eq!(stream.finish().code(), 9);
}

#[test]
fn megabytes_of_output_arrive_byte_for_byte() {
    let pod = POD.case();
    pod.output("head -c 3000000 /dev/urandom > /random");
    let ended = exec(&pod, "cat /random").finish();
    assert_eq!(ended.stdout.len(), 3_000_000);
    let sum = pod.output("sha256sum < /random");
    assert_eq!(
        Some(digest(&ended.stdout).as_str()),
        sum.split_whitespace().next()
    );
    assert_eq!(ended.code(), 0);
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let sum = Sha256::digest(bytes);
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of every value, with no period that a buffer's size could have.
fn bytes(len: usize) -> Vec<u8> {
    let numbers = (0..len).map(|number| number.wrapping_mul(7919) % 257 % 256);
    numbers
        .map(|number| u8::try_from(number).unwrap())
        .collect()
}

#[test]
fn cp_into_a_container_and_out_of_it_changes_no_byte() {
    let pod = POD.case();
    let dir = crate::volumes::PodDir::new("streams");
    let content = bytes(300_000);
    std::fs::create_dir(dir.path.join("folder")).unwrap();
    std::fs::write(dir.path.join("folder/file"), &content).unwrap();
    let archive = dir.path.join("archive.tar");
    let place = dir.path.to_str().unwrap();
    e2e::run(
        "tar",
        &["-cf", archive.to_str().unwrap(), "-C", place, "folder"],
    )
    .success();
    // As kubectl copies: tar at both ends. Busybox' reads on to the end of its input, which this protocol cannot send.
    let sent = std::fs::read(&archive).unwrap();
    let script = format!("head -c {} | tar -xmf - -C /tmp && echo done", sent.len());
    let mut into = exec(&pod, &script);
    for part in sent.chunks(30_000) {
        into.write(part);
    }
    into.expect("done\n");
    assert_eq!(into.finish().code(), 0);
    let sum = pod.output("sha256sum < /tmp/folder/file");
    assert_eq!(
        Some(digest(&content).as_str()),
        sum.split_whitespace().next()
    );

    let out = exec(&pod, "tar -cf - -C /tmp folder").finish();
    assert_eq!(out.code(), 0);
    std::fs::write(&archive, &out.stdout).unwrap();
    let back = dir.path.join("back");
    std::fs::create_dir(&back).unwrap();
    e2e::run(
        "tar",
        &[
            "-xf",
            archive.to_str().unwrap(),
            "-C",
            back.to_str().unwrap(),
        ],
    )
    .success();
    assert!(
        std::fs::read(back.join("folder/file")).unwrap() == content,
        "the file differs"
    );
}

#[test]
fn attach_shows_what_a_container_says_and_sends_what_is_typed() {
    let pod = POD.case();
    let script = "while read line; do echo \"<$line>\"; echo \"($line)\" >&2; [ \"$line\" = end ] && exit 6; done";
    let id = pod
        .kubelet
        .run_with(&pod.pod, "attached", &sh(script), |config| {
            config.stdin = true
        });
    let mut stream = Stream::open(&pod.kubelet.url_of_attach(&id, false));
    stream.write(b"one\n");
    stream.expect("<one>\n");
    stream.write(b"end\n");
    let ended = stream.finish();
    assert_eq!(
        (ended.text().as_str(), ended.stderr.as_str()),
        ("<one>\n<end>\n", "(one)\n(end)\n")
    );
    assert_eq!(pod.kubelet.exit_code(&id), 6);
    pod.kubelet.logs("attached", 0, "<one>\n<end>\n");
    pod.kubelet.remove(&id);
}

#[test]
fn attach_to_a_terminal_follows_its_size() {
    let pod = POD.case();
    let script = "trap 'stty size' WINCH; echo ready; while :; do read line && break; done; exit 4";
    let id = pod.kubelet.run_with(
        &pod.pod,
        "terminal",
        &sh(script),
        |config: &mut v1::ContainerConfig| {
            config.stdin = true;
            config.tty = true;
        },
    );
    pod.kubelet.logs("terminal", 0, "ready");
    let mut stream = Stream::open(&pod.kubelet.url_of_attach(&id, true));
    stream.resize(111, 22);
    stream.expect("22 111");
    stream.write(b"over\n");
    assert_eq!(pod.kubelet.exit_code(&id), 4);
    stream.finish();
    pod.kubelet.remove(&id);
}

#[test]
fn attach_comes_and_goes_and_loses_nothing() {
    let pod = POD.case();
    let script = "while read line; do echo \"<$line>\"; done; echo unreachable";
    let id = pod
        .kubelet
        .run_with(&pod.pod, "again", &sh(script), |config| config.stdin = true);
    let attach = || Stream::open(&pod.kubelet.url_of_attach(&id, false));
    for word in ["first", "second"] {
        let mut stream = attach();
        stream.write(format!("{word}\n").as_bytes());
        stream.expect(&format!("<{word}>\n"));
        drop(stream);
        let running = v1::ContainerState::ContainerRunning;
        assert_eq!(pod.kubelet.status(&id).state(), running, "after {word}");
    }
    // Two at once see the same output.
    let (mut one, mut two) = (attach(), attach());
    // An attach is there when its output is; the first line of either may come before the other is.
    one.write(b"third\n");
    one.expect("<third>\n");
    two.write(b"fourth\n");
    one.expect("<fourth>\n");
    two.expect("<fourth>\n");
    drop((one, two));
    let all = "<first>\n<second>\n<third>\n<fourth>\n";
    pod.kubelet.logs("again", 0, all);
    assert_eq!(pod.kubelet.log("again", 0, "stdout"), all);
    pod.discard(&id);
}

#[test]
fn input_once_ends_with_the_first_client() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run_with(&pod.pod, "once", &sh("cat; echo over"), |config| {
            config.stdin = true;
            config.stdin_once = true;
        });
    let mut stream = Stream::open(&pod.kubelet.url_of_attach(&id, false));
    stream.write(b"all there is\n");
    stream.expect("all there is");
    drop(stream);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet.logs("once", 0, "all there is\nover\n");
    pod.kubelet.remove(&id);
}

#[test]
fn exec_whose_client_goes_away_leaves_the_container_running() {
    let pod = POD.case();
    let mut stream = exec(&pod, "echo begun; exec cat");
    stream.expect("begun\n");
    drop(stream);
    until("the end of its input ends it", || {
        pod.exec("grep -l ^cat /proc/[0-9]*/cmdline").code != 0
    });
    assert_eq!(pod.exec("exit 2").code, 2);
}
