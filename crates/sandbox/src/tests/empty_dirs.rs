// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The disks of emptyDirs: the pod's from the first container that mounts one, and nobody else's.

use std::fs::File;
use std::path::PathBuf;

use driver_fake::Script;

use super::pod::{Known, Pod};

fn files(pod: &Pod, names: &[&str]) -> Vec<PathBuf> {
    names
        .iter()
        .map(|name| {
            let path = pod.dir.path().join(name);
            File::create(&path).unwrap();
            path
        })
        .collect()
}

#[tokio::test]
async fn disk_of_an_empty_dir_is_attached_once_and_stays_when_its_containers_go() {
    let pod = Pod::new(&Script::new());
    let kept = Known::Keeper(files(&pod, &["v1", "v2"]));
    for id in ["one", "two"] {
        pod.create_as(id, kept.clone()).await.unwrap();
    }
    pod.create("web", &["sleep"]).await.unwrap();
    assert_eq!(pod.vm().disks(), ["layer", "v1", "v2"]);
    for id in ["one", "two"] {
        pod.delete(&super::pod::init(id)).await.unwrap();
    }
    assert_eq!(pod.vm().disks(), ["layer", "v1", "v2"]);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn disk_that_another_vm_has_is_refused_by_the_volumes_name() {
    let pod = Pod::new(&Script::new());
    let files = files(&pod, &["v1", "v2"]);
    let other = File::open(files.last().unwrap()).unwrap();
    other.lock().unwrap();
    let kept = Known::Keeper(files);
    let error = pod.create_as("data", kept.clone()).await.unwrap_err();
    let report = error.report();
    assert!(
        report.contains("emptyDir v2") && report.contains("in use by another VM"),
        "{report}"
    );
    assert_eq!(pod.vm().disks(), [""; 0], "the first is given back too");
    other.unlock().unwrap();
    pod.create_as("data", kept).await.unwrap();
    pod.clean_up(&["data"]).await;
}

#[tokio::test]
async fn more_empty_dirs_than_disks_are_refused_and_take_none() {
    let pod = Pod::new(&Script::new());
    let names: Vec<String> = (0..20).map(|number| format!("v{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let many = Known::Keeper(files(&pod, &names));
    let error = pod.create_as("data", many).await.unwrap_err();
    assert!(error.report().contains("emptyDir v"), "{}", error.report());
    assert_eq!(pod.vm().disks(), [""; 0]);
    pod.create("web", &["sleep"]).await.unwrap();
    pod.clean_up(&["web"]).await;
}
