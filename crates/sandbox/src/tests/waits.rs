// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A sandbox whose VM waits to be asked for, and the wait for a VM's end.

use driver_fake::Script;

use super::pod::{Known, Pod, init};
use crate::{Boot, KillScope, SandboxErrorKind};

#[tokio::test]
async fn vm_that_waits_is_started_once_and_takes_no_container_before() {
    let script = Script::new();
    let pod = Pod::with(&script, Boot::WhenAsked);
    pod.know("pause", Known::Sandbox);
    let early = pod.sandbox.create(Pod::task("pause")).await.unwrap_err();
    assert_eq!(early.kind(), SandboxErrorKind::FailedPrecondition);
    assert!(pod.driver.vms().is_empty());
    pod.sandbox.vm_ended().await.expect("there is none");

    pod.sandbox.boot().await.unwrap();
    let again = pod.sandbox.boot().await.unwrap_err();
    assert_eq!(again.kind(), SandboxErrorKind::AlreadyExists);
    pod.sandbox.create(Pod::task("pause")).await.unwrap();
    assert_eq!(pod.driver.vms().len(), 1);
    pod.sandbox.terminate().await;
}

#[tokio::test]
async fn sandbox_that_never_booted_ends_at_once() {
    for now in [false, true] {
        let pod = Pod::with(&Script::new(), Boot::WhenAsked);
        if now {
            pod.sandbox.terminate().await;
        } else {
            pod.sandbox.shutdown().await.unwrap();
            pod.sandbox.ended().await;
        }
        let late = pod.sandbox.boot().await.unwrap_err();
        assert_eq!(late.kind(), SandboxErrorKind::Unavailable);
        assert!(pod.driver.vms().is_empty());
    }
}

#[tokio::test]
async fn end_of_the_vm_is_waited_for_whatever_ends_it() {
    let pod = Pod::with(&Script::new(), Boot::WhenAsked);
    pod.know("pause", Known::Sandbox);
    pod.sandbox.boot().await.unwrap();
    pod.sandbox.create(Pod::task("pause")).await.unwrap();
    pod.sandbox.start(init("pause")).await.unwrap();
    let (ended, killed) = tokio::join!(
        pod.sandbox.vm_ended(),
        pod.sandbox.kill(init("pause"), 9, KillScope::All)
    );
    ended.unwrap();
    killed.unwrap();
    pod.sandbox.vm_ended().await.expect("it has ended");
}
