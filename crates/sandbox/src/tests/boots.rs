// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Boots that go wrong: the first task's error says why, and nothing is left.

use driver_fake::{Boot, Script};
use hypervisor::DriverErrorKind;

use super::pod::{Known, Pod, init, kind};
use crate::SandboxErrorKind;

/// What a container of its own gets to hear.
async fn refused(boot: Boot) -> (SandboxErrorKind, String) {
    let pod = Pod::new(&Script::new().boot(boot));
    let error = pod.create("web", &["sleep"]).await.unwrap_err();
    assert_eq!(
        kind(pod.sandbox.state(init("web")).await),
        SandboxErrorKind::NotFound
    );
    pod.clean_up(&["web"]).await;
    assert_eq!(pod.events(), Vec::<String>::new());
    (error.kind(), error.report())
}

#[tokio::test(start_paused = true)]
async fn guest_that_is_never_ready_is_given_up_at_the_deadline() {
    let (kind, report) = refused(Boot::Never).await;
    assert_eq!(kind, SandboxErrorKind::DeadlineExceeded);
    assert_eq!(
        report,
        "the guest was not ready within 30s; its console ends with: Linux version 6.12 (fake)"
    );
}

#[tokio::test(start_paused = true)]
async fn guest_that_dials_and_says_nothing_is_given_up_too() {
    let (kind, report) = refused(Boot::Mute).await;
    assert_eq!(kind, SandboxErrorKind::DeadlineExceeded);
    assert!(report.contains("its console ends with"), "{report}");
}

#[tokio::test]
async fn last_words_of_a_panicking_kernel_are_in_the_error() {
    let panic = "Kernel panic - not syncing: No working init found.\n";
    let (kind, report) = refused(Boot::Panic(panic.to_owned())).await;
    assert_eq!(kind, SandboxErrorKind::Unavailable);
    assert!(report.starts_with("the guest ended before it was ready: the guest shut down;"));
    assert!(report.ends_with("Kernel panic - not syncing: No working init found."));
}

#[tokio::test]
async fn agent_of_another_release_is_refused_with_advice() {
    let (kind, report) = refused(Boot::WrongVersion).await;
    assert_eq!(kind, SandboxErrorKind::Internal);
    assert!(
        report.contains("install the initramfs of the same release"),
        "{report}"
    );
}

#[tokio::test]
async fn driver_that_cannot_launch_says_why() {
    let (kind, report) = refused(Boot::LaunchFails(DriverErrorKind::Node)).await;
    assert_eq!(kind, SandboxErrorKind::FailedPrecondition);
    assert_eq!(report, "start the VM: the fake driver was told to fail");
}

#[tokio::test]
async fn guest_that_cannot_be_configured_is_refused() {
    let script = Script::new();
    script.refuse(
        "ConfigureSandbox",
        ttrpc::Code::INVALID_ARGUMENT,
        "sysctl a.b: not known",
    );
    let pod = Pod::new(&script);
    let error = pod.create("web", &["sleep"]).await.unwrap_err();
    assert_eq!(
        error.report(),
        "set the guest up for the pod: sysctl a.b: not known"
    );
    pod.clean_up(&[]).await;
}

#[tokio::test]
async fn sandbox_container_is_created_beside_the_boot_and_starts_after_it() {
    let script = Script::new();
    script.hold("ConfigureSandbox");
    let pod = Pod::new(&script);
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    let sandbox = pod.sandbox.clone();
    let start = tokio::spawn(async move { sandbox.start(init("pod")).await });
    script.called("ConfigureSandbox").await;
    assert_eq!(pod.events(), ["created pod"]);
    script.release("ConfigureSandbox");
    start.await.unwrap().unwrap();
    assert_eq!(pod.events(), ["created pod", "started pod"]);
    pod.kill(&init("pod"), 9).await.unwrap();
    pod.clean_up(&["pod"]).await;
}

#[tokio::test(start_paused = true)]
async fn start_of_a_sandbox_whose_guest_does_not_come_up_fails_with_the_reason() {
    let pod = Pod::new(&Script::new().boot(Boot::Never));
    pod.create_as("pod", Known::Sandbox).await.unwrap();
    let error = pod.start(&init("pod")).await.unwrap_err();
    assert!(
        error
            .report()
            .contains("the guest was not ready within 30s"),
        "{error}"
    );
    pod.wait(&init("pod")).await;
    pod.clean_up(&["pod"]).await;
    let exits = pod.events().into_iter().filter(|e| e.starts_with("exited"));
    assert_eq!(exits.count(), 1);
}

#[tokio::test]
async fn bundle_that_is_none_is_refused_and_others_still_run() {
    let pod = Pod::new(&Script::new());
    let error = pod.sandbox.create(Pod::task("nobundle")).await;
    assert_eq!(kind(error), SandboxErrorKind::InvalidArgument);
    pod.run("web", &["exit", "0"]).await;
    pod.wait(&init("web")).await;
    pod.clean_up(&["web"]).await;
}
