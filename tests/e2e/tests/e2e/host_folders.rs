// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes that are the host's own directories: claims and hostPaths, through the pod's file server.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::time::Duration;

use e2e::{Node, eventually, named, parent_of, run};
use k8s_cri::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_client::Kubelet;
use crate::volumes::{IDLE, PodDir, becomes, mount, output, run_with, sh};

const SERVER: &str = "coffer-virtiofsd";

fn owner(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
}

fn set_owner(path: &Path, (mode, uid, gid): (u32, u32, u32)) {
    chown(path, Some(uid), Some(gid)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn claim_is_the_hosts_directory_with_owners_and_modes() {
    let _node = Node::new("claim_is_the_hosts_directory_with_owners_and_modes");
    let dir = PodDir::new("claim");
    let mut kubelet = Kubelet::new("claim");
    let pod = kubelet.run_pod("claim");
    let claim = dir.claim("pvc-1");
    set_owner(&claim, (0o2770, 0, 2000));
    fs::write(claim.join("from-host"), "of the host\n").unwrap();
    set_owner(&claim.join("from-host"), (0o640, 1000, 2000));
    let main = run_with(
        &kubelet,
        &pod,
        "main",
        &IDLE,
        vec![mount(&claim, "/data", false)],
    );
    let script = "cat /data/from-host; stat -c '%a %u %g' /data /data/from-host";
    assert_eq!(
        output(&kubelet, &main, script),
        "of the host\n2770 0 2000\n640 1000 2000\n"
    );

    let script = "cd /data && mkdir -p one/two && echo of the guest > one/new && mv one/new one/two/file && \
                  ln -s two/file one/link && chown 1001:2001 one/two/file && chmod 604 one/two/file && rm from-host && \
                  sync one/two/file && readlink one/link";
    assert_eq!(output(&kubelet, &main, script), "two/file\n");
    let file = claim.join("one/two/file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "of the guest\n");
    assert_eq!(owner(&file), (0o604, 1001, 2001));
    assert_eq!(
        owner(&claim.join("one")).2,
        2000,
        "of the directory's group"
    );
    assert_eq!(
        fs::read_link(claim.join("one/link")).unwrap(),
        Path::new("two/file")
    );
    assert!(!claim.join("from-host").exists());

    fs::write(&file, "changed by the host\n").unwrap();
    becomes(
        &kubelet,
        &main,
        "cat /data/one/link",
        "changed by the host\n",
    );
    assert_eq!(named(SERVER).len(), 1);
    kubelet.stop_pod(&pod);
    eventually("the file server is gone with its pod", || {
        named(SERVER).is_empty().then_some(())
    });
}

#[test]
fn claim_is_one_for_the_containers_of_a_pod_and_outlives_them() {
    let _node = Node::new("claim_is_one_for_the_containers_of_a_pod_and_outlives_them");
    let dir = PodDir::new("claims");
    let mut kubelet = Kubelet::new("claims");
    let pod = kubelet.run_pod("claims");
    let claim = dir.claim("pvc-1");
    let with = |name: &str, readonly: bool| {
        let mounts = vec![mount(&claim, "/data", readonly)];
        run_with(&kubelet, &pod, name, &IDLE, mounts)
    };
    let writer = with("writer", false);
    let other = with("other", false);
    let reader = with("reader", true);
    // What one has written the other sees at once: they have one file system.
    output(&kubelet, &writer, "echo first > /data/note");
    assert_eq!(output(&kubelet, &other, "cat /data/note"), "first\n");
    becomes(&kubelet, &reader, "cat /data/note", "first\n");
    let refused = kubelet.exec(&reader, &sh("echo x > /data/other"));
    assert!(refused.stderr.contains("Read-only"), "{refused:?}");
    // Container and exec end, the claim stays.
    for container in [&writer, &other] {
        kubelet.stop(container, Duration::ZERO);
        kubelet.remove(container);
    }
    let after = with("after", false);
    assert_eq!(output(&kubelet, &after, "cat /data/note"), "first\n");
    assert_eq!(named(SERVER).len(), 1, "one for all of the pod");
}

#[test]
fn read_only_host_path_cannot_be_written_and_may_be_large() {
    let _node = Node::new("read_only_host_path_cannot_be_written_and_may_be_large");
    let dir = PodDir::new("host-path");
    let mut kubelet = Kubelet::new("host-path");
    let pod = kubelet.run_pod("host-path");
    let folder = dir.path.join("host-path");
    fs::create_dir(&folder).unwrap();
    // More than a pod could have copied.
    fs::write(folder.join("large"), "0123456789abcdef".repeat(1 << 19)).unwrap();
    let file = dir.path.join("file");
    fs::write(&file, "before\n").unwrap();
    let mounts = vec![
        mount(&folder, "/folder", true),
        mount(&file, "/file", false),
    ];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let sum = run("md5sum", &[folder.join("large").to_str().unwrap()]).stdout;
    let read = output(&kubelet, &main, "md5sum < /folder/large");
    assert_eq!(read.split(' ').next(), sum.split(' ').next());
    for script in [
        "echo x > /folder/new",
        "rm /folder/large",
        "chmod 777 /folder/large",
    ] {
        let refused = kubelet.exec(&main, &sh(script));
        assert!(
            refused.stderr.contains("Read-only"),
            "{script}: {refused:?}"
        );
    }
    output(&kubelet, &main, "echo after > /file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "after\n");
}

#[test]
fn later_mounts_of_the_host_arrive_where_they_are_asked_for() {
    let _node = Node::new("later_mounts_of_the_host_arrive_where_they_are_asked_for");
    let mut dir = PodDir::new("propagation");
    let mut kubelet = Kubelet::new("propagation");
    let pod = kubelet.run_pod("propagation");
    let claim = dir.claim("pvc-1");
    dir.make_shared(&claim);
    let with = |propagation: v1::MountPropagation| v1::Mount {
        propagation: i32::from(propagation),
        ..mount(&claim, "/data", false)
    };
    let refused = kubelet.create_with(&pod, "both", 0, &IDLE, |config| {
        config.mounts = vec![with(v1::MountPropagation::PropagationBidirectional)];
    });
    let started = refused.and_then(|id| kubelet.try_start(&id));
    let message = started.unwrap_err().message().to_owned();
    assert!(message.contains("HostToContainer"), "{message}");

    let mounts = vec![with(v1::MountPropagation::PropagationHostToContainer)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let place = claim.join("late");
    fs::create_dir(&place).unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", place.to_str().unwrap()]).success();
    fs::write(place.join("note"), "mounted later\n").unwrap();
    becomes(&kubelet, &main, "cat /data/late/note", "mounted later\n");
    kubelet.stop_pod(&pod);
    run("umount", &[place.to_str().unwrap()]).success();
}

#[test]
fn killed_file_server_ends_its_pod_with_the_truth() {
    let node = Node::new("killed_file_server_ends_its_pod_with_the_truth");
    let dir = PodDir::new("server-killed");
    let mut kubelet = Kubelet::new("server-killed");
    let pod = kubelet.run_pod("server-killed");
    let claim = dir.claim("pvc-1");
    let main = run_with(
        &kubelet,
        &pod,
        "main",
        &IDLE,
        vec![mount(&claim, "/data", false)],
    );
    output(&kubelet, &main, "echo acknowledged > /data/note && sync");
    kill(Pid::from_raw(named(SERVER)[0]), Signal::SIGKILL).unwrap();
    assert_eq!(kubelet.exit_code(&main), 137);
    let not_ready = i32::from(v1::PodSandboxState::SandboxNotready);
    eventually("the pod is not ready", || {
        (kubelet.pod_state(&pod) == not_ready).then_some(())
    });
    assert!(node.log().contains("the file server"), "the log says why");
    assert_eq!(
        fs::read_to_string(claim.join("note")).unwrap(),
        "acknowledged\n"
    );
}

#[test]
fn killed_shim_takes_its_file_server_along() {
    let _node = Node::new("killed_shim_takes_its_file_server_along");
    let dir = PodDir::new("shim-killed");
    let mut kubelet = Kubelet::new("shim-killed");
    let pod = kubelet.run_pod("shim-killed");
    let claim = dir.claim("pvc-1");
    let main = run_with(
        &kubelet,
        &pod,
        "main",
        &IDLE,
        vec![mount(&claim, "/data", false)],
    );
    let shim = parent_of(named(SERVER)[0]).unwrap();
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    eventually("VMM and file server are gone", || {
        [SERVER, "coffer-vmm"]
            .iter()
            .all(|name| named(name).is_empty())
            .then_some(())
    });
    assert_ne!(kubelet.exit_code(&main), 0);
}
