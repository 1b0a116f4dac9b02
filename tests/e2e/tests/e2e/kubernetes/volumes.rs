// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes that kubelet gives to containers, beside what `volumes.rs` and `host_folders.rs` of the suite check.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use k8s_cri::v1;

use super::client::{Running, security};
use super::shared::Shared;
use crate::volumes::{IDLE, PodDir, becomes, mount, sh, write};

static POD: Shared<Running> = Shared::new(|| Running::new("volumes"));

/// A container that idles with these mounts.
fn with(pod: &Running, name: &str, mounts: Vec<v1::Mount>) -> String {
    pod.kubelet
        .run_with(&pod.pod, name, &IDLE, |config| config.mounts = mounts)
}

fn output(pod: &Running, container: &str, script: &str) -> String {
    let executed = pod.kubelet.exec(container, &sh(script));
    assert_eq!(executed.code, 0, "{script}: {executed:?}");
    executed.stdout
}

#[test]
fn volume_is_mounted_at_two_paths_of_one_container() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("twice");
    let id = with(
        &pod,
        "twice",
        vec![mount(&volume, "/one", false), mount(&volume, "/two", true)],
    );
    assert_eq!(
        output(&pod, &id, "echo both > /one/file; cat /two/file"),
        "both\n"
    );
    let refused = pod.kubelet.exec(&id, &sh("rm /two/file"));
    assert!(
        refused.stderr.contains("Read-only file system"),
        "{refused:?}"
    );
    pod.discard(&id);
}

#[test]
fn volume_hides_what_the_image_has_at_its_path() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("hides");
    let id = with(&pod, "hides", vec![mount(&volume, "/home", false)]);
    assert_eq!(
        output(&pod, &id, "ls -A /home | wc -l; touch /home/new; ls /home"),
        "0\nnew\n"
    );
    assert_eq!(pod.output("ls /home"), "app\n", "of another container");
    pod.discard(&id);
}

#[test]
fn path_of_a_volume_is_made_if_the_image_has_none() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("deep");
    let id = with(&pod, "deep", vec![mount(&volume, "/a/b c/d", false)]);
    assert_eq!(
        output(
            &pod,
            &id,
            "echo x > '/a/b c/d/file'; ls '/a/b c/d'; grep -c 040 /proc/mounts"
        ),
        "file\n1\n"
    );
    pod.discard(&id);
}

#[test]
fn volume_is_mounted_inside_another() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let (outer, inner) = (dir.empty_dir("outer"), dir.empty_dir("inner"));
    // In kubelet's order, which is not the one that they are mounted in.
    let id = with(
        &pod,
        "nested",
        vec![
            mount(&outer, "/v", false),
            mount(&inner, "/v/in/side", false),
        ],
    );
    output(
        &pod,
        &id,
        "echo outer > /v/file; echo inner > /v/in/side/file",
    );
    let other = with(
        &pod,
        "apart",
        vec![
            mount(&inner, "/inner", false),
            mount(&outer, "/outer", false),
        ],
    );
    assert_eq!(
        output(
            &pod,
            &other,
            "cat /inner/file /outer/file; ls /outer/in/side | wc -l"
        ),
        "inner\nouter\n0\n"
    );
    pod.discard(&id);
    pod.discard(&other);
}

#[test]
fn projected_volume_holds_files_of_every_source() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.written("projected", "all");
    let files = [
        ("token", "eyJhbGciOi"),
        ("ca.crt", "-----BEGIN"),
        ("labels", "app=\"shop\"\ntier=\"front\""),
        ("settings.yaml", "colour: blue\n"),
    ];
    write(&volume, "..2026_01_01_00_00_00.1", &files);
    let id = with(&pod, "projected", vec![mount(&volume, "/all", true)]);
    for (name, content) in files {
        assert_eq!(
            output(&pod, &id, &format!("cat /all/{name}")),
            content,
            "{name}"
        );
    }
    assert_eq!(
        output(&pod, &id, "ls /all"),
        "ca.crt\nlabels\nsettings.yaml\ntoken\n"
    );
    pod.discard(&id);
}

