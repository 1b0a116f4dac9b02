// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The VM's size follows the limits of its containers. The fake VM has 1 vCPU and 128 MiB, and can have 4 and 1024; the
//! overhead is 64 MiB.

use driver_fake::Script;
use ids::{Bytes, Mib};
use pod_spec::Limits;
use proptest::prelude::*;

use super::pod::{Known, Pod, init, kind};
use crate::{SandboxError, SandboxErrorKind};

fn limits(millis: u64, mib: u64) -> Known {
    Known::Limited(Limits {
        cpu: (millis != 0).then_some((millis * 100, 100_000)),
        memory: (mib != 0).then_some(Bytes(mib << 20)),
        ..Limits::default()
    })
}

async fn run(pod: &Pod, id: &str, known: Known) -> Result<(), SandboxError> {
    pod.create_as(id, known).await?;
    pod.start(&init(id)).await.map(drop)
}

async fn stop(pod: &Pod, ids: &[&str]) {
    for id in ids {
        pod.kill(&init(id), 9).await.unwrap();
        pod.wait(&init(id)).await;
    }
    pod.clean_up(ids).await;
}

async fn update(pod: &Pod, id: &str, millis: i64, mib: i64) -> Result<(), SandboxError> {
    let json = serde_json::json!({
        "cpu": { "quota": millis * 100, "period": 100_000 },
        "memory": { "limit": mib << 20 },
    });
    let json = json.to_string().into_bytes();
    pod.sandbox.update(id.parse().unwrap(), json).await
}

fn resizes(script: &Script) -> Vec<String> {
    let calls = script.calls().into_iter();
    calls
        .filter(|call| call.starts_with("Resize ") || call.starts_with("UpdateContainer"))
        .collect()
}

#[tokio::test]
async fn vm_grows_before_the_guest_is_told_and_shrinks_after() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    assert_eq!(resizes(&script), [""; 0], "it is large enough");
    update(&pod, "web", 2500, 256).await.unwrap();
    assert_eq!(pod.vm().size(), (3, 320));
    update(&pod, "web", 1000, 100).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 164));
    assert_eq!(
        resizes(&script),
        [
            "Resize 3 320",
            "Resize 3 320",
            "UpdateContainer web",
            "UpdateContainer web",
            "Resize 1 164",
            "Resize 1 164",
        ],
        "each is asked for twice: to begin, and how far it got"
    );
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn limits_of_all_containers_count_and_those_of_the_gone_do_not() {
    let pod = Pod::new(&Script::new());
    run(&pod, "web", limits(500, 100)).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 164), "it needs more than it has");
    run(&pod, "db", limits(1000, 200)).await.unwrap();
    assert_eq!(pod.vm().size(), (2, 364));
    pod.kill(&init("db"), 9).await.unwrap();
    pod.wait(&init("db")).await;
    pod.delete(&init("db")).await.unwrap();
    assert_eq!(pod.vm().size(), (2, 364), "nobody has asked for less");
    update(&pod, "web", 600, 110).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 174));
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn limit_of_the_pod_comes_by_the_sandbox_container() {
    let pod = Pod::new(&Script::new());
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    pod.start(&init("pod")).await.unwrap();
    run(&pod, "web", limits(500, 64)).await.unwrap();
    update(&pod, "pod", 4000, 512).await.unwrap();
    assert_eq!(pod.vm().size(), (4, 576));
    update(&pod, "pod", 1000, 64).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 128));
    stop(&pod, &["web", "pod"]).await;
}

