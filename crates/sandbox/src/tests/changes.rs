// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers that are paused, given other limits and measured.

use std::time::Duration;

use driver_fake::Script;
use tokio::time::{Instant, sleep, timeout};

use super::pod::{Known, Pod, exec, init, interfaces, kind};
use crate::{CgroupStats, SandboxError, SandboxErrorKind, Status};

/// The promise of `Stats`.
const SECOND: Duration = Duration::from_secs(1);

async fn status(pod: &Pod, id: &str) -> Status {
    pod.sandbox.state(init(id)).await.unwrap().status
}

async fn stop(pod: &Pod, ids: &[&str]) {
    for id in ids {
        pod.kill(&init(id), 9).await.unwrap();
        pod.wait(&init(id)).await;
    }
    pod.clean_up(ids).await;
}

async fn update(pod: &Pod, id: &str, json: &str) -> Result<(), SandboxError> {
    pod.sandbox
        .update(id.parse().unwrap(), json.as_bytes().to_vec())
        .await
}

/// The CPU time that a container has used, in µs.
async fn usage(pod: &Pod, id: &str) -> u64 {
    let stats = pod.sandbox.stats(id.parse().unwrap()).await.unwrap();
    assert!(stats.interfaces.is_empty(), "they are the pod's");
    match stats.cgroup {
        CgroupStats::Guest(stats) => stats.cpu.usage_usec,
        CgroupStats::Host => panic!("{id} is in the guest"),
    }
}

#[tokio::test]
async fn container_pauses_and_goes_on_with_its_events() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    let web = || "web".parse().unwrap();
    pod.sandbox.pause(web()).await.unwrap();
    assert_eq!(status(&pod, "web").await, Status::Paused);
    let again = pod.sandbox.pause(web()).await;
    assert_eq!(kind(again), SandboxErrorKind::FailedPrecondition);
    let refused = pod.exec(&exec("web", "probe"), &["exit", "0"]).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), SandboxErrorKind::FailedPrecondition);
    assert_eq!(refused.report(), "container web is paused: resume it first");
    pod.sandbox.resume(web()).await.unwrap();
    assert_eq!(status(&pod, "web").await, Status::Running);
    let again = pod.sandbox.resume(web()).await;
    assert_eq!(kind(again), SandboxErrorKind::FailedPrecondition);
    let probe = exec("web", "probe");
    pod.exec(&probe, &["exit", "0"]).await.unwrap();
    pod.wait(&probe).await;
    pod.delete(&probe).await.unwrap();
    stop(&pod, &["web"]).await;
    assert_eq!(
        pod.events(),
        [
            "created web",
            "started web",
            "paused web",
            "resumed web",
            "added web/probe",
            "started web/probe",
            "exited web/probe 0",
            "exited web 137",
            "deleted web",
        ]
    );
}

#[tokio::test]
async fn paused_container_is_killed() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    pod.sandbox.pause("web".parse().unwrap()).await.unwrap();
    let deleted = pod.delete(&init("web")).await;
    assert_eq!(kind(deleted), SandboxErrorKind::FailedPrecondition);
    stop(&pod, &["web"]).await;
    let last: Vec<_> = pod.events().split_off(2);
    assert_eq!(last, ["paused web", "exited web 137", "deleted web"]);
}

#[tokio::test]
async fn state_is_pausing_until_the_guest_has_frozen_it() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.hold("PauseContainer");
    let sandbox = pod.sandbox.clone();
    let pause = tokio::spawn(async move { sandbox.pause("web".parse().unwrap()).await });
    script.called("PauseContainer web").await;
    assert_eq!(status(&pod, "web").await, Status::Pausing);
    script.release("PauseContainer");
    pause.await.unwrap().unwrap();
    assert_eq!(status(&pod, "web").await, Status::Paused);
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn refused_pause_leaves_the_container_running() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.refuse("PauseContainer", ttrpc::Code::INTERNAL, "timed out");
    let error = pod.sandbox.pause("web".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.report(), "pause container web: timed out");
    assert_eq!(status(&pod, "web").await, Status::Running);
    stop(&pod, &["web"]).await;
}

#[tokio::test(start_paused = true)]
async fn pause_that_is_not_answered_is_undone() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.hold("PauseContainer");
    let paused = pod.sandbox.pause("web".parse().unwrap()).await;
    assert_eq!(kind(paused), SandboxErrorKind::DeadlineExceeded);
    assert_eq!(status(&pod, "web").await, Status::Running);
    script.called("ResumeContainer web").await;
    script.release("PauseContainer");
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn death_of_the_vm_ends_a_pause_and_a_paused_container() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    pod.run("db", &["sleep"]).await;
    pod.sandbox.pause("db".parse().unwrap()).await.unwrap();
    script.die_at("PauseContainer");
    let paused = pod.sandbox.pause("web".parse().unwrap()).await;
    assert_eq!(kind(paused), SandboxErrorKind::Unavailable);
    for id in ["web", "db"] {
        assert_eq!(pod.wait(&init(id)).await, 137);
    }
    pod.clean_up(&["web", "db"]).await;
}