#[test]
fn items_of_a_config_map_may_lie_in_folders_with_modes_of_their_own() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.written("configmap", "items");
    let state = volume.join("..1");
    fs::create_dir_all(state.join("conf.d/deep")).unwrap();
    for (path, mode) in [("conf.d/one.conf", 0o400), ("conf.d/deep/two.sh", 0o755)] {
        fs::write(state.join(path), format!("echo {path}\n")).unwrap();
        fs::set_permissions(state.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("..1", volume.join("..data")).unwrap();
    symlink("..data/conf.d", volume.join("conf.d")).unwrap();
    let id = with(&pod, "items", vec![mount(&volume, "/config", true)]);
    let script = "cd /config/conf.d && stat -c '%a %n' one.conf deep/two.sh && cat one.conf && sh deep/two.sh";
    assert_eq!(
        output(&pod, &id, script),
        "400 one.conf\n755 deep/two.sh\necho conf.d/one.conf\nconf.d/deep/two.sh\n"
    );
    pod.discard(&id);
}

#[test]
fn config_map_of_a_thousand_keys_is_whole_and_follows() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.written("configmap", "keys");
    let names: Vec<String> = (0..1000).map(|number| format!("key-{number}")).collect();
    let state = |value: &str| {
        let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), value)).collect();
        write(&volume, &format!("..{value}"), &files);
    };
    state("old");
    let id = with(&pod, "keys", vec![mount(&volume, "/config", true)]);
    let count = "ls /config | wc -l; cat /config/* | md5sum | cut -d' ' -f1";
    let sum = |value: &str| {
        let text = value.repeat(1000);
        let output = e2e::run_with_input("md5sum", &[], text.as_bytes()).success();
        output.stdout.split(' ').next().unwrap().to_owned()
    };
    assert_eq!(output(&pod, &id, count), format!("1000\n{}\n", sum("old")));
    state("new");
    becomes(&pod.kubelet, &id, count, &format!("1000\n{}\n", sum("new")));
    pod.discard(&id);
}

#[test]
fn binary_data_of_a_config_map_is_whole() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.written("configmap", "binary");
    write(&volume, "..1", &[("logo", "")]);
    let bytes: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    fs::write(volume.join("..1/logo"), &bytes).unwrap();
    let id = with(&pod, "binary", vec![mount(&volume, "/config", true)]);
    let sum = e2e::run("md5sum", &[volume.join("logo").to_str().unwrap()]).stdout;
    let seen = output(&pod, &id, "md5sum < /config/logo; wc -c < /config/logo");
    assert_eq!(seen.split(' ').next(), sum.split(' ').next());
    assert!(seen.ends_with("\n70000\n"), "{seen}");
    pod.discard(&id);
}

#[test]
fn empty_dir_has_links_pipes_and_sparse_files() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("kinds");
    let id = with(&pod, "kinds", vec![mount(&volume, "/v", false)]);
    let script = "cd /v && echo one > file && ln file hard && ln -s file soft && mkfifo pipe && \
                  truncate -s 1G sparse && chown 1:2 file && chmod 4750 file && \
                  stat -c '%n %F %h %a %u:%g' hard soft pipe && stat -c '%s' sparse && du -k sparse | cut -f1";
    assert_eq!(
        output(&pod, &id, script),
        "hard regular file 2 4750 1:2\nsoft symbolic link 1 777 0:0\npipe fifo 1 644 0:0\n1073741824\n0\n"
    );
    pod.discard(&id);
}

#[test]
fn pipe_in_an_empty_dir_joins_two_containers() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("pipe");
    let mounts = || vec![mount(&volume, "/v", false)];
    let reader = with(&pod, "reader", mounts());
    let writer = with(&pod, "writer", mounts());
    output(
        &pod,
        &reader,
        "mkfifo /v/pipe; (cat /v/pipe; echo over) > /got 2> /dev/null &",
    );
    output(&pod, &writer, "echo through the pipe > /v/pipe");
    becomes(
        &pod.kubelet,
        &reader,
        "cat /got",
        "through the pipe\nover\n",
    );
    pod.discard(&reader);
    pod.discard(&writer);
}

