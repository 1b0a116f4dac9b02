// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The times of a pod's life, beside runc's.

use std::time::Instant;

use e2e::{BUSYBOX, RUNTIME, run};

use crate::result::Results;

/// The runtimes that are compared, and what they are called.
pub(crate) const RUNTIMES: [(&str, &str); 2] =
    [("runc", "io.containerd.runc.v2"), ("coffer", RUNTIME)];

/// How many bytes an exec writes to measure its output's throughput.
const STDOUT_BYTES: u32 = 64 << 20;

/// Runs a container to its end and gives the time in ms.
fn timed_run(runtime: &str, id: &str) -> f64 {
    let started = Instant::now();
    run(
        "ctr",
        &["run", "--rm", "--runtime", runtime, BUSYBOX, id, "true"],
    )
    .success();
    started.elapsed().as_secs_f64() * 1e3
}

/// The first container of an image on a node without a cached image or scratch template.
pub(crate) fn first_use(results: &mut Results) {
    let cached = std::path::Path::new("/var/lib/coffer");
    if cached.exists() {
        std::fs::remove_dir_all(cached).unwrap();
    }
    for (name, runtime) in RUNTIMES {
        results.add(
            "first_use",
            name,
            "ms",
            timed_run(runtime, &format!("first-{name}")),
        );
    }
}

/// `ctr run --rm busybox true`, everything cached, the two runtimes in turn.
pub(crate) fn cold_start(results: &mut Results, repetitions: u32) {
    for number in 0..repetitions {
        for (name, runtime) in RUNTIMES {
            results.add(
                "cold_start",
                name,
                "ms",
                timed_run(runtime, &format!("cold-{name}-{number}")),
            );
        }
    }
}

/// A further process in a running container, from call to exit code.
pub(crate) fn exec(results: &mut Results, repetitions: u32) {
    in_turn("exec", repetitions, &["true"], |runtime, ms| {
        results.add("exec", runtime, "ms", ms)
    });
}

/// The output of an exec.
pub(crate) fn stdout(results: &mut Results, repetitions: u32) {
    let bytes = STDOUT_BYTES.to_string();
    in_turn(
        "stdout",
        repetitions,
        &["head", "-c", &bytes, "/dev/zero"],
        |runtime, ms| {
            results.add(
                "stdout",
                runtime,
                "MiB/s",
                f64::from(STDOUT_BYTES >> 20) / (ms / 1e3),
            );
        },
    );
}

/// Times a command in a running container of each runtime, the two in turn.
fn in_turn(
    series: &str,
    repetitions: u32,
    command: &[&str],
    mut add: impl FnMut(&'static str, f64),
) {
    let containers = RUNTIMES.map(|(name, runtime)| {
        let id = format!("{series}-{name}");
        run(
            "ctr",
            &[
                "run",
                "--detach",
                "--runtime",
                runtime,
                BUSYBOX,
                &id,
                "sleep",
                "infinity",
            ],
        )
        .success();
        (name, id)
    });
    for number in 0..repetitions {
        for (name, id) in &containers {
            let exec_id = format!("{series}-{number}");
            let mut arguments = vec!["task", "exec", "--exec-id", &exec_id, id];
            arguments.extend(command);
            let started = Instant::now();
            run("ctr", &arguments).success();
            add(name, started.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (_, id) in &containers {
        run("ctr", &["task", "delete", "--force", id]).success();
        run("ctr", &["container", "delete", id]).success();
    }
}

/// The phases of the starts so far, as the shims have logged them: `phase` and `elapsed_us`.
pub(crate) fn phases(results: &mut Results) {
    let log = std::fs::read_to_string("/run/containerd.log").unwrap_or_default();
    for line in log.lines() {
        let Some(phase) = field(line, "phase") else {
            continue;
        };
        let Some(elapsed) = field(line, "elapsed_us").and_then(|text| text.parse::<f64>().ok())
        else {
            continue;
        };
        results.add(&format!("phase {phase}"), "coffer", "ms", elapsed / 1e3);
    }
}

/// The value of a field in a structured log line, in either form that containerd may have given it.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut from = 0;
    while let Some(at) = line.get(from..)?.find(name) {
        let rest = line
            .get(from + at + name.len()..)?
            .trim_start_matches(['\\', '"']);
        if let Some(value) = rest.strip_prefix(['=', ':']) {
            let value = value.trim_start_matches(['\\', '"', ' ']);
            let end = value
                .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.'))
                .unwrap_or(value.len());
            return value.get(..end);
        }
        from += at + name.len();
    }
    None
}
