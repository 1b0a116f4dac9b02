// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What `kubectl logs` shows: containerd writes it, from what the guest has sent.

use std::fs;

use k8s_cri::v1;

use super::client::{Running, until};
use super::shared::Shared;
use crate::volumes::sh;

/// The longest line that containerd writes in one piece.
const LONGEST: usize = 16 << 10;

static POD: Shared<Running> = Shared::new(|| Running::new("logs-pod"));

/// A line of a log: its time, stream, tag and text.
fn fields(line: &str) -> (&str, &str, &str, &str) {
    let mut fields = line.splitn(4, ' ');
    let mut next = || fields.next().unwrap_or_default();
    (next(), next(), next(), next())
}

#[test]
fn log_line_has_time_stream_tag_and_text() {
    let pod = POD.case();
    let before = run_date();
    pod.script("format", "echo one; echo two words >&2", |_| ());
    until("both lines are there", || {
        pod.kubelet.log("format", 0, "stderr") == "two words\n"
    });
    let log = String::from_utf8(pod.kubelet.raw_log("format", 0)).unwrap();
    for (stream, text) in [("stdout", "one"), ("stderr", "two words")] {
        let line = log.lines().map(fields).find(|line| line.3 == text);
        let (time, of, tag, _) = line.unwrap();
        assert_eq!((of, tag), (stream, "F"));
        // RFC 3339 with nanoseconds, in the node's time.
        let (second, rest) = time.split_once('.').unwrap();
        assert!(second >= before.as_str(), "{time} is before {before}");
        assert!(rest.ends_with('Z') || rest.contains('+'), "{time}");
    }
}

/// The node's time, in seconds, as it is at the beginning of a log's line.
fn run_date() -> String {
    let date = e2e::run("date", &["-u", "+%Y-%m-%dT%H:%M:%S"]).success();
    date.stdout.trim().to_owned()
}

#[test]
fn line_longer_than_16_kib_is_logged_in_parts() {
    let pod = POD.case();
    let length = LONGEST * 2 + 100;
    let script = format!("head -c {length} /dev/zero | tr '\\0' x; echo");
    pod.script("parts", &script, |_| ());
    let log = String::from_utf8(pod.kubelet.raw_log("parts", 0)).unwrap();
    let parts: Vec<_> = log
        .lines()
        .map(fields)
        .filter(|line| line.3.starts_with('x'))
        .collect();
    let tags: Vec<&str> = parts.iter().map(|line| line.2).collect();
    assert_eq!(tags, ["P", "P", "F"]);
    let whole: usize = parts.iter().map(|line| line.3.len()).sum();
    assert_eq!(whole, length);
}

#[test]
fn last_line_without_its_end_is_logged() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run(&pod.pod, "unended", &["printf", "first\\nlast"]);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet.logs("unended", 0, "first\nlast\n");
    pod.kubelet.remove(&id);
}

#[test]
fn lines_of_each_stream_keep_their_order() {
    let pod = POD.case();
    let script = "for i in $(seq 1 300); do echo out $i; echo err $i >&2; done";
    pod.script("order", script, |_| ());
    for stream in ["stdout", "stderr"] {
        let wanted: String = (1..=300)
            .map(|number| format!("{} {number}\n", &stream[3..]))
            .collect();
        until("every line is there", || {
            pod.kubelet.log("order", 0, stream).matches('\n').count() >= 300
        });
        let logged = pod.kubelet.log("order", 0, stream);
        assert!(logged.starts_with(&wanted), "{logged}");
    }
}

#[test]
fn bytes_that_are_no_text_are_logged_as_they_are() {
    let pod = POD.case();
    pod.script("bytes", "printf 'a\\377\\000\\033b\\n'", |_| ());
    let log = pod.kubelet.raw_log("bytes", 0);
    let wanted = b" stdout F a\xff\x00\x1bb\n";
    assert!(
        log.windows(wanted.len()).any(|part| part == wanted),
        "{log:?}"
    );
}

#[test]
fn log_of_a_container_that_says_nothing_is_an_empty_file() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "silent", &["true"]);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    assert_eq!(fs::read(pod.kubelet.log_path("silent", 0)).unwrap(), b"");
    pod.kubelet.remove(&id);
}