#[test]
fn file_of_a_sub_path_is_mounted_over_one_of_the_image() {
    let pod = POD.case();
    let mut dir = PodDir::new("volumes");
    let volume = dir.written("secret", "passwords");
    write(&volume, "..1", &[("passwd", "someone:x:7:7::/:/bin/sh\n")]);
    let part = dir.sub_path(&volume, "..1/passwd", "passwords", 0);
    let id = with(&pod, "part", vec![mount(&part, "/etc/passwd", true)]);
    assert_eq!(
        output(&pod, &id, "cat /etc/passwd; head -c 4 /etc/group"),
        "someone:x:7:7::/:/bin/sh\nroot"
    );
    let refused = pod.kubelet.exec(&id, &sh("echo x >> /etc/passwd"));
    assert!(
        refused.stderr.contains("Read-only file system"),
        "{refused:?}"
    );
    pod.discard(&id);
}

#[test]
fn fs_group_of_an_empty_dir_is_that_of_what_a_user_writes_in_it() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("group");
    std::os::unix::fs::chown(&volume, None, Some(3000)).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2775)).unwrap();
    let script = "stat -c '%a %u:%g' /v; touch /v/file; mkdir /v/folder; touch /v/folder/file; stat -c '%u:%g' /v/file /v/folder/file";
    let ended = pod.script("group", script, |config| {
        config.mounts = vec![mount(&volume, "/v", false)];
        security(config).run_as_user = Some(v1::Int64Value { value: 1000 });
        security(config).supplemental_groups = vec![3000];
    });
    assert_eq!(ended.stdout, "2775 0:3000\n1000:3000\n1000:3000\n");
}

#[test]
fn host_path_through_a_link_is_what_the_link_points_to() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let target = dir.path.join("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("file"), "behind the link\n").unwrap();
    let link = dir.path.join("link");
    symlink(&target, &link).unwrap();
    let id = with(&pod, "link", vec![mount(&link, "/linked", false)]);
    assert_eq!(
        output(&pod, &id, "cat /linked/file; echo back > /linked/new"),
        "behind the link\n"
    );
    assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "back\n");
    pod.discard(&id);
}

#[test]
fn claim_of_two_thousand_files_is_listed_whole() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let claim = dir.claim("many");
    for number in 0..2000 {
        fs::write(
            claim.join(format!("a-file-with-a-longer-name-{number:04}")),
            "",
        )
        .unwrap();
    }
    let id = with(&pod, "many", vec![mount(&claim, "/data", false)]);
    let script = "ls /data | wc -l; ls /data | head -1; ls /data | tail -1";
    assert_eq!(
        output(&pod, &id, script),
        "2000\na-file-with-a-longer-name-0000\na-file-with-a-longer-name-1999\n"
    );
    pod.discard(&id);
}

#[test]
fn claim_keeps_what_was_synced_when_its_container_is_killed() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let claim = dir.claim("synced");
    let script =
        "i=0; while :; do i=$((i + 1)); echo $i >> /data/log; sync /data/log; echo $i; done";
    let id = pod
        .kubelet
        .run_with(&pod.pod, "synced", &sh(script), |config| {
            config.mounts = vec![mount(&claim, "/data", false)];
        });
    pod.kubelet.logs("synced", 0, "20\n");
    pod.kubelet.stop(&id, std::time::Duration::ZERO);
    assert_eq!(pod.kubelet.exit_code(&id), 137);
    let last = |text: &str| -> u32 { text.lines().last().unwrap().parse().unwrap() };
    let logged = last(&pod.kubelet.log("synced", 0, "stdout"));
    let kept = last(&fs::read_to_string(claim.join("log")).unwrap());
    assert!(kept >= logged, "{logged} was told to be on disk, {kept} is");
    pod.kubelet.remove(&id);
}

#[test]
fn host_path_that_is_not_there_is_made() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let missing = dir.path.join("not/there");
    let id = with(&pod, "made", vec![mount(&missing, "/data", false)]);
    output(&pod, &id, "echo written > /data/file");
    assert_eq!(
        fs::read_to_string(missing.join("file")).unwrap(),
        "written\n"
    );
    pod.discard(&id);
}

