// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Images over CRI's image service, and what their configuration means for a container.

use std::time::Duration;

use e2e::{BUSYBOX, run};
use k8s_cri::v1;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use serde_json::{Value, json};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::client::{Ended, Running, image, security, until};
use super::image_archive;
use super::shared::Shared;
use crate::cri_client::call;
use crate::volumes::{IDLE, sh};

static POD: Shared<Running> = Shared::new(|| Running::new("images"));

/// CRI's image service.
struct Images<'a> {
    runtime: &'a tokio::runtime::Runtime,
    client: ImageServiceClient<Channel>,
}

impl<'a> Images<'a> {
    fn of(pod: &'a Running) -> Self {
        let runtime = &pod.kubelet.runtime;
        let socket = Endpoint::from_static("unix:///run/containerd/containerd.sock");
        let channel = runtime.block_on(socket.connect()).unwrap();
        Self {
            runtime,
            client: ImageServiceClient::new(channel),
        }
    }

    fn status(&self, name: &str) -> Option<v1::Image> {
        let request = v1::ImageStatusRequest {
            image: Some(spec(name)),
            verbose: false,
        };
        call!(self, image_status, request).unwrap().image
    }

    fn list(&self) -> Vec<v1::Image> {
        call!(self, list_images, v1::ListImagesRequest { filter: None })
            .unwrap()
            .images
    }

    fn remove(&self, name: &str) -> Result<(), Status> {
        let request = v1::RemoveImageRequest {
            image: Some(spec(name)),
        };
        call!(self, remove_image, request).map(drop)
    }
}

fn spec(name: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    }
}

/// An image with this config, until it is dropped.
struct Made<'a> {
    images: Images<'a>,
    name: String,
}

impl<'a> Made<'a> {
    fn new(pod: &'a Running, name: &str, config: &Value) -> Self {
        Self::with_layers(pod, name, config, usize::MAX)
    }

    fn with_layers(pod: &'a Running, name: &str, config: &Value, layers: usize) -> Self {
        let name = format!("coffer.test/{name}:latest");
        image_archive::make(&name, config, layers);
        let images = Images::of(pod);
        until("CRI knows the image", || images.status(&name).is_some());
        Self { images, name }
    }

    /// What a script does in a container of this image.
    fn script(&self, pod: &Running, name: &str, script: &str) -> Ended {
        pod.script(name, script, |config| image(config, &self.name))
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.images.remove(&self.name) {
            eprintln!("{} is not removed: {error}", self.name);
        }
    }
}

#[test]
fn image_is_found_by_name_and_id() {
    let pod = POD.case();
    let images = Images::of(&pod);
    let found = images.status(BUSYBOX).unwrap();
    assert_eq!(found.repo_tags, [BUSYBOX]);
    assert!(found.size > 0, "{found:?}");
    assert!(found.id.starts_with("sha256:"), "{found:?}");
    assert_eq!(images.status(&found.id).unwrap().id, found.id);
    assert_eq!(
        images.status("coffer.test/busybox").unwrap().id,
        found.id,
        "latest is the default"
    );
    assert!(images.status("coffer.test/nothing:latest").is_none());
}

#[test]
fn names_of_one_image_are_listed_with_it_and_go_with_it() {
    let pod = POD.case();
    let made = Made::new(
        &pod,
        "names-one",
        &json!({"Cmd": ["sh"], "Env": ["NAMES=3"]}),
    );
    let images = &made.images;
    let all = [
        made.name.as_str(),
        "coffer.test/names-one:one",
        "coffer.test/names-one:two",
    ];
    for name in &all[1..] {
        run("ctr", &["-n", "k8s.io", "images", "tag", all[0], name]).success();
    }
    until("CRI knows all", || {
        all.iter().all(|name| images.status(name).is_some())
    });
    let id = images.status(all[0]).unwrap().id;
    let listed = images.list();
    let of_id: Vec<_> = listed.iter().filter(|image| image.id == id).collect();
    assert_eq!(of_id.len(), 1, "{listed:?}");
    let mut tags = of_id[0].repo_tags.clone();
    tags.sort();
    assert_eq!(tags, [all[0], all[1], all[2]].map(str::to_owned));
    // CRI's RemoveImage removes the image, whichever of its names it is given.
    images.remove(all[1]).unwrap();
    until("none is left", || {
        all.iter().all(|name| images.status(name).is_none())
    });
    assert!(
        images.status(BUSYBOX).is_some(),
        "an image with the same layers stays"
    );
}

