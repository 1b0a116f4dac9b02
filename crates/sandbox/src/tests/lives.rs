// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The lives of containers and execs, and the races of containerd's issues 4769, 7496, 8931 and 6860.

use std::fs;
use std::process::Command;

use driver_fake::{FAKE_VMM_PID, Script};
use hypervisor::VmExit;

use super::pod::{Known, Pod, exec, init, kind, status};
use crate::{KillScope, SandboxErrorKind, Status};

#[tokio::test]
async fn container_on_its_own_runs_and_leaves_nothing() {
    let pod = Pod::new(&Script::new());
    let pid = pod.create("web", &["exit", "77"]).await.unwrap();
    assert!(pid.get() > 4_194_304, "{pid} could be a host's");
    let waits: Vec<_> = (0..3)
        .map(|_| {
            let sandbox = pod.sandbox.clone();
            tokio::spawn(async move { sandbox.wait(init("web")).await })
        })
        .collect();
    assert_eq!(pod.start(&init("web")).await.unwrap(), pid);
    for wait in waits {
        assert_eq!(status(wait.await.unwrap().unwrap()), 77);
    }
    assert_eq!(pod.wait(&init("web")).await, 77, "answered until deleted");
    let state = pod.sandbox.state(init("web")).await.unwrap();
    assert_eq!((state.status, state.pid), (Status::Stopped, pid));
    let deleted = pod.delete(&init("web")).await.unwrap();
    assert_eq!((deleted.exit.status, deleted.pid), (77, pid));
    let again = pod.delete(&init("web")).await.unwrap();
    assert_eq!(again, deleted);
    pod.sandbox.shutdown().await.unwrap();
    pod.nothing_is_left().await;
    let events = ["created web", "started web", "exited web 77", "deleted web"];
    assert_eq!(pod.events(), events);
}

#[tokio::test]
async fn exit_before_the_start_reply_is_told_after_the_start() {
    let script = Script::new();
    script.exit_before_start_reply();
    let pod = Pod::new(&script);
    pod.create("web", &["exit", "3"]).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 3);
    assert_eq!(pod.events(), ["created web", "started web", "exited web 3"]);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn state_never_lags_behind_the_exit() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["exit", "0"]).await;
    pod.told("exited web 0").await;
    let state = pod.sandbox.state(init("web")).await.unwrap();
    assert_eq!(state.status, Status::Stopped);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn exec_runs_and_its_name_can_be_used_again() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    let probe = exec("web", "probe");
    for expected in [5, 6] {
        let code = expected.to_string();
        let pid = pod.exec(&probe, &["exit", &code]).await.unwrap();
        assert!(pid.get() > 4_194_304);
        assert_eq!(pod.wait(&probe).await, expected);
        let deleted = pod.delete(&probe).await.unwrap();
        assert_eq!((deleted.exit.status, deleted.pid), (expected, pid));
    }
    pod.kill(&init("web"), 9).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 137);
    pod.clean_up(&["web"]).await;
    assert_eq!(
        pod.events(),
        [
            "created web",
            "started web",
            "added web/probe",
            "started web/probe",
            "exited web/probe 5",
            "added web/probe",
            "started web/probe",
            "exited web/probe 6",
            "exited web 137",
            "deleted web",
        ]
    );
}

