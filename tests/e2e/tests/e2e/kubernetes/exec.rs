// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Probes and hooks by exec, and what else runs beside a container's own process.

use std::thread;
use std::time::Duration;

use k8s_cri::v1;

use super::client::{Running, security, until};
use super::shared::Shared;
use crate::volumes::{IDLE, sh};

static POD: Shared<Running> = Shared::new(|| {
    Running::with(
        "exec-pod",
        |_| (),
        |config| {
            config.working_dir = "/work".to_owned();
            config.envs = vec![v1::KeyValue {
                key: "GIVEN".to_owned(),
                value: "by the spec".to_owned(),
            }];
        },
    )
});

#[test]
fn readiness_probe_follows_the_file_that_it_looks_for() {
    let pod = POD.case();
    let probe = || pod.kubelet.exec(&pod.main, &["test", "-e", "/ready"]).code;
    assert_eq!(probe(), 1);
    pod.output("touch /ready");
    assert_eq!(probe(), 0);
    pod.output("rm /ready");
    assert_eq!(probe(), 1);
}

#[test]
fn probe_that_takes_longer_than_its_timeout_fails_and_is_killed() {
    let pod = POD.case();
    let timeout = Duration::from_secs(2);
    let error = pod
        .kubelet
        .exec_within(&pod.main, &["sleep", "4242"], timeout);
    let message = error.unwrap_err().message().to_owned();
    assert!(message.contains("timeout 2s exceeded"), "{message}");
    let listed = pod.output("cat /proc/*/cmdline | tr '\\0' ' '");
    assert!(!listed.contains("sleep 4242"), "{listed}");
}

#[test]
fn probe_of_a_missing_command_is_an_error_that_names_it() {
    let pod = POD.case();
    let probe = ["/no/such/probe"];
    let error = pod.kubelet.exec_within(&pod.main, &probe, Duration::ZERO);
    let message = error.unwrap_err().message().to_owned();
    assert!(message.contains("/no/such/probe"), "{message}");
    assert_eq!(pod.exec("exit 9").code, 9, "the container is as it was");
}

#[test]
fn probe_of_a_file_that_is_no_program_is_an_error_that_says_so() {
    let pod = POD.case();
    let probe = ["/etc/passwd"];
    let error = pod.kubelet.exec_within(&pod.main, &probe, Duration::ZERO);
    let message = error.unwrap_err().message().to_lowercase();
    assert!(message.contains("permission denied"), "{message}");
}

#[test]
fn exec_that_is_killed_has_128_plus_the_signal() {
    let pod = POD.case();
    assert_eq!(pod.exec("kill -KILL $$").code, 137);
    assert_eq!(pod.exec("kill -TERM $$").code, 143);
    assert_eq!(pod.exec("exit 255").code, 255);
}

#[test]
fn exec_has_environment_and_directory_of_the_container() {
    let pod = POD.case();
    assert_eq!(pod.output("echo $GIVEN; pwd"), "by the spec\n/work\n");
}

#[test]
fn exec_has_user_groups_and_capabilities_of_the_container() {
    let pod = POD.case();
    let id = pod.kubelet.run_with(&pod.pod, "user", &IDLE, |config| {
        let security = security(config);
        security.run_as_user = Some(v1::Int64Value { value: 1000 });
        security.run_as_group = Some(v1::Int64Value { value: 3000 });
        security.supplemental_groups = vec![4000];
        security.no_new_privs = true;
    });
    let identity = |process: &str| {
        let script =
            format!("grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/{process}/status");
        pod.kubelet.exec(&id, &sh(&script)).stdout
    };
    let of_exec = identity("self");
    assert!(of_exec.contains("Uid:\t1000\t1000"), "{of_exec}");
    assert_eq!(of_exec, identity("1"));
    pod.discard(&id);
}

#[test]
fn exec_sees_processes_of_its_own_container_alone() {
    let pod = POD.case();
    let command = ["sleep", "4343"];
    let other = pod.kubelet.run(&pod.pod, "other", &command);
    let seen = |container: &str| {
        let script = sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
        pod.kubelet.exec(container, &script).stdout
    };
    assert!(seen(&other).contains("sleep 4343"));
    assert!(!seen(&pod.main).contains("sleep 4343"));
    pod.discard(&other);
}