#[test]
fn user_of_an_image_is_told_as_it_is_written() {
    let pod = POD.case();
    let images = Images::of(&pod);
    let named = images.status("coffer.test/busybox-user:latest").unwrap();
    assert_eq!((named.uid, named.username.as_str()), (None, "app"));
    let made = Made::new(
        &pod,
        "uid",
        &json!({"Cmd": ["sh"], "Env": ["PATH=/bin"], "User": "1234"}),
    );
    let numbered = images.status(&made.name).unwrap();
    assert_eq!(
        (numbered.uid.unwrap().value, numbered.username.as_str()),
        (1234, "")
    );
}

#[test]
fn image_that_is_not_there_is_removed_again() {
    let pod = POD.case();
    let images = Images::of(&pod);
    images.remove("coffer.test/nothing:latest").unwrap();
}

#[test]
fn container_of_an_image_that_is_not_there_is_refused_by_name() {
    let pod = POD.case();
    let refused = pod
        .kubelet
        .create_with(&pod.pod, "imageless", 0, &IDLE, |config| {
            image(config, "coffer.test/nothing:latest");
        });
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("coffer.test/nothing:latest"), "{message}");
}

#[test]
fn image_that_cannot_be_pulled_is_an_error_that_names_it() {
    let pod = POD.case();
    let images = Images::of(&pod);
    let request = v1::PullImageRequest {
        image: Some(spec("127.0.0.1:1/nothing:latest")),
        ..Default::default()
    };
    let error = call!(images, pull_image, request).unwrap_err();
    assert!(
        error.message().contains("127.0.0.1:1/nothing:latest"),
        "{error}"
    );
    assert!(error.message().contains("connection refused"), "{error}");
}

#[test]
fn file_system_of_the_images_is_measured() {
    let pod = POD.case();
    let images = Images::of(&pod);
    until("the snapshots are counted", || {
        let info = call!(images, image_fs_info, v1::ImageFsInfoRequest {}).unwrap();
        let used = info
            .image_filesystems
            .first()
            .and_then(|usage| usage.used_bytes);
        used.is_some_and(|bytes| bytes.value > 0)
    });
}

#[test]
fn user_and_group_of_an_image_may_be_numbers() {
    let pod = POD.case();
    let made = Made::new(
        &pod,
        "uid-gid",
        &json!({"Cmd": ["sh"], "Env": ["PATH=/bin"], "User": "1003:1004"}),
    );
    assert_eq!(
        made.script(&pod, "uid-gid", "id -u; id -g").stdout,
        "1003\n1004\n"
    );
}

#[test]
fn user_and_group_of_an_image_may_be_names() {
    let pod = POD.case();
    let made = Made::new(
        &pod,
        "names",
        &json!({"Cmd": ["sh"], "Env": ["PATH=/bin"], "User": "app:extra"}),
    );
    assert_eq!(
        made.script(&pod, "names", "id -u; id -g").stdout,
        "1000\n2000\n"
    );
}

#[test]
fn user_name_that_the_image_does_not_have_is_refused() {
    let pod = POD.case();
    let refused = pod
        .kubelet
        .create_with(&pod.pod, "stranger", 0, &IDLE, |config| {
            "stranger".clone_into(&mut security(config).run_as_username);
        });
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("no users found"), "{message}");
}

