// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! EmptyDirs of medium Disk as the kubelet sees them: what they use is what it measures, and they are there as long as
//! their pod.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use e2e::{Node, eventually, named};
use k8s_cri::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::Kubelet;
use crate::volumes::{IDLE, PodDir, mount, output, run_with, sh};

const MIB: u64 = 1 << 20;

/// What a volume occupies, as a kubelet counts it: the blocks of all files.
fn used(folder: &Path) -> u64 {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let below = if metadata.is_dir() {
                used(&entry.path())
            } else {
                0
            };
            metadata.blocks() * 512 + below
        })
        .sum()
}

#[test]
fn empty_dir_is_measured_on_the_host_and_gives_back_what_is_deleted() {
    let _node = Node::new("empty_dir_is_measured_on_the_host_and_gives_back_what_is_deleted");
    let dir = PodDir::new("measured");
    let mut kubelet = Kubelet::new("measured");
    let pod = kubelet.run_pod("measured");
    let volume = dir.empty_dir("data");
    let mounts = vec![mount(&volume, "/data", false)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    assert_eq!(output(&kubelet, &main, "ls -A /data"), "", "no lost+found");
    output(&kubelet, &main, "sync");
    assert!(
        used(&volume) <= 2 * MIB,
        "{} bytes are its own",
        used(&volume)
    );
    let fill = "dd if=/dev/zero of=/data/fill bs=1M count=24 && sync";
    output(&kubelet, &main, fill);
    let full = used(&volume);
    assert!((24 * MIB..=30 * MIB).contains(&full), "{full} bytes");
    output(&kubelet, &main, "rm /data/fill && sync");
    eventually("the blocks are given back", || {
        (used(&volume) <= 6 * MIB).then_some(())
    });
}

#[test]
fn empty_dir_outlives_its_sandbox() {
    let _node = Node::new("empty_dir_outlives_its_sandbox");
    let dir = PodDir::new("outlives");
    let mut kubelet = Kubelet::new("outlives");
    let volume = dir.empty_dir("data");
    let pod = kubelet.run_pod("outlives");
    let with = |kubelet: &Kubelet, pod| {
        run_with(
            kubelet,
            pod,
            "main",
            &IDLE,
            vec![mount(&volume, "/data", false)],
        )
    };
    let first = with(&kubelet, &pod);
    let script = "mkdir /data/a && echo kept > /data/a/note && chmod 711 /data && sync";
    output(&kubelet, &first, script);
    kill(Pid::from_raw(named("coffer-vmm")[0]), Signal::SIGKILL).unwrap();
    assert_eq!(kubelet.exit_code(&first), 137);
    kubelet.stop_pod(&pod);
    kubelet.remove_pod(&pod);
    // As a kubelet makes a pod's sandbox anew: the pod is the same.
    let anew = kubelet
        .run_pod_with("outlives", |config| {
            config.metadata.as_mut().unwrap().attempt = 1;
        })
        .unwrap();
    let second = with(&kubelet, &anew);
    let script = "cat /data/a/note; stat -c %a /data; echo more > /data/b";
    assert_eq!(output(&kubelet, &second, script), "kept\n711\n");
}

#[test]
fn empty_dir_on_a_full_node_is_an_error_and_not_a_hang() {
    let _node = Node::new("empty_dir_on_a_full_node_is_an_error_and_not_a_hang");
    let mut dir = PodDir::new("full-node");
    let mut kubelet = Kubelet::new("full-node");
    let pod = kubelet.run_pod("full-node");
    let volumes = dir.path.join("volumes");
    fs::create_dir(&volumes).unwrap();
    dir.mount_tmpfs(&volumes, "size=16m");
    let volume = dir.empty_dir("data");
    let mounts = vec![mount(&volume, "/data", false)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let fill = "dd if=/dev/zero of=/data/fill bs=1M count=48 conv=fsync";
    let filled = kubelet.exec(&main, &sh(fill));
    assert_ne!(filled.code, 0, "{filled:?}");
    assert_eq!(output(&kubelet, &main, "echo alive"), "alive\n");
    kubelet.stop(&main, Duration::ZERO);
    kubelet.stop_pod(&pod);
}

#[test]
fn more_empty_dirs_than_a_vm_has_disks_are_refused_by_name() {
    let _node = Node::new("more_empty_dirs_than_a_vm_has_disks_are_refused_by_name");
    let dir = PodDir::new("many");
    let mut kubelet = Kubelet::new("many");
    let pod = kubelet.run_pod("many");
    let mounts: Vec<v1::Mount> = (0..32)
        .map(|number| {
            let volume = dir.empty_dir(&format!("v{number}"));
            mount(&volume, &format!("/v{number}"), false)
        })
        .collect();
    let refused = kubelet.create_with(&pod, "many", 0, &IDLE, |config| {
        config.mounts = mounts.clone();
    });
    let started = refused.and_then(|id| kubelet.try_start(&id));
    let message = started.unwrap_err().message().to_owned();
    assert!(
        message.contains("the emptyDir uid-many.v") && message.contains("disk slots"),
        "{message}"
    );
    // What the refused one had taken is free for others.
    let some = mounts.into_iter().take(12).collect();
    let other = run_with(&kubelet, &pod, "other", &IDLE, some);
    output(&kubelet, &other, "for dir in /v*; do echo x > $dir/x; done");
}

#[test]
fn empty_dir_that_the_host_has_filled_is_the_hosts_own() {
    let _node = Node::new("empty_dir_that_the_host_has_filled_is_the_hosts_own");
    let dir = PodDir::new("filled");
    let mut kubelet = Kubelet::new("filled");
    let pod = kubelet.run_pod("filled");
    let volume = dir.empty_dir("data");
    fs::write(volume.join("seed"), "of the host\n").unwrap();
    let with = |name: &str| {
        run_with(
            &kubelet,
            &pod,
            name,
            &IDLE,
            vec![mount(&volume, "/data", false)],
        )
    };
    let one = with("one");
    assert_eq!(output(&kubelet, &one, "cat /data/seed"), "of the host\n");
    output(
        &kubelet,
        &one,
        "echo of the guest > /data/note && rm /data/seed",
    );
    let note = volume.join("note");
    assert_eq!(fs::read_to_string(&note).unwrap(), "of the guest\n");
    // It stays so for the pod, whatever is in it.
    fs::remove_file(&note).unwrap();
    let two = with("two");
    // Another name: for a second the guest may still know the one that is gone.
    output(&kubelet, &two, "echo again > /data/other");
    assert_eq!(fs::read_to_string(volume.join("other")).unwrap(), "again\n");
}
