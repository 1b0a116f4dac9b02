// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Everything that can be stopped, in each of its phases: by a kill, a delete, an end of the sandbox, and a death.

use driver_fake::Script;
use hypervisor::VmExit;

use super::pod::{Known, Pod, exec, init, kind};
use crate::SandboxErrorKind;

/// The phases of making and starting a container, as the calls that they make, and each call's record.
const PHASES: [(&str, &str); 5] = [
    ("Launch", "Launch"),
    ("ConfigureSandbox", "ConfigureSandbox"),
    ("AttachDisk", "AttachDisk layer"),
    ("CreateContainer", "CreateContainer web"),
    ("StartContainer", "StartContainer web"),
];

/// A pod that is held in a phase of bringing up the container "web", and the task that does.
async fn held_in(
    phase: &'static str,
    call: &str,
) -> (
    Pod,
    tokio::task::JoinHandle<Result<crate::Pid, crate::SandboxError>>,
) {
    let script = Script::new();
    script.hold(phase);
    let pod = Pod::new(&script);
    pod.know("web", Known::Guest(vec!["sleep"], vec!["layer"]));
    let sandbox = pod.sandbox.clone();
    let bringing_up = tokio::spawn(async move {
        sandbox.create(Pod::task("web")).await?;
        sandbox.start(init("web")).await
    });
    script.called(call).await;
    // The create has been asked for, or the launch would not have been seen by it.
    while pod.sandbox.state(init("web")).await.is_err() {
        tokio::task::yield_now().await;
    }
    (pod, bringing_up)
}

/// The grammar of events, whatever happened.
fn check(pod: &Pod) {
    let events = pod.events();
    let at = |event: &str| events.iter().position(|told| told.starts_with(event));
    let exits = events
        .iter()
        .filter(|e| e.starts_with("exited web"))
        .count();
    if let Some(created) = at("created web") {
        assert_eq!(exits, 1, "{events:?}");
        assert!(Some(created) < at("exited web"), "{events:?}");
        if at("started web").is_some() {
            assert!(at("started web") < at("exited web"), "{events:?}");
        }
    } else {
        assert_eq!(events, Vec::<String>::new());
    }
}

#[tokio::test]
async fn kill_in_every_phase_is_answered_and_ends_it() {
    for (phase, call) in PHASES {
        let (pod, bringing_up) = held_in(phase, call).await;
        pod.kill(&init("web"), 9).await.unwrap();
        pod.script.release(phase);
        // An abort makes the creation fail; later, the kill ends what was created.
        drop(bringing_up.await.unwrap());
        if let Ok(exit) = pod.sandbox.wait(init("web")).await {
            assert_eq!(exit.status, 137, "{phase}");
        }
        pod.clean_up(&["web"]).await;
        check(&pod);
    }
}

#[tokio::test]
async fn delete_in_every_phase_of_a_creation_ends_it() {
    for (phase, call) in PHASES {
        if phase == "StartContainer" {
            continue;
        }
        let (pod, bringing_up) = held_in(phase, call).await;
        let sandbox = pod.sandbox.clone();
        let delete = tokio::spawn(async move { sandbox.delete(init("web")).await });
        tokio::task::yield_now().await;
        pod.script.release(phase);
        drop(bringing_up.await.unwrap());
        match delete.await.unwrap() {
            Ok(deleted) => assert_eq!(deleted.exit.status, 137, "{phase}"),
            Err(error) => assert_eq!(error.kind(), SandboxErrorKind::NotFound, "{phase}"),
        }
        pod.clean_up(&[]).await;
        check(&pod);
    }
}