#[test]
fn termination_message_of_every_attempt_is_its_own() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    for attempt in 0..2 {
        let log = dir.termination_log(&format!("attempt-{attempt}"));
        let script = format!("echo -n 'failed {attempt}' > /dev/termination-log; exit 1");
        let id = pod
            .kubelet
            .create_with(&pod.pod, "message", attempt, &sh(&script), |config| {
                config.mounts = vec![mount(&log, "/dev/termination-log", false)];
            })
            .unwrap();
        pod.kubelet.start(&id);
        assert_eq!(pod.kubelet.exit_code(&id), 1);
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            format!("failed {attempt}")
        );
        pod.kubelet.remove(&id);
    }
}

#[test]
fn volumes_of_a_container_are_told_by_its_status() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("told");
    let id = with(&pod, "told", vec![mount(&volume, "/told", true)]);
    let status = pod.kubelet.status(&id);
    let told = status
        .mounts
        .iter()
        .find(|mount| mount.container_path == "/told")
        .unwrap();
    assert_eq!(
        (told.host_path.as_str(), told.readonly),
        (volume.to_str().unwrap(), true)
    );
    pod.discard(&id);
}

#[test]
fn what_one_container_makes_in_an_empty_dir_another_cannot_make_again() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let volume = dir.empty_dir("lock");
    let mounts = || vec![mount(&volume, "/v", false)];
    let holder = with(&pod, "holder", mounts());
    let waiter = with(&pod, "waiter", mounts());
    let take = sh("mkdir /v/lock 2>/dev/null && echo taken || echo held");
    let taken = |id: &str| pod.kubelet.exec(id, &take).stdout;
    assert_eq!(
        (taken(&holder).as_str(), taken(&waiter).as_str()),
        ("taken\n", "held\n")
    );
    output(&pod, &holder, "rmdir /v/lock");
    assert_eq!(
        (taken(&waiter).as_str(), taken(&holder).as_str()),
        ("taken\n", "held\n")
    );
    pod.discard(&holder);
    pod.discard(&waiter);
}

#[test]
fn socket_or_device_of_the_host_is_refused_by_name() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let socket = dir.path.join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let shared = "sockets, pipes and devices of the host";
    for (name, path, readonly, words) in [
        ("socket-ro", socket.as_path(), true, "socket is a socket"),
        ("socket-rw", &socket, false, shared),
        ("kmsg-ro", Path::new("/dev/kmsg"), true, "kmsg is a"),
        ("kmsg-rw", Path::new("/dev/kmsg"), false, shared),
    ] {
        let refused = pod.kubelet.create_with(&pod.pod, name, 0, &IDLE, |config| {
            config.mounts = vec![mount(path, path.to_str().unwrap(), readonly)];
        });
        let started = refused.and_then(|id| pod.kubelet.try_start(&id));
        let message = started.unwrap_err().message().to_owned();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn shared_memory_may_be_a_larger_volume() {
    let pod = POD.case();
    let mut dir = PodDir::new("volumes");
    let large = dir.memory_dir("large", "128m");
    let id = with(&pod, "large-shm", vec![mount(&large, "/dev/shm", false)]);
    let size = "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2";
    assert_eq!(output(&pod, &id, size), "131072\n");
    assert_eq!(pod.output(size), "65536\n", "of another container");
    pod.discard(&id);
}

#[test]
fn single_file_of_the_host_cannot_be_written_if_it_is_read_only() {
    let pod = POD.case();
    let dir = PodDir::new("volumes");
    let file = dir.path.join("license.pem");
    fs::write(&file, "of the host\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
    let id = with(&pod, "file", vec![mount(&file, "/etc/app/license", true)]);
    let script = "cat /etc/app/license; stat -c %a /etc/app/license";
    assert_eq!(output(&pod, &id, script), "of the host\n604\n");
    for script in ["echo x >> /etc/app/license", "rm /etc/app/license"] {
        assert_ne!(pod.kubelet.exec(&id, &sh(script)).code, 0, "{script}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "of the host\n");
    pod.discard(&id);
}
