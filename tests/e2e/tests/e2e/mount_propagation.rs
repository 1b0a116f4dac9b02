// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Mounts of the host below directories that are shared with a pod: which arrive, and who may write to them.

use std::fs;
use std::path::PathBuf;

use e2e::{BUSYBOX, Container, Node, run};
use k8s_cri::v1;

use crate::cri_client::Kubelet;
use crate::volumes::{IDLE, PodDir, becomes, mount, output, run_with, sh};

/// A directory with three mounts below it: one writable, with one more in it, and one read-only.
fn nested(dir: &mut PodDir) -> PathBuf {
    let folder = dir.claim("pvc-1");
    for path in ["open", "open/deep", "fixed"] {
        let place = folder.join(path);
        fs::create_dir(&place).unwrap();
        dir.mount_tmpfs(&place, "size=1m");
    }
    fs::write(folder.join("fixed/note"), "mounted read-only\n").unwrap();
    let fixed = folder.join("fixed");
    run("mount", &["-o", "remount,bind,ro", fixed.to_str().unwrap()]).success();
    folder
}

#[test]
fn mounts_below_a_read_only_directory_keep_their_own_flags() {
    let _node = Node::new("mounts_below_a_read_only_directory_keep_their_own_flags");
    let mut dir = PodDir::new("nested-ro");
    let folder = nested(&mut dir);
    let mut kubelet = Kubelet::new("nested-ro");
    let pod = kubelet.run_pod("nested-ro");
    for name in ["one", "two"] {
        let mounts = vec![mount(&folder, "/data", true)];
        let main = run_with(&kubelet, &pod, name, &IDLE, mounts);
        let script = format!("echo {name} > /data/open/note && echo {name} > /data/open/deep/note");
        output(&kubelet, &main, &script);
        for path in ["open/note", "open/deep/note"] {
            let read = fs::read_to_string(folder.join(path)).unwrap();
            assert_eq!(read, format!("{name}\n"));
        }
        assert_eq!(
            output(&kubelet, &main, "cat /data/fixed/note"),
            "mounted read-only\n"
        );
        for place in ["/data/new", "/data/fixed/new"] {
            let refused = kubelet.exec(&main, &sh(&format!("echo x > {place}")));
            assert!(refused.stderr.contains("Read-only"), "{place}: {refused:?}");
        }
        let shown = "grep ' /data ' /proc/mounts | cut -d' ' -f4 | cut -d, -f1";
        assert_eq!(output(&kubelet, &main, shown), "ro\n");
    }
    kubelet.stop_pod(&pod);
}

#[test]
fn recursive_read_only_goes_for_mounts_below() {
    let _node = Node::new("recursive_read_only_goes_for_mounts_below");
    let mut dir = PodDir::new("nested-rro");
    let folder = nested(&mut dir);
    fs::write(folder.join("open/note"), "of the host\n").unwrap();
    let option = format!(
        "type=bind,src={},dst=/data,options=rbind:rro",
        folder.display()
    );
    let container = Container::start_image("rro", BUSYBOX, &["--mount", &option], &IDLE);
    let read = container
        .exec("read", &["cat", "/data/open/note"])
        .success();
    assert_eq!(read.stdout, "of the host\n");
    for (number, place) in ["new", "open/new", "open/deep/new", "fixed/new"]
        .iter()
        .enumerate()
    {
        let script = format!("echo x > /data/{place}");
        let refused = container.exec(&format!("write-{number}"), &sh(&script));
        assert!(refused.stderr.contains("Read-only"), "{place}: {refused:?}");
        assert!(!folder.join(place).exists());
    }
}

#[test]
fn later_mounts_of_the_host_do_not_arrive_where_they_are_not_asked_for() {
    let _node = Node::new("later_mounts_of_the_host_do_not_arrive_where_they_are_not_asked_for");
    let mut dir = PodDir::new("private");
    let mut kubelet = Kubelet::new("private");
    let pod = kubelet.run_pod("private");
    let claim = dir.claim("pvc-1");
    dir.make_shared(&claim);
    let place = claim.join("late");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("note"), "below\n").unwrap();
    let with = |name: &str, propagation: v1::MountPropagation| {
        let asked = v1::Mount {
            propagation: i32::from(propagation),
            ..mount(&claim, "/data", false)
        };
        run_with(&kubelet, &pod, name, &IDLE, vec![asked])
    };
    let private = with("private", v1::MountPropagation::PropagationPrivate);
    let slave = with("slave", v1::MountPropagation::PropagationHostToContainer);
    let read = "cat /data/late/note";
    assert_eq!(output(&kubelet, &private, read), "below\n");
    assert_eq!(output(&kubelet, &slave, read), "below\n");
    dir.mount_tmpfs(&place, "size=1m");
    fs::write(place.join("note"), "mounted later\n").unwrap();
    becomes(&kubelet, &slave, read, "mounted later\n");
    assert_eq!(output(&kubelet, &private, read), "below\n");
    // And what the host takes away goes there too. Lazily: a pod that has looked at it keeps it busy, as with any runtime.
    run("umount", &["-l", place.to_str().unwrap()]).success();
    dir.forget_mount(&place);
    becomes(&kubelet, &slave, read, "below\n");
    kubelet.stop_pod(&pod);
}
