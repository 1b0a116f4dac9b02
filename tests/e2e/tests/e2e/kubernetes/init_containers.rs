// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers that run before, beside and after a pod's own, as kubelet orders them.

use std::thread;

use k8s_cri::v1;

use super::client::{Running, security, until};
use super::shared::Shared;
use crate::volumes::{IDLE, PodDir, mount, sh};

static POD: Shared<Running> = Shared::new(|| Running::new("init"));

#[test]
fn init_containers_hand_their_files_to_the_pods_own() {
    let pod = POD.case();
    let dir = PodDir::new("init");
    let volume = dir.empty_dir("work");
    let with_volume = |config: &mut v1::ContainerConfig| {
        config.mounts = vec![mount(&volume, "/work", false)];
    };
    for (name, script) in [
        ("init-1", "echo one > /work/steps"),
        ("init-2", "echo two >> /work/steps"),
    ] {
        let ended = pod.script(name, script, with_volume);
        assert_eq!(ended.code, 0);
    }
    let ended = pod.script("own", "cat /work/steps", with_volume);
    assert_eq!(ended.stdout, "one\ntwo\n");
}

#[test]
fn init_container_that_fails_is_tried_again_until_it_succeeds() {
    let pod = POD.case();
    let dir = PodDir::new("init");
    let volume = dir.empty_dir("tries");
    let script = sh("echo x >> /tries/made; [ $(wc -l < /tries/made) -ge 3 ]");
    let mut codes = Vec::new();
    for attempt in 0..3 {
        let with_volume = |config: &mut v1::ContainerConfig| {
            config.mounts = vec![mount(&volume, "/tries", false)];
        };
        let id = pod
            .kubelet
            .create_with(&pod.pod, "tried", attempt, &script, with_volume)
            .unwrap();
        pod.kubelet.start(&id);
        codes.push(pod.kubelet.exit_code(&id));
        pod.kubelet.remove(&id);
    }
    assert_eq!(codes, [1, 1, 0]);
}

#[test]
fn init_container_leaves_no_process_and_no_memory_behind() {
    let pod = POD.case();
    let free = || -> u64 {
        let line = pod.output("grep MemAvailable /proc/meminfo");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before = free();
    let script = "sleep 1000 & dd if=/dev/zero of=/dev/shm/held bs=1M count=24 2>/dev/null; \
                  dd if=/dev/zero of=/file bs=1M count=8 2>/dev/null; rm /dev/shm/held";
    assert_eq!(pod.script("large", script, |_| ()).code, 0);
    until("the guest has its memory back", || {
        free() + (8 << 10) > before
    });
}

#[test]
fn sidecar_runs_from_before_the_pods_own_container_until_after_it() {
    let pod = POD.case();
    let sidecar = pod.kubelet.run(
        &pod.pod,
        "sidecar",
        &sh("mkdir /www; echo beside > /www/index.html; exec httpd -f -p 127.0.0.1:8100 -h /www"),
    );
    let fetch = "until wget -q -O - http://127.0.0.1:8100/; do sleep 0.2; done";
    let ended = pod.script("job", fetch, |_| ());
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "beside\n"));
    assert_eq!(
        pod.kubelet.status(&sidecar).state(),
        v1::ContainerState::ContainerRunning
    );
    pod.discard(&sidecar);
}

#[test]
fn containers_of_a_pod_start_at_the_same_time() {
    let pod = POD.case();
    let names = ["a", "b", "c", "d"];
    let ids: Vec<String> = thread::scope(|scope| {
        let start = |name: &'static str| {
            let pod = &pod;
            scope.spawn(move || {
                pod.kubelet
                    .run(&pod.pod, name, &sh(&format!("echo {name}")))
            })
        };
        let started = names.map(start);
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for (id, name) in ids.iter().zip(names) {
        assert_eq!(pod.kubelet.exit_code(id), 0);
        pod.kubelet.logs(name, 0, &format!("{name}\n"));
        pod.kubelet.remove(id);
    }
}

#[test]
fn ephemeral_container_is_added_to_a_pod_that_runs() {
    let pod = POD.case();
    pod.output("httpd -p 127.0.0.1:8200 -h /etc");
    let debugger = pod.kubelet.run_with(&pod.pod, "debugger", &IDLE, |config| {
        let add = vec!["SYS_PTRACE".to_owned()];
        security(config).capabilities = Some(v1::Capability {
            add_capabilities: add,
            ..Default::default()
        });
    });
    let fetched = pod.kubelet.exec(
        &debugger,
        &sh("wget -q -O - http://127.0.0.1:8200/passwd | head -1"),
    );
    assert_eq!(fetched.stdout, "root:x:0:0:root:/root:/bin/sh\n");
    pod.discard(&debugger);
    pod.output("killall httpd");
}
