// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! More of a kubelet's calls, and the pod with one idle container that most cases share.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use e2e::eventually;
use k8s_cri::v1;
use tonic::Status;

use crate::cri_client::{Executed, Kubelet, Pod, call};
use crate::volumes::{IDLE, sh};

/// What marks the end of a script's output.
const END: &str = "@end";

/// What a script in a container of its own has done.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
}

/// A pod with a container that runs.
pub(crate) struct Running {
    pub(crate) kubelet: Kubelet,
    pub(crate) pod: Pod,
    pub(crate) main: String,
}

impl Running {
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, |_| (), |_| ())
    }

    /// The same, after changes to the configs of pod and container.
    pub(crate) fn with(
        name: &str,
        of_pod: impl FnOnce(&mut v1::PodSandboxConfig),
        of_container: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Self {
        let mut kubelet = Kubelet::new(name);
        let pod = kubelet.run_pod_with(name, of_pod).unwrap();
        let main = kubelet.run_with(&pod, "main", &IDLE, of_container);
        Self { kubelet, pod, main }
    }

    pub(crate) fn exec(&self, script: &str) -> Executed {
        self.kubelet.exec(&self.main, &sh(script))
    }

    /// What a script prints in the container that runs; it must succeed.
    #[track_caller]
    pub(crate) fn output(&self, script: &str) -> String {
        let executed = self.exec(script);
        assert_eq!(executed.code, 0, "{script}: {executed:?}");
        executed.stdout
    }

    /// Runs a script in a container of its own to its end; the container is removed. `name` is new in the pod.
    pub(crate) fn script(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Ended {
        let script = format!("trap 'echo {END}' EXIT\n{script}");
        let id = self.kubelet.run_with(&self.pod, name, &sh(&script), change);
        let code = self.kubelet.exit_code(&id);
        let stdout = eventually("the log is whole", || {
            let log = self.kubelet.log(name, 0, "stdout");
            log.split_once(END).map(|(output, _)| output.to_owned())
        });
        self.kubelet.remove(&id);
        Ended { code, stdout }
    }

    /// Stops a container at once and removes it.
    pub(crate) fn discard(&self, container: &str) {
        self.kubelet.stop(container, Duration::ZERO);
        self.kubelet.remove(container);
    }
}

impl Kubelet {
    /// Makes and starts a container after `change` was made to its config.
    pub(crate) fn run_with(
        &self,
        pod: &Pod,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> String {
        let id = self.create_with(pod, name, 0, command, change).unwrap();
        self.start(&id);
        id
    }

    pub(crate) fn exec_within(
        &self,
        container: &str,
        command: &[&str],
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse, Status> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: i64::try_from(timeout.as_secs()).unwrap(),
        };
        call!(self, exec_sync, request)
    }

    pub(crate) fn try_remove(&self, container: &str) -> Result<(), Status> {
        let request = v1::RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        call!(self, remove_container, request).map(drop)
    }

    pub(crate) fn try_stop_pod(&self, pod: &str) -> Result<(), Status> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        call!(self, stop_pod_sandbox, request).map(drop)
    }

    pub(crate) fn try_remove_pod(&self, pod: &str) -> Result<(), Status> {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        call!(self, remove_pod_sandbox, request).map(drop)
    }

    pub(crate) fn try_status(&self, container: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        call!(self, container_status, request).map(|response| response.status.unwrap())
    }

    pub(crate) fn try_pod_status(&self, pod: &str) -> Result<v1::PodSandboxStatus, Status> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: false,
        };
        call!(self, pod_sandbox_status, request).map(|response| response.status.unwrap())
    }

    /// Names of the containers that a filter lets through, in order.
    pub(crate) fn list(&self, filter: v1::ContainerFilter) -> Vec<String> {
        let request = v1::ListContainersRequest {
            filter: Some(filter),
        };
        let containers = call!(self, list_containers, request).unwrap().containers;
        let mut names: Vec<String> = containers
            .into_iter()
            .map(|container| container.metadata.unwrap().name)
            .collect();
        names.sort();
        names
    }

    /// Names of the pods that a filter lets through, in order.
    pub(crate) fn list_pods(&self, filter: v1::PodSandboxFilter) -> Vec<String> {
        let request = v1::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let pods = call!(self, list_pod_sandbox, request).unwrap().items;
        let mut names: Vec<String> = pods
            .into_iter()
            .map(|pod| pod.metadata.unwrap().name)
            .collect();
        names.sort();
        names
    }

    /// Has the log file of a container opened anew, as after its rotation.
    pub(crate) fn reopen_log(&self, container: &str) -> Result<(), Status> {
        let request = v1::ReopenContainerLogRequest {
            container_id: container.to_owned(),
        };
        call!(self, reopen_container_log, request).map(drop)
    }

    pub(crate) fn stats(&self, container: &str) -> v1::ContainerStats {
        let request = v1::ContainerStatsRequest {
            container_id: container.to_owned(),
        };
        call!(self, container_stats, request)
            .unwrap()
            .stats
            .unwrap()
    }

    /// Names of the containers whose figures a filter lets through, in order.
    pub(crate) fn list_stats(&self, filter: v1::ContainerStatsFilter) -> Vec<String> {
        let request = v1::ListContainerStatsRequest {
            filter: Some(filter),
        };
        let stats = call!(self, list_container_stats, request).unwrap().stats;
        let mut names: Vec<String> = stats
            .into_iter()
            .map(|stats| stats.attributes.unwrap().metadata.unwrap().name)
            .collect();
        names.sort();
        names
    }

    pub(crate) fn pod_stats(&self, pod: &str) -> v1::PodSandboxStats {
        let request = v1::PodSandboxStatsRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        call!(self, pod_sandbox_stats, request)
            .unwrap()
            .stats
            .unwrap()
    }

    /// Where containerd streams an exec.
    pub(crate) fn url_of_exec(&self, container: &str, command: &[&str], terminal: bool) -> String {
        let request = v1::ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
        };
        call!(self, exec, request).unwrap().url
    }

    /// Where containerd streams a container's own input and output.
    pub(crate) fn url_of_attach(&self, container: &str, terminal: bool) -> String {
        let request = v1::AttachRequest {
            container_id: container.to_owned(),
            stdin: true,
            tty: terminal,
            stdout: true,
            stderr: !terminal,
        };
        call!(self, attach, request).unwrap().url
    }

    pub(crate) fn log_path(&self, name: &str, attempt: u32) -> PathBuf {
        self.logs.join(format!("{name}_{attempt}.log"))
    }

    /// A container's log file as it is.
    pub(crate) fn raw_log(&self, name: &str, attempt: u32) -> Vec<u8> {
        fs::read(self.log_path(name, attempt)).unwrap_or_default()
    }

    /// Waits until a container has logged this.
    pub(crate) fn logs(&self, name: &str, attempt: u32, wanted: &str) {
        eventually(&format!("{name} logs {wanted:?}"), || {
            self.log(name, attempt, "stdout")
                .contains(wanted)
                .then_some(())
        });
    }
}

/// Waits until something holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}

/// The security context of a container's config.
pub(crate) fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap()
}

/// Gives a container's config an image.
pub(crate) fn image(config: &mut v1::ContainerConfig, image: &str) {
    config.image.as_mut().unwrap().image = image.to_owned();
}

/// A field of `/proc/<pid>/status`.
pub(crate) fn field(status: &str, name: &str) -> String {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    assert!(line.is_some(), "no {name} in {status}");
    line.unwrap().trim().to_owned()
}