#[tokio::test]
async fn guest_that_does_not_take_the_memory_fails_the_update_and_keeps_its_size() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    script.hold_memory(0, 200);
    let error = update(&pod, "web", 1000, 512).await.unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::ResourceExhausted);
    assert!(
        error
            .report()
            .contains("of 1 vCPUs and 576 MiB of memory the guest has taken 1 and 200"),
        "{error}"
    );
    assert_eq!(pod.vm().size(), (1, 128));
    assert_eq!(pod.vm().resources("web"), None, "its limits stay");
    script.hold_memory(0, u32::MAX);
    update(&pod, "web", 1000, 512).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 576));
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn guest_that_gives_nothing_back_is_no_error_and_is_told() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    update(&pod, "web", 1000, 512).await.unwrap();
    script.hold_memory(500, u32::MAX);
    update(&pod, "web", 1000, 64).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 500));
    let dump = pod.sandbox.dump().await.unwrap();
    assert_eq!(dump["vm"]["size"]["asked"]["memory_mib"], 128);
    assert_eq!(dump["vm"]["size"]["achieved"]["memory_mib"], 500);
    // More processors do not wait for the memory that is owed.
    update(&pod, "web", 2000, 64).await.unwrap();
    assert_eq!(pod.vm().size(), (2, 500));
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn limits_that_the_guest_refuses_leave_the_size_as_it_was() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    script.refuse("UpdateContainer", ttrpc::Code::INVALID_ARGUMENT, "no");
    let refused = update(&pod, "web", 3000, 512).await;
    assert_eq!(kind(refused), SandboxErrorKind::InvalidArgument);
    assert_eq!(pod.vm().size(), (1, 128));
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn vm_stays_within_the_pods_cgroup() {
    let pod = Pod::new(&Script::new());
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    *pod.host.memory_limit.lock().unwrap() = Some(Mib(300));
    update(&pod, "web", 1000, 280).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 300), "344 were wanted");
    let error = update(&pod, "web", 1000, 301).await.unwrap_err();
    assert_eq!(error.kind(), SandboxErrorKind::ResourceExhausted);
    assert!(error.report().contains("300 MiB of memory"), "{error}");
    // The kubelet makes the pod's cgroup larger first.
    *pod.host.memory_limit.lock().unwrap() = Some(Mib(400));
    update(&pod, "web", 1000, 301).await.unwrap();
    assert_eq!(pod.vm().size(), (1, 365));
    stop(&pod, &["web"]).await;
}

#[tokio::test]
async fn update_while_another_is_under_way_waits_its_turn() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    run(&pod, "db", limits(0, 0)).await.unwrap();
    script.hold("UpdateContainer");
    let (first, second) = tokio::join!(update(&pod, "web", 2000, 256), async {
        script.called("UpdateContainer web").await;
        let sandbox = pod.sandbox.clone();
        let json = br#"{"cpu":{"quota":200000,"period":100000}}"#.to_vec();
        let second = tokio::spawn(async move { sandbox.update("db".parse().unwrap(), json).await });
        script.release("UpdateContainer");
        second.await.unwrap()
    });
    first.unwrap();
    second.unwrap();
    assert_eq!(pod.vm().size(), (4, 320), "db has no memory limit");
    stop(&pod, &["web", "db"]).await;
}

#[tokio::test]
async fn vm_that_dies_while_it_is_resized_fails_the_update() {
    let script = Script::new();
    let pod = Pod::new(&script);
    run(&pod, "web", limits(1000, 64)).await.unwrap();
    script.die_at("ResizeGuest");
    let died = update(&pod, "web", 1000, 512).await;
    assert_eq!(kind(died), SandboxErrorKind::Unavailable);
    assert_eq!(pod.wait(&init("web")).await, 137);
    pod.clean_up(&["web"]).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A container that crashes, is made again and is updated in any order leaves the VM as large as its last limits say.
    #[test]
    fn crash_loops_do_not_drift(rounds in prop::collection::vec((1i64..4000, 1i64..900, any::<bool>()), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let pod = Pod::new(&Script::new());
            // One that stays, so that the pod does.
            run(&pod, "stays", limits(100, 10)).await.unwrap();
            for (millis, mib, crashes) in rounds {
                run(&pod, "loops", limits(300, 30)).await.unwrap();
                update(&pod, "loops", millis, mib).await.unwrap();
                let vcpus = u32::try_from((millis + 100 + 999) / 1000).unwrap().min(4);
                let memory = u32::try_from(mib + 10 + 64).unwrap().clamp(96, 1024);
                assert_eq!(pod.vm().size(), (vcpus, memory));
                if crashes {
                    pod.kill(&init("loops"), 9).await.unwrap();
                }
                drop(pod.kill(&init("loops"), 9).await);
                pod.wait(&init("loops")).await;
                pod.delete(&init("loops")).await.unwrap();
            }
            stop(&pod, &["stays"]).await;
        });
    }
}
