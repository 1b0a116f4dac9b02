// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! ConfigMaps and their like are in the guest before a container that mounts them is, and stay current.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use driver_fake::{Files, Script};
use pod_spec::LiveVolume;

use super::pod::{Known, Pod, kind};
use crate::SandboxErrorKind;

/// A wait in real time that no machine needs.
const LONG: Duration = Duration::from_secs(60);

/// A volume of kubelet's in the test's own folder.
fn volume(pod: &Pod, name: &str) -> LiveVolume {
    let source = pod.dir.path().join(name);
    fs::create_dir_all(&source).unwrap();
    LiveVolume {
        name: format!("u.{name}"),
        source,
    }
}

/// Gives the volume its next state, as kubelet's atomic writer does.
fn write(volume: &LiveVolume, state: &str, value: &str) {
    let root: &Path = &volume.source;
    let old = fs::read_link(root.join("..data"));
    fs::create_dir(root.join(state)).unwrap();
    fs::write(root.join(state).join("key"), value).unwrap();
    symlink(state, root.join("..data_tmp")).unwrap();
    fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    if fs::symlink_metadata(root.join("key")).is_err() {
        symlink("..data/key", root.join("key")).unwrap();
    }
    if let Ok(old) = old {
        fs::remove_dir_all(root.join(old)).unwrap();
    }
}

fn has(state: &str, value: &str) -> impl Fn(&Files) -> bool {
    let expected: Files = [
        (format!("{state}/key"), value.to_owned()),
        ("..data".to_owned(), format!("-> {state}")),
        ("key".to_owned(), "-> ..data/key".to_owned()),
    ]
    .into();
    move |files| *files == expected
}

async fn becomes(pod: &Pod, name: &str, wanted: impl Fn(&Files) -> bool) {
    let vm = pod.vm();
    let became = vm.volume(name, wanted);
    tokio::time::timeout(LONG, became).await.unwrap();
}

fn puts(script: &Script) -> usize {
    let calls = script.calls();
    calls
        .iter()
        .filter(|call| call.starts_with("PutFiles"))
        .count()
}

#[tokio::test]
async fn volume_is_in_the_guest_before_its_container_and_once_for_all() {
    let script = Script::new();
    let pod = Pod::new(&script);
    let config = volume(&pod, "config");
    write(&config, "..1", "one");
    for id in ["web", "side"] {
        let known = Known::Reader(vec![config.clone()]);
        pod.create_as(id, known).await.unwrap();
    }
    becomes(&pod, "u.config", has("..1", "one")).await;
    let calls = script.calls();
    let at = |name: &str| calls.iter().position(|call| call == name).unwrap();
    assert!(at("PutFiles u.config") < at("CreateContainer web"));
    assert_eq!(puts(&script), 1);
    let dump = pod.sandbox.dump().await.unwrap();
    assert_eq!(dump["vm"]["live_volumes"]["u.config"], "current");
    pod.clean_up(&["web", "side"]).await;
}

#[tokio::test]
async fn change_of_a_volume_reaches_the_guest_whole() {
    let pod = Pod::new(&Script::new());
    let volumes = [volume(&pod, "config"), volume(&pod, "secret")];
    for volume in &volumes {
        write(volume, "..1", "one");
    }
    let known = Known::Reader(volumes.to_vec());
    pod.create_as("web", known).await.unwrap();
    for (state, value) in [("..2", "two"), ("..3", "three")] {
        write(&volumes[1], state, value);
        becomes(&pod, "u.secret", has(state, value)).await;
    }
    becomes(&pod, "u.config", has("..1", "one")).await;
    pod.clean_up(&["web"]).await;
}

#[tokio::test(start_paused = true)]
async fn change_that_the_guest_refuses_is_tried_again() {
    let script = Script::new();
    let pod = Pod::new(&script);
    let config = volume(&pod, "config");
    write(&config, "..1", "one");
    let known = Known::Reader(vec![config.clone()]);
    pod.create_as("web", known).await.unwrap();
    script.refuse_once("PutFiles", ttrpc::Code::INTERNAL, "no memory");
    write(&config, "..2", "two");
    becomes(&pod, "u.config", has("..2", "two")).await;
    assert_eq!(puts(&script), 3);
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn volume_that_goes_away_ends_nothing() {
    let pod = Pod::new(&Script::new());
    let volumes = [volume(&pod, "config"), volume(&pod, "secret")];
    for volume in &volumes {
        write(volume, "..1", "one");
    }
    let known = Known::Reader(volumes.to_vec());
    pod.create_as("web", known).await.unwrap();
    // Kubelet takes it away bit by bit.
    fs::remove_file(volumes[0].source.join("..data")).unwrap();
    write(&volumes[1], "..2", "two");
    becomes(&pod, "u.secret", has("..2", "two")).await;
    fs::remove_dir_all(&volumes[0].source).unwrap();
    write(&volumes[1], "..3", "three");
    becomes(&pod, "u.secret", has("..3", "three")).await;
    becomes(&pod, "u.config", has("..1", "one")).await;
    pod.clean_up(&["web"]).await;
}

#[tokio::test]
async fn volume_that_is_missing_or_refused_fails_the_create_and_leaves_nothing() {
    let script = Script::new();
    let pod = Pod::new(&script);
    let missing = LiveVolume {
        name: "u.x".to_owned(),
        source: PathBuf::from("/nowhere/config"),
    };
    let known = Known::Reader(vec![missing]);
    let error = pod.create_as("web", known).await.unwrap_err();
    assert!(
        error.report().contains("/nowhere/config"),
        "{}",
        error.report()
    );
    script.refuse("PutFiles", ttrpc::Code::INTERNAL, "no memory");
    let config = volume(&pod, "config");
    write(&config, "..1", "one");
    let created = pod.create_as("web", Known::Reader(vec![config])).await;
    assert_eq!(kind(created), SandboxErrorKind::Internal);
    assert_eq!(pod.vm().disks(), Vec::<String>::new());
    pod.sandbox.terminate().await;
    pod.nothing_is_left().await;
}