#[test]
fn exec_without_stdin_reads_its_end() {
    let pod = POD.case();
    let executed = pod.kubelet.exec(&pod.main, &sh("cat; echo over"));
    assert_eq!((executed.code, executed.stdout.as_str()), (0, "over\n"));
}

#[test]
fn arguments_of_an_exec_arrive_as_they_are() {
    let pod = POD.case();
    let arguments = ["two words", "$HOME", "'quoted'", "", "a\nb", "ü"];
    let mut command = vec!["printf", "[%s]"];
    command.extend(arguments);
    let wanted: String = arguments.map(|argument| format!("[{argument}]")).concat();
    assert_eq!(pod.kubelet.exec(&pod.main, &command).stdout, wanted);
}

#[test]
fn output_of_an_exec_is_whole_on_both_streams() {
    let pod = POD.case();
    let executed = pod.exec("seq 1 20000; seq 20001 40000 >&2");
    let numbers = |from: u32, to: u32| -> String {
        (from..=to).map(|number| format!("{number}\n")).collect()
    };
    assert!(executed.stdout == numbers(1, 20_000), "stdout differs");
    assert!(executed.stderr == numbers(20_001, 40_000), "stderr differs");
}

#[test]
fn execs_at_the_same_time_each_have_their_own_code_and_output() {
    let pod = POD.case();
    let run = |number: i32| {
        let script = format!("sleep 1; echo {number}; exit {number}");
        let executed = pod.kubelet.exec(&pod.main, &sh(&script));
        (executed.code, executed.stdout)
    };
    let all: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (1..=6)
            .map(|number| scope.spawn(move || run(number)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let wanted: Vec<_> = (1..=6)
        .map(|number| (number, format!("{number}\n")))
        .collect();
    assert_eq!(all, wanted);
}

#[test]
fn exec_in_a_container_that_has_ended_is_refused() {
    let pod = POD.case();
    let ended = pod.kubelet.run(&pod.pod, "ended", &["true"]);
    assert_eq!(pod.kubelet.exit_code(&ended), 0);
    let error = pod.kubelet.exec_within(&ended, &["true"], Duration::ZERO);
    let message = error.unwrap_err().message().to_owned();
    assert!(message.contains("CONTAINER_EXITED"), "{message}");
    pod.kubelet.remove(&ended);
}

#[test]
fn hooks_run_in_the_container_after_its_start_and_before_its_stop() {
    let pod = POD.case();
    let script = "trap 'echo terminated >> /log; cat /log; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let id = pod.kubelet.run(&pod.pod, "hooks", &sh(script));
    // As kubelet runs lifecycle.postStart and lifecycle.preStop.
    let hook = |words: &str| {
        let executed = pod.kubelet.exec(&id, &sh(&format!("echo {words} >> /log")));
        assert_eq!(executed.code, 0, "{executed:?}");
    };
    hook("postStart");
    pod.kubelet.logs("hooks", 0, "ready");
    hook("preStop");
    pod.kubelet.stop(&id, Duration::from_secs(60));
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet
        .logs("hooks", 0, "postStart\npreStop\nterminated\n");
    pod.kubelet.remove(&id);
}

#[test]
fn stop_of_a_container_ends_its_execs() {
    let pod = POD.case();
    let id = pod.kubelet.run(&pod.pod, "busy", &IDLE);
    let code = thread::scope(|scope| {
        let exec = scope.spawn(|| pod.kubelet.exec(&id, &sh("echo > /begun; sleep 1000")).code);
        until("the exec has begun", || {
            pod.kubelet.exec(&id, &["test", "-e", "/begun"]).code == 0
        });
        pod.kubelet.stop(&id, Duration::ZERO);
        exec.join().unwrap()
    });
    assert_eq!(code, 137);
    pod.kubelet.remove(&id);
}