#[tokio::test]
async fn execs_exit_before_their_init() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    pod.exec(&exec("web", "a"), &["sleep"]).await.unwrap();
    pod.exec(&exec("web", "b"), &["sleep"]).await.unwrap();
    pod.kill(&init("web"), 15).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 143);
    let events = pod.events();
    let exits: Vec<_> = events.iter().filter(|e| e.starts_with("exited")).collect();
    assert_eq!(
        exits,
        ["exited web/a 137", "exited web/b 137", "exited web 143"]
    );
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn failed_starts_leave_a_stopped_process_to_delete() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.refuse(
        "StartExec",
        ttrpc::Code::NOT_FOUND,
        "exec: \"nope\": not found",
    );
    let probe = exec("web", "probe");
    let error = pod.exec(&probe, &["exit", "0"]).await.unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::InvalidArgument);
    assert_eq!(
        error.report(),
        "start exec probe of container web: exec: \"nope\": not found"
    );
    assert_eq!(pod.wait(&probe).await, 255);
    pod.delete(&probe).await.unwrap();

    script.refuse("StartContainer", ttrpc::Code::INTERNAL, "no such file");
    pod.create("db", &["sleep"]).await.unwrap();
    let error = pod.start(&init("db")).await.unwrap_err();
    assert_eq!(error.report(), "start container db: no such file");
    let state = pod.sandbox.state(init("db")).await.unwrap();
    assert_eq!(state.status, Status::Stopped);
    pod.delete(&init("db")).await.unwrap();
    pod.kill(&init("web"), 9).await.unwrap();
    pod.wait(&init("web")).await;
    pod.clean_up(&["web"]).await;
    let events = pod.events();
    assert!(!events.iter().any(|event| event.contains("started db")));
}

#[tokio::test]
async fn kill_that_races_the_exit_is_not_found() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.refuse("Signal", ttrpc::Code::NOT_FOUND, "process already finished");
    assert_eq!(
        kind(pod.kill(&init("web"), 15).await),
        SandboxErrorKind::NotFound
    );
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn state_forbids_what_it_must() {
    use SandboxErrorKind::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound};
    let pod = Pod::new(&Script::new());
    let (web, probe) = (init("web"), exec("web", "probe"));
    assert_eq!(kind(pod.start(&web).await), NotFound);
    assert_eq!(kind(pod.sandbox.state(web.clone()).await), NotFound);
    assert_eq!(kind(pod.sandbox.wait(web.clone()).await), NotFound);
    assert_eq!(kind(pod.delete(&web).await), NotFound);
    pod.run("web", &["sleep"]).await;
    assert_eq!(kind(pod.create("web", &["sleep"]).await), AlreadyExists);
    assert_eq!(kind(pod.start(&web).await), FailedPrecondition);
    assert_eq!(kind(pod.delete(&web).await), FailedPrecondition);
    assert_eq!(kind(pod.sandbox.shutdown().await), FailedPrecondition);
    let task = Pod::exec_task(&probe, &["sleep"]);
    pod.sandbox.exec(task.clone()).await.unwrap();
    assert_eq!(kind(pod.sandbox.exec(task).await), AlreadyExists);
    assert_eq!(kind(pod.kill(&probe, 9).await), FailedPrecondition);
    assert_eq!(kind(pod.kill(&web, 99).await), InvalidArgument);
    let mut bad = Pod::exec_task(&exec("web", "bad"), &[]);
    bad.process_json = b"not json".to_vec();
    assert_eq!(kind(pod.sandbox.exec(bad).await), InvalidArgument);
    pod.kill(&web, 9).await.unwrap();
    pod.wait(&web).await;
    assert_eq!(kind(pod.kill(&web, 9).await), NotFound);
    assert_eq!(kind(pod.start(&probe).await), FailedPrecondition);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn delete_of_a_created_container_kills_it() {
    let pod = Pod::new(&Script::new());
    pod.create("web", &["sleep"]).await.unwrap();
    assert_eq!(pod.delete(&init("web")).await.unwrap().exit.status, 137);
    pod.clean_up(&[]).await;
    assert_eq!(
        pod.events(),
        ["created web", "exited web 137", "deleted web"]
    );
}

#[tokio::test]
async fn oom_is_told_before_the_exit() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["oom"]).await;
    assert_eq!(pod.wait(&init("web")).await, 137);
    assert_eq!(
        pod.events(),
        ["created web", "started web", "oom web", "exited web 137"]
    );
    pod.clean_up(&["web"]).await;
}