#[tokio::test]
async fn update_reaches_the_guest_without_devices() {
    let pod = Pod::new(&Script::new());
    pod.create("web", &["sleep"]).await.unwrap();
    let json = r#"{"memory":{"limit":1048576},"devices":[{"allow":false,"access":"rwm"}]}"#;
    update(&pod, "web", json).await.unwrap();
    let given = pod.vm().resources("web").unwrap();
    assert_eq!(given, br#"{"memory":{"limit":1048576}}"#);
    pod.start(&init("web")).await.unwrap();
    pod.sandbox.pause("web".parse().unwrap()).await.unwrap();
    update(&pod, "web", r#"{"pids":{"limit":5}}"#)
        .await
        .unwrap();
    assert_eq!(
        pod.vm().resources("web").unwrap(),
        br#"{"pids":{"limit":5}}"#
    );
    pod.kill(&init("web"), 9).await.unwrap();
    pod.wait(&init("web")).await;
    let ended = update(&pod, "web", "{}").await;
    assert_eq!(kind(ended), SandboxErrorKind::FailedPrecondition);
    pod.clean_up(&["web"]).await;
    assert_eq!(
        kind(update(&pod, "web", "{}").await),
        SandboxErrorKind::Unavailable
    );
}

#[tokio::test]
async fn update_that_cannot_be_is_refused_by_name() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    assert_eq!(
        kind(update(&pod, "db", "{}").await),
        SandboxErrorKind::NotFound
    );
    assert_eq!(
        kind(update(&pod, "web", "7").await),
        SandboxErrorKind::InvalidArgument
    );
    // The fake VM can have 1024 MiB.
    let error = update(&pod, "web", r#"{"memory":{"limit":1073741825}}"#)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::ResourceExhausted);
    assert_eq!(
        error.report(),
        "update container web: linux.resources.memory.limit is 1073741825 bytes, the pod's VM has 1 vCPUs and 1024 MiB of \
         memory and cannot have more while it runs: make the pod anew with larger limits"
    );
    assert_eq!(pod.vm().resources("web"), None, "the guest is not asked");
    script.refuse(
        "UpdateContainer",
        ttrpc::Code::INVALID_ARGUMENT,
        "linux.resources.cpu.quota cannot be applied",
    );
    let error = update(&pod, "web", "{}").await.unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::InvalidArgument);
    assert_eq!(
        error.report(),
        "update container web: linux.resources.cpu.quota cannot be applied"
    );
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn sandbox_container_stands_for_the_vm() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    let stats = pod.sandbox.stats("pod".parse().unwrap()).await.unwrap();
    assert_eq!(stats.cgroup, CgroupStats::Host);
    assert_eq!(stats.interfaces, interfaces());
    let paused = pod.sandbox.pause("pod".parse().unwrap()).await;
    assert_eq!(kind(paused), SandboxErrorKind::FailedPrecondition);
    update(&pod, "pod", "{}").await.unwrap();
    stop(&pod, &["pod"]).await;
}

#[tokio::test]
async fn stats_are_the_guests_also_after_the_exit() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    assert_eq!(
        (usage(&pod, "web").await, usage(&pod, "web").await),
        (1000, 2000)
    );
    pod.sandbox.pause("web".parse().unwrap()).await.unwrap();
    assert_eq!(usage(&pod, "web").await, 3000);
    pod.kill(&init("web"), 9).await.unwrap();
    pod.wait(&init("web")).await;
    assert_eq!(usage(&pod, "web").await, 4000);
    let unknown = pod.sandbox.stats("db".parse().unwrap()).await;
    assert_eq!(kind(unknown), SandboxErrorKind::NotFound);
    pod.clean_up(&["web"]).await;
}

#[tokio::test(start_paused = true)]
async fn hung_agent_costs_less_than_a_second_and_not_the_last_figures() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    pod.run("db", &["sleep"]).await;
    assert_eq!(usage(&pod, "web").await, 1000);
    script.hold("Stats");
    for _ in 0..5 {
        let begun = Instant::now();
        assert_eq!(usage(&pod, "web").await, 1000, "the last that is known");
        assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    }
    let begun = Instant::now();
    let never = pod.sandbox.stats("db".parse().unwrap()).await;
    assert_eq!(kind(never), SandboxErrorKind::DeadlineExceeded);
    assert!(begun.elapsed() < SECOND);
    script.called("Stats db").await;
    let asked = |id: &str| {
        let call = format!("Stats {id}");
        script.calls().iter().filter(|made| **made == call).count()
    };
    assert_eq!(
        (asked("web"), asked("db")),
        (2, 1),
        "questions do not pile up"
    );
    script.release("Stats");
    heard_again(&pod, "web", 1000).await;
    stop(&pod, &["web", "db"]).await;
}

/// Waits for newer figures than those.
async fn heard_again(pod: &Pod, id: &str, known: u64) {
    let newer = async { while usage(pod, id).await <= known {} };
    timeout(SECOND, newer)
        .await
        .expect("the guest answers again");
}

/// As containerd asks for the figures of a pod, again and again: one container after the other.
#[tokio::test(start_paused = true)]
async fn hung_agent_costs_all_containers_of_a_pod_together_less_than_a_second() {
    let script = Script::new();
    let pod = Pod::new(&script);
    let mut known = Vec::new();
    for id in ["web", "db", "log"] {
        pod.run(id, &["sleep"]).await;
        known.push((id, usage(&pod, id).await));
    }
    script.hold("Stats");
    // Beyond the deadline of a question, after which there is the next.
    for round in 0..30 {
        let begun = Instant::now();
        for (id, last) in &known {
            assert_eq!(usage(&pod, id).await, *last, "the last that is known");
        }
        let took = begun.elapsed();
        assert!(took < SECOND, "{took:?} in round {round}");
        sleep(SECOND).await;
    }
    for (id, last) in &known {
        let call = format!("Stats {id}");
        let asked = script.calls().iter().filter(|made| **made == call).count();
        assert!((4..=5).contains(&asked), "{id} {asked} times in all");
        script.release("Stats");
        heard_again(&pod, id, *last).await;
        script.hold("Stats");
    }
    let begun = Instant::now();
    tokio::join!(usage(&pod, "web"), usage(&pod, "db"), usage(&pod, "log"));
    assert!(begun.elapsed() < SECOND, "all at once");
    script.release("Stats");
    stop(&pod, &["web", "db", "log"]).await;
}
