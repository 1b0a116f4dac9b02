// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods and containers over CRI, as a kubelet makes them.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use e2e::{BUSYBOX, DEADLINE, eventually};
use k8s_cri::v1;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

const SOCKET: &str = "unix:///run/containerd/containerd.sock";

/// A kubelet of one test: it removes its pods at its end.
pub(crate) struct Kubelet {
    pub(crate) runtime: Runtime,
    pub(crate) client: RuntimeServiceClient<Channel>,
    /// Where its pods' containers log to.
    pub(crate) logs: PathBuf,
    pods: Vec<String>,
}

/// A pod that runs.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) id: String,
    config: v1::PodSandboxConfig,
}

/// What an exec gave.
#[derive(Debug)]
pub(crate) struct Executed {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Makes one CRI call and waits for its answer.
macro_rules! call {
    ($kubelet:expr, $method:ident, $request:expr) => {{
        let mut client = $kubelet.client.clone();
        let mut request = tonic::Request::new($request);
        request.set_timeout(e2e::DEADLINE);
        $kubelet
            .runtime
            .block_on(async move { client.$method(request).await })
            .map(tonic::Response::into_inner)
    }};
}
pub(crate) use call;

impl Kubelet {
    pub(crate) fn new(test: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let channel = runtime
            .block_on(Endpoint::from_static(SOCKET).connect())
            .unwrap();
        let logs = PathBuf::from("/var/log/pods").join(test);
        fs::create_dir_all(&logs).unwrap();
        Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
            logs,
            pods: Vec::new(),
        }
    }

    /// Runs a pod under Coffer.
    pub(crate) fn run_pod(&mut self, name: &str) -> Pod {
        self.run_pod_with(name, |_| ()).unwrap()
    }