#[test]
fn containers_of_a_pod_log_each_to_its_own_file() {
    let pod = POD.case();
    let ids = ["left", "right"].map(|name| {
        let script = format!("for i in 1 2 3; do echo {name} $i; done");
        pod.kubelet.run(&pod.pod, name, &sh(&script))
    });
    for (id, name) in ids.iter().zip(["left", "right"]) {
        assert_eq!(pod.kubelet.exit_code(id), 0);
        let wanted = format!("{name} 1\n{name} 2\n{name} 3\n");
        pod.kubelet.logs(name, 0, &wanted);
        assert_eq!(pod.kubelet.log(name, 0, "stdout"), wanted);
        pod.kubelet.remove(id);
    }
}

#[test]
fn log_of_the_previous_attempt_is_kept_beside_that_of_the_next() {
    let pod = POD.case();
    for attempt in 0..2 {
        let script = format!("echo attempt {attempt}");
        let id = pod.kubelet.create(&pod.pod, "again", attempt, &sh(&script));
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), 0);
        pod.kubelet.remove(&id);
    }
    for attempt in 0..2 {
        let wanted = format!("attempt {attempt}\n");
        pod.kubelet.logs("again", attempt, &wanted);
        assert_eq!(pod.kubelet.log("again", attempt, "stdout"), wanted);
    }
}

#[test]
fn rotated_log_loses_no_line() {
    let pod = POD.case();
    let script = "i=0; while [ ! -e /stop ]; do i=$((i + 1)); echo $i; done; echo last";
    let id = pod.kubelet.run(&pod.pod, "rotated", &sh(script));
    // As kubelet rotates: the file gets another name, and the runtime opens a new one.
    let path = pod.kubelet.log_path("rotated", 0);
    let mut all = String::new();
    for _ in 0..5 {
        until("there is something to rotate", || {
            fs::metadata(&path).is_ok_and(|file| file.len() > 0)
        });
        let old = path.with_extension("log.1");
        fs::rename(&path, &old).unwrap();
        pod.kubelet.reopen_log(&id).unwrap();
        // Nothing is written to the old one once the call has answered.
        all.push_str(&fs::read_to_string(old).unwrap());
    }
    pod.kubelet.exec(&id, &["touch", "/stop"]);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet.logs("rotated", 0, "last\n");
    all.push_str(&fs::read_to_string(path).unwrap());
    let texts: Vec<&str> = all.lines().map(|line| fields(line).3).collect();
    let (last, numbers) = texts.split_last().unwrap();
    assert_eq!(*last, "last");
    let wanted: Vec<String> = (1..=numbers.len())
        .map(|number| number.to_string())
        .collect();
    assert!(
        *numbers == wanted,
        "{} lines, not one after the other",
        numbers.len()
    );
    pod.kubelet.remove(&id);
}

#[test]
fn log_of_a_container_that_has_ended_is_not_opened_anew() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "over", &["true"]);
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    let message = pod
        .kubelet
        .reopen_log(&id)
        .unwrap_err()
        .message()
        .to_owned();
    assert!(message.contains("container is not running"), "{message}");
    pod.kubelet.remove(&id);
}

#[test]
fn log_of_a_terminal_is_one_stream() {
    let pod = POD.case();
    let change = |config: &mut v1::ContainerConfig| config.tty = true;
    pod.script("screen", "echo out; echo err >&2", change);
    let log = pod.kubelet.raw_log("screen", 0);
    let log = String::from_utf8(log).unwrap();
    let lines: Vec<_> = log
        .split('\n')
        .map(fields)
        .map(|line| (line.1, line.3))
        .collect();
    assert_eq!(lines[..2], [("stdout", "out"), ("stdout", "err")]);
}

#[test]
fn container_without_a_log_path_runs_and_writes_none() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run_with(&pod.pod, "pathless", &sh("seq 1 1000; exit 4"), |config| {
            config.log_path.clear();
        });
    assert_eq!(pod.kubelet.exit_code(&id), 4);
    assert!(!pod.kubelet.log_path("pathless", 0).exists());
    pod.kubelet.remove(&id);
}