/// With values above the test's own, which anybody may set.
#[tokio::test]
async fn vmm_is_as_precious_as_the_most_precious_container_from_before_that_is_made() {
    let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
    let file = format!("/proc/{}/oom_score_adj", vmm.id());
    let score = || fs::read_to_string(&file).unwrap();
    let script = Script::new().vmm(vmm.id());
    let pod = Pod::new(&script);
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.run("web", &["sleep"]).await;
    assert_eq!(score(), "0\n", "neither says what it wants");
    let cases = [
        ("cheap", 1000, "1000\n"),
        ("dear", 300, "300\n"),
        ("job", 600, "300\n"),
    ];
    for (id, wanted, expected) in cases {
        script.hold("CreateContainer");
        pod.know(id, Known::Precious(wanted));
        let create = pod.sandbox.create(Pod::task(id));
        let call = format!("CreateContainer {id}");
        let seen = async {
            script.called(&call).await;
            let seen = score();
            script.release("CreateContainer");
            seen
        };
        let (created, seen) = tokio::join!(create, seen);
        created.unwrap();
        assert_eq!(seen, expected, "{id}");
    }
    pod.delete(&init("dear")).await.unwrap();
    pod.create_as("again", Known::Precious(700)).await.unwrap();
    assert_eq!(score(), "300\n", "a pod keeps its request");
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

#[tokio::test]
async fn pod_is_one_vm_and_restarts_containers_in_place() {
    let script = Script::new();
    let pod = Pod::new(&script);
    let pause = pod.create_as("pod", Known::Sandbox).await.unwrap();
    assert_eq!(pause.get(), FAKE_VMM_PID);
    pod.start(&init("pod")).await.unwrap();
    pod.run("web", &["sleep"]).await;
    for expected in [1, 2] {
        let code = if expected == 1 { "1" } else { "2" };
        pod.run("job", &["exit", code]).await;
        assert_eq!(pod.wait(&init("job")).await, expected);
        pod.delete(&init("job")).await.unwrap();
    }
    assert_eq!(pod.driver.vms().len(), 1);
    pod.kill(&init("web"), 15).await.unwrap();
    pod.wait(&init("web")).await;
    pod.delete(&init("web")).await.unwrap();
    assert_eq!(
        kind(pod.sandbox.shutdown().await),
        SandboxErrorKind::FailedPrecondition
    );
    pod.kill(&init("pod"), 9).await.unwrap();
    assert_eq!(pod.wait(&init("pod")).await, 137);
    pod.clean_up(&["pod"]).await;
    assert!(
        script.calls().contains(&"Shutdown".to_owned()),
        "asked first"
    );
}

#[tokio::test]
async fn end_of_the_sandbox_container_ends_its_members() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    pod.run("web", &["sleep"]).await;
    pod.kill(&init("pod"), 9).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 137);
    pod.clean_up(&["web", "pod"]).await;
}

#[tokio::test]
async fn containers_of_one_image_share_its_disk() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    let of = |layers: Vec<&'static str>| Known::Guest(vec!["sleep"], layers);
    pod.create_as("a", of(vec!["base"])).await.unwrap();
    pod.create_as("b", of(vec!["top", "base"])).await.unwrap();
    assert_eq!(pod.vm().disks(), ["base", "top"]);
    pod.delete(&init("b")).await.unwrap();
    assert_eq!(pod.vm().disks(), ["base"]);
    pod.delete(&init("a")).await.unwrap();
    assert_eq!(pod.vm().disks(), Vec::<String>::new());
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn container_that_finds_no_slot_gives_back_what_it_took() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    let many = ["d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9"];
    let known = Known::Guest(vec!["sleep"], many.to_vec());
    assert_eq!(
        kind(pod.create_as("fat", known).await),
        SandboxErrorKind::ResourceExhausted
    );
    assert_eq!(pod.vm().disks(), Vec::<String>::new());
    assert_eq!(
        kind(pod.sandbox.state(init("fat")).await),
        SandboxErrorKind::NotFound
    );
    pod.run("thin", &["exit", "0"]).await;
    assert_eq!(pod.wait(&init("thin")).await, 0);
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn vm_death_is_told_once_for_each_process() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    pod.run("web", &["sleep"]).await;
    pod.exec(&exec("web", "probe"), &["sleep"]).await.unwrap();
    pod.create("late", &["sleep"]).await.unwrap();
    pod.vm().die(VmExit::Signal(9));
    for process in [init("pod"), init("web"), init("late"), exec("web", "probe")] {
        assert_eq!(pod.wait(&process).await, 137, "{process}");
    }
    let error = pod.create("new", &["sleep"]).await.unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::Unavailable);
    assert_eq!(
        error.report(),
        "container new: the sandbox's VM has ended: the sandbox's VM has ended: the VMM was ended by signal 9; its \
         console ends with: Linux version 6.12 (fake)"
    );
    pod.clean_up(&["late", "web", "pod"]).await;
    let events = pod.events();
    let exits = events.iter().filter(|e| e.starts_with("exited")).count();
    assert_eq!(exits, 4);
}