    /// Runs a pod after `change` was made to its config.
    pub(crate) fn run_pod_with(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut v1::PodSandboxConfig),
    ) -> Result<Pod, tonic::Status> {
        let mut config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler(),
        };
        let id = call!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        self.pods.push(id.clone());
        Ok(Pod { id, config })
    }

    /// Makes a container of the busybox image; it does not run yet.
    pub(crate) fn create(&self, pod: &Pod, name: &str, attempt: u32, command: &[&str]) -> String {
        self.create_with(pod, name, attempt, command, |_| ())
            .unwrap()
    }

    pub(crate) fn create_with(
        &self,
        pod: &Pod,
        name: &str,
        attempt: u32,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<String, tonic::Status> {
        let mut config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.to_owned(),
                attempt,
            }),
            image: Some(v1::ImageSpec {
                image: BUSYBOX.to_owned(),
                ..Default::default()
            }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}_{attempt}.log"),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        call!(self, create_container, request).map(|response| response.container_id)
    }

    pub(crate) fn start(&self, container: &str) {
        self.try_start(container).unwrap();
    }

    pub(crate) fn try_start(&self, container: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest {
            container_id: container.to_owned(),
        };
        call!(self, start_container, request).map(|_| ())
    }

    /// Makes and starts a container.
    pub(crate) fn run(&self, pod: &Pod, name: &str, command: &[&str]) -> String {
        let id = self.create(pod, name, 0, command);
        self.start(&id);
        id
    }

    pub(crate) fn exec(&self, container: &str, command: &[&str]) -> Executed {
        self.try_exec(container, command).unwrap()
    }

    pub(crate) fn try_exec(
        &self,
        container: &str,
        command: &[&str],
    ) -> Result<Executed, tonic::Status> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: i64::try_from(DEADLINE.as_secs()).unwrap(),
        };
        let response = call!(self, exec_sync, request)?;
        Ok(Executed {
            code: response.exit_code,
            stdout: String::from_utf8_lossy(&response.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&response.stderr).into_owned(),
        })
    }

    pub(crate) fn stop(&self, container: &str, grace: Duration) {
        let timeout = i64::try_from(grace.as_secs()).unwrap();
        let request = v1::StopContainerRequest {
            container_id: container.to_owned(),
            timeout,
        };
        call!(self, stop_container, request).unwrap();
    }

    pub(crate) fn remove(&self, container: &str) {
        call!(
            self,
            remove_container,
            v1::RemoveContainerRequest {
                container_id: container.to_owned()
            }
        )
        .unwrap();
    }

    pub(crate) fn status(&self, container: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        call!(self, container_status, request)
            .unwrap()
            .status
            .unwrap()
    }

    /// Gives a container other limits.
    pub(crate) fn update(
        &self,
        container: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<(), tonic::Status> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        call!(self, update_container_resources, request).map(drop)
    }

    /// The CPU time that a container has used in ns, and its working set in bytes.
    pub(crate) fn usage(&self, container: &str) -> (u64, u64) {
        let request = v1::ContainerStatsRequest {
            container_id: container.to_owned(),
        };
        let stats = call!(self, container_stats, request).unwrap().stats;
        let (cpu, memory) = stats.and_then(|stats| stats.cpu.zip(stats.memory)).unwrap();
        (
            cpu.usage_core_nano_seconds.unwrap().value,
            memory.working_set_bytes.unwrap().value,
        )
    }

    /// The CPU time of containers in ns, as one list of all containers' figures has it.
    pub(crate) fn usages_in_list<const N: usize>(&self, containers: [&str; N]) -> [u64; N] {
        let request = v1::ListContainerStatsRequest { filter: None };
        let all = call!(self, list_container_stats, request).unwrap().stats;
        containers.map(|container| {
            let is_it = |stats: &&v1::ContainerStats| {
                let attributes = stats.attributes.as_ref();
                attributes.is_some_and(|attributes| attributes.id == container)
            };
            let cpu = all.iter().find(is_it).and_then(|stats| stats.cpu);
            cpu.unwrap().usage_core_nano_seconds.unwrap().value
        })
    }

    /// The bytes that a pod's eth0 has received and sent.
    pub(crate) fn network(&self, pod: &Pod) -> (u64, u64) {
        let request = v1::PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let stats = call!(self, pod_sandbox_stats, request).unwrap().stats;
        let network = stats.unwrap().linux.unwrap().network.unwrap();
        let eth0 = network.default_interface.unwrap();
        (eth0.rx_bytes.unwrap().value, eth0.tx_bytes.unwrap().value)
    }

    /// The containers of a pod for which there are figures.
    pub(crate) fn measured(&self, pod: &Pod) -> Vec<String> {
        let request = v1::ListContainerStatsRequest {
            filter: Some(v1::ContainerStatsFilter {
                pod_sandbox_id: pod.id.clone(),
                ..Default::default()
            }),
        };
        let stats = call!(self, list_container_stats, request).unwrap().stats;
        stats
            .into_iter()
            .filter(|stats| stats.cpu.is_some() && stats.memory.is_some())
            .filter_map(|stats| Some(stats.attributes?.id))
            .collect()
    }

    /// Waits for a container's end and gives its exit code.
    pub(crate) fn exit_code(&self, container: &str) -> i32 {
        let exited = i32::from(v1::ContainerState::ContainerExited);
        eventually("a container ends", || {
            let status = self.status(container);
            (status.state == exited).then_some(status.exit_code)
        })
    }

    pub(crate) fn pod_state(&self, pod: &Pod) -> i32 {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        call!(self, pod_sandbox_status, request)
            .unwrap()
            .status
            .unwrap()
            .state
    }

    /// The address that the CNI plugin gave a pod.
    pub(crate) fn pod_ip(&self, pod: &Pod) -> String {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let status = call!(self, pod_sandbox_status, request).unwrap().status;
        status.unwrap().network.unwrap().ip
    }

    pub(crate) fn stop_pod(&self, pod: &Pod) {
        call!(
            self,
            stop_pod_sandbox,
            v1::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone()
            }
        )
        .unwrap();
    }

    pub(crate) fn remove_pod(&self, pod: &Pod) {
        call!(
            self,
            remove_pod_sandbox,
            v1::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id.clone()
            }
        )
        .unwrap();
    }

    /// The ids of all pods that containerd knows.
    pub(crate) fn all_pods(&self) -> Vec<String> {
        let listed = call!(
            self,
            list_pod_sandbox,
            v1::ListPodSandboxRequest { filter: None }
        );
        let items = listed.unwrap().items;
        items.into_iter().map(|pod| pod.id).collect()
    }

    /// Waits until containerd answers, after it was away.
    pub(crate) fn await_containerd(&self) {
        eventually("containerd answers", || {
            let list = v1::ListPodSandboxRequest { filter: None };
            call!(self, list_pod_sandbox, list).ok()
        });
    }

    /// Stops and removes every pod that containerd knows, as a kubelet does with those that it does not.
    pub(crate) fn remove_all_pods(&self) {
        self.await_containerd();
        for pod_sandbox_id in self.all_pods() {
            let stop = v1::StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
            };
            call!(self, stop_pod_sandbox, stop).unwrap();
            let remove = v1::RemovePodSandboxRequest { pod_sandbox_id };
            call!(self, remove_pod_sandbox, remove).unwrap();
        }
        assert_eq!(self.all_pods(), Vec::<String>::new());
    }

    /// Leaves its pods to others.
    pub(crate) fn forget_pods(&mut self) {
        self.pods.clear();
    }

    /// Where a port of a pod is forwarded to.
    pub(crate) fn port_forward(&self, pod: &Pod, port: u16) -> String {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![i32::from(port)],
        };
        call!(self, port_forward, request).unwrap().url
    }

    /// The lines that a container logged to `stream`, without CRI's time stamps and tags.
    pub(crate) fn log(&self, name: &str, attempt: u32, stream: &str) -> String {
        let log = fs::read(self.logs.join(format!("{name}_{attempt}.log"))).unwrap_or_default();
        lines_of(&String::from_utf8_lossy(&log), stream)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        for pod in std::mem::take(&mut self.pods) {
            let stop = v1::StopPodSandboxRequest {
                pod_sandbox_id: pod.clone(),
            };
            if let Err(status) = call!(self, stop_pod_sandbox, stop) {
                eprintln!("pod {pod} is not stopped: {status}");
            }
            if let Err(status) = call!(
                self,
                remove_pod_sandbox,
                v1::RemovePodSandboxRequest {
                    pod_sandbox_id: pod.clone()
                }
            ) {
                eprintln!("pod {pod} is not removed: {status}");
            }
        }
        let _ = fs::remove_dir_all(&self.logs);
    }
}

/// A log's lines of one stream, without CRI's time stamps and tags.
fn lines_of(log: &str, stream: &str) -> String {
    let of_stream = |line: &str| {
        let mut fields = line.splitn(4, ' ');
        (fields.nth(1) == Some(stream)).then(|| fields.nth(1).unwrap_or_default().to_owned() + "\n")
    };
    log.lines().filter_map(of_stream).collect()
}

/// The runtime handler of every pod. With another than Coffer's one sees whether a case is Kubernetes' or Coffer's.
fn handler() -> String {
    std::env::var("COFFER_E2E_HANDLER").unwrap_or_else(|_| "coffer".to_owned())
}

/// A kubelet's default: pod-wide network and ipc, a pid namespace for each container.
fn namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: i32::from(v1::NamespaceMode::Pod),
        pid: i32::from(v1::NamespaceMode::Container),
        ipc: i32::from(v1::NamespaceMode::Pod),
        ..Default::default()
    }
}

/// Resources of a pod as a kubelet sums them up.
pub(crate) fn resources(memory_bytes: i64, cpu_quota: i64) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        memory_limit_in_bytes: memory_bytes,
        cpu_quota,
        cpu_period: 100_000,
        unified: HashMap::new(),
        ..Default::default()
    }
}