#[tokio::test]
async fn end_of_the_sandbox_in_every_phase_leaves_nothing() {
    for (phase, call) in PHASES {
        let (pod, bringing_up) = held_in(phase, call).await;
        let sandbox = pod.sandbox.clone();
        let end = tokio::spawn(async move { sandbox.terminate().await });
        let twice = pod.sandbox.clone();
        let again = tokio::spawn(async move { twice.terminate().await });
        if phase == "Launch" {
            // A launch is waited for, within the driver's own deadline.
            tokio::task::yield_now().await;
            pod.script.release(phase);
        }
        end.await.unwrap();
        again.await.unwrap();
        assert!(bringing_up.await.unwrap().is_err(), "{phase}");
        pod.nothing_is_left().await;
        check(&pod);
    }
}

#[tokio::test]
async fn death_in_every_phase_is_reported_once_and_leaves_nothing() {
    for (phase, call) in PHASES {
        if phase == "Launch" {
            continue;
        }
        let (pod, bringing_up) = held_in(phase, call).await;
        pod.vm().die(VmExit::Signal(9));
        let error = bringing_up.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), SandboxErrorKind::Unavailable, "{phase}");
        // What was held goes on in a VM that is no more.
        pod.script.release(phase);
        if let Ok(exit) = pod.sandbox.wait(init("web")).await {
            assert_eq!(exit.status, 137, "{phase}");
        }
        pod.clean_up(&["web"]).await;
        check(&pod);
    }
}

#[tokio::test]
async fn death_while_an_exec_starts_answers_it() {
    let script = Script::new();
    script.die_at("StartExec");
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    let error = pod.exec(&exec("web", "probe"), &["sleep"]).await;
    assert_eq!(kind(error), SandboxErrorKind::Unavailable);
    assert_eq!(pod.wait(&init("web")).await, 137);
    pod.clean_up(&["web"]).await;
    let events = pod.events();
    assert!(!events.iter().any(|event| event.contains("exited web/")));
}

#[tokio::test]
async fn death_while_a_signal_or_removal_is_under_way_ends_in_order() {
    for call in ["Signal", "RemoveContainer", "Shutdown"] {
        let script = Script::new();
        script.die_at(call);
        let pod = Pod::new(&script);
        pod.create_as("pod", Known::Sandbox).await.unwrap();
        pod.start(&init("pod")).await.unwrap();
        pod.run("web", &["exit", "4"]).await;
        pod.wait(&init("web")).await;
        pod.run("db", &["sleep"]).await;
        drop(pod.kill(&init("db"), 9).await);
        assert_eq!(pod.wait(&init("db")).await, 137, "{call}");
        for id in ["web", "db"] {
            pod.delete(&init(id)).await.unwrap();
        }
        drop(pod.kill(&init("pod"), 9).await);
        assert_eq!(pod.wait(&init("pod")).await, 137);
        pod.clean_up(&["pod"]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn call_that_the_guest_never_answers_ends_at_its_deadline() {
    let script = Script::new();
    let pod = Pod::new(&script);
    pod.run("web", &["sleep"]).await;
    script.hold("Signal");
    assert_eq!(
        kind(pod.kill(&init("web"), 9).await),
        SandboxErrorKind::DeadlineExceeded
    );
    // The guest is stuck, and the pod still ends.
    script.hold("Shutdown");
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
    check(&pod);
}

#[tokio::test(start_paused = true)]
async fn guest_that_does_not_power_off_is_killed() {
    let script = Script::new();
    script.hold("Shutdown");
    let pod = Pod::new(&script);
    pod.run("web", &["exit", "0"]).await;
    pod.wait(&init("web")).await;
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn end_after_the_end_is_no_error() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    pod.vm().die(VmExit::Signal(9));
    pod.wait(&init("web")).await;
    pod.sandbox.terminate().await;
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}

#[tokio::test]
async fn guest_that_breaks_the_protocol_is_ended() {
    let pod = Pod::new(&Script::new());
    pod.run("web", &["sleep"]).await;
    pod.vm()
        .tell(agent_proto::api::event::Event::Exited(Default::default()));
    assert_eq!(pod.wait(&init("web")).await, 137);
    pod.clean_up(&["web"]).await;
}