#[tokio::test]
async fn caller_that_gives_up_does_not_stop_the_work() {
    let script = Script::new();
    script.hold("CreateContainer");
    let pod = Pod::new(&script);
    pod.know("web", Known::Guest(vec!["sleep"], vec!["layer"]));
    {
        let create = pod.sandbox.create(Pod::task("web"));
        tokio::pin!(create);
        tokio::select! {
            _ = &mut create => panic!("it is held"),
            () = script.called("CreateContainer web") => {}
        }
    }
    script.release("CreateContainer");
    pod.told("created web").await;
    pod.start(&init("web")).await.unwrap();
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn pids_name_what_lives() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.run("web", &["sleep"]).await;
    let probe = exec("web", "probe");
    let exec_pid = pod.exec(&probe, &["sleep"]).await.unwrap();
    let pids = pod.sandbox.pids("pod".parse().unwrap()).await.unwrap();
    assert_eq!(pids.len(), 1);
    let pids = pod.sandbox.pids("web".parse().unwrap()).await.unwrap();
    assert_eq!(pids.len(), 2);
    assert!(
        pids.iter()
            .any(|info| info.pid == exec_pid && info.exec == probe.exec)
    );
    pod.sandbox
        .kill(init("web"), 9, KillScope::All)
        .await
        .unwrap();
    pod.wait(&init("web")).await;
    let pids = pod.sandbox.pids("web".parse().unwrap()).await.unwrap();
    assert_eq!(pids, []);
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn console_is_the_guests_until_the_end() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    let console = pod.sandbox.console(Some(6)).await.unwrap();
    assert_eq!((console.from, console.next), (6, 26));
    assert_eq!(console.text, "version 6.12 (fake)\n");
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
    assert_eq!(
        kind(pod.sandbox.console(None).await),
        SandboxErrorKind::Unavailable
    );
}

#[tokio::test]
async fn dump_shows_processes_calls_and_vm() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.hold("Signal");
    let sandbox = pod.sandbox.clone();
    let kill = tokio::spawn(async move { sandbox.kill(init("web"), 15, KillScope::Process).await });
    script.called("Signal 15").await;
    let dump = pod.sandbox.dump().await.unwrap();
    assert_eq!(dump["sandbox_id"], "pod");
    assert_eq!(dump["processes"][0]["phase"], "running");
    assert_eq!(dump["vm"]["state"], "ready");
    assert_eq!(dump["vm"]["vmm"]["driver"], "fake");
    assert_eq!(dump["vm"]["agent"]["fake"], true);
    // The one for events waits too.
    let calls = dump["vm"]["calls_pending"].as_array().unwrap();
    let call = calls.iter().find(|call| call["method"] == "Signal");
    let call = call.unwrap();
    assert!(
        call["ms"].as_u64() <= call["deadline_ms"].as_u64(),
        "{call}"
    );
    script.release("Signal");
    kill.await.unwrap().unwrap();
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}