#[test]
fn entrypoint_and_cmd_of_an_image_are_one_command() {
    let pod = POD.case();
    let config =
        json!({"Entrypoint": ["echo", "entry"], "Cmd": ["cmd one", "two"], "Env": ["PATH=/bin"]});
    let made = Made::new(&pod, "entrypoint", &config);
    let id = pod
        .kubelet
        .run_with(&pod.pod, "both", &[], |config| image(config, &made.name));
    assert_eq!(pod.kubelet.exit_code(&id), 0);
    pod.kubelet.logs("both", 0, "entry cmd one two\n");
    pod.kubelet.remove(&id);
}

#[test]
fn stop_signal_of_an_image_is_what_stop_sends() {
    let pod = POD.case();
    let script = "trap 'echo usr1; exit 5' USR1; trap 'echo term; exit 6' TERM; echo ready; while :; do sleep 0.1; done";
    let config =
        json!({"Cmd": ["sh", "-c", script], "Env": ["PATH=/bin"], "StopSignal": "SIGUSR1"});
    let made = Made::new(&pod, "signal", &config);
    let id = pod
        .kubelet
        .run_with(&pod.pod, "signal", &[], |config| image(config, &made.name));
    pod.kubelet.logs("signal", 0, "ready");
    pod.kubelet.stop(&id, Duration::from_secs(60));
    assert_eq!(pod.kubelet.exit_code(&id), 5);
    pod.kubelet.remove(&id);
}

#[test]
fn volume_of_an_image_can_be_written_by_its_container() {
    let pod = POD.case();
    let config = json!({"Cmd": ["sh"], "Env": ["PATH=/bin"], "Volumes": {"/data": {}, "/etc": {}}});
    let made = Made::new(&pod, "volume", &config);
    let script = "echo kept > /data/file && cat /data/file && head -1 /etc/passwd && grep -c -E ' (/data|/etc) ' /proc/mounts";
    let ended = made.script(&pod, "volume", script);
    assert_eq!(
        ended.stdout, "kept\nroot:x:0:0:root:/root:/bin/sh\n2\n",
        "{ended:?}"
    );
}

#[test]
fn image_without_layers_does_not_run_and_says_what_is_missing() {
    let pod = POD.case();
    let made = Made::with_layers(&pod, "empty", &json!({"Cmd": ["/pause"]}), 0);
    let created = pod
        .kubelet
        .create_with(&pod.pod, "empty", 0, &[], |config| {
            image(config, &made.name);
        });
    let started = created.and_then(|id| pod.kubelet.try_start(&id));
    let message = started.unwrap_err().message().to_owned();
    assert!(message.contains("/pause"), "{message}");
    assert_eq!(pod.exec("exit 4").code, 4);
}

#[test]
fn image_without_a_command_is_refused() {
    let pod = POD.case();
    let made = Made::new(&pod, "speechless", &json!({"Env": ["PATH=/bin"]}));
    let refused = pod
        .kubelet
        .create_with(&pod.pod, "speechless", 0, &[], |config| {
            image(config, &made.name);
        });
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("no command specified"), "{message}");
}

#[test]
fn image_that_is_removed_goes_on_serving_who_runs_on_it() {
    let pod = POD.case();
    let made = Made::new(
        &pod,
        "short",
        &json!({"Cmd": ["sleep", "infinity"], "Env": ["PATH=/bin", "A=b"]}),
    );
    let id = pod
        .kubelet
        .run_with(&pod.pod, "short", &[], |config| image(config, &made.name));
    let images = Images::of(&pod);
    images.remove(&made.name).unwrap();
    until("it is gone", || images.status(&made.name).is_none());
    let executed = pod
        .kubelet
        .exec(&id, &sh("echo $A; sha256sum /bin/busybox | wc -c"));
    assert_eq!(
        (executed.code, executed.stdout.lines().next()),
        (0, Some("b")),
        "{executed:?}"
    );
    pod.discard(&id);
}
