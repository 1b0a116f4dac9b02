// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a container leaves in the kubelet's files is on the host when its exit is told.

use std::fs;
use std::path::{Path, PathBuf};

use driver_fake::Script;
use hypervisor::VmExit;
use pod_spec::WriteBack;

use super::pod::{Known, Pod, init};

fn file(pod: &Pod) -> PathBuf {
    let path = pod.dir.path().join("termination-log");
    fs::write(&path, "").unwrap();
    path
}

fn writer(text: &'static str, path: &Path, back: WriteBack) -> Known {
    Known::Writer(vec!["leave", text], path.to_owned(), back)
}

#[tokio::test]
async fn termination_message_is_on_the_host_before_the_exit_is_told() {
    let script = Script::new();
    script.hold("ReadCopiedFile");
    let pod = Pod::new(&script);
    let path = file(&pod);
    let known = writer("the disk is full", &path, WriteBack::TerminationMessage);
    pod.create_as("web", known).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    script.called("ReadCopiedFile web").await;
    assert_eq!(pod.events(), ["created web", "started web"]);
    script.release("ReadCopiedFile");
    assert_eq!(pod.wait(&init("web")).await, 1);
    assert_eq!(fs::read(&path).unwrap(), b"the disk is full");
    assert_eq!(pod.events(), ["created web", "started web", "exited web 1"]);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn guest_that_cannot_read_the_message_does_not_keep_the_exit() {
    let script = Script::new();
    script.refuse(
        "ReadCopiedFile",
        ttrpc::Code::INTERNAL,
        "the file is broken",
    );
    let pod = Pod::new(&script);
    let path = file(&pod);
    let known = writer("lost", &path, WriteBack::TerminationMessage);
    pod.create_as("web", known).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 1);
    assert_eq!(fs::read(&path).unwrap(), b"");
    pod.clean_up(&["web"]).await;
}

#[tokio::test(start_paused = true)]
async fn guest_that_is_silent_keeps_the_exit_for_a_moment_only() {
    let script = Script::new();
    script.hold("ReadCopiedFile");
    let pod = Pod::new(&script);
    let path = file(&pod);
    let known = writer("late", &path, WriteBack::Whole);
    pod.create_as("web", known).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    assert_eq!(pod.wait(&init("web")).await, 1);
    script.release("ReadCopiedFile");
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn vm_that_dies_meanwhile_does_not_change_the_exit_code() {
    let script = Script::new();
    script.hold("ReadCopiedFile");
    let pod = Pod::new(&script);
    let path = file(&pod);
    let known = writer("never read", &path, WriteBack::TerminationMessage);
    pod.create_as("web", known).await.unwrap();
    pod.start(&init("web")).await.unwrap();
    script.called("ReadCopiedFile web").await;
    pod.vm().die(VmExit::Signal(9));
    assert_eq!(pod.wait(&init("web")).await, 1);
    pod.clean_up(&["web"]).await;
}
