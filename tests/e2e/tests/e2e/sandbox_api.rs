// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The Sandbox API as containerd 2.3 speaks it with `sandboxer = "shim"`: bootstrap parameters, a pod without a pause
//! container, and its members' tasks on the same connection.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api as task_api;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use e2e::{DEADLINE, Node, eventually, named, run, run_with_input};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Runtime;
use ttrpc::Code;
use ttrpc::context::{Context, with_duration};

const SHIM: &str = "/opt/coffer/bin/containerd-shim-coffer-v2";
const NAMESPACE: &str = "sandbox-api";
const SOCKET: &str = "/run/containerd/containerd.sock";

/// A containerd of one test with one pod. Its end is the pod's.
struct Pod {
    id: String,
    dir: PathBuf,
    runtime: Runtime,
    sandbox: SandboxClient,
    task: TaskClient,
}

fn context() -> Context {
    with_duration(DEADLINE)
}

/// A length-delimited field of a protobuf message.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(value.len()).unwrap()];
    bytes.extend_from_slice(value);
    bytes
}

/// CRI's `PodSandboxConfig` with a host name, a DNS server and 300 MB of memory.
fn config(hostname: &str) -> Any {
    let dns = field(4, &field(1, b"10.9.8.7"));
    // LinuxContainerResources.memory_limit_in_bytes = 300 000 000, as a varint.
    let resources = field(5, &[4 << 3, 0x80, 0xc6, 0x86, 0x8f, 0x01]);
    let value = [field(2, hostname.as_bytes()), dns, field(8, &resources)].concat();
    Any {
        type_url: "runtime.v1.PodSandboxConfig".to_owned(),
        value,
        ..Any::default()
    }
}

impl Pod {
    /// The shim of a pod, started as containerd 2.3 does.
    fn new(id: &str) -> Self {
        let dir = PathBuf::from("/run/sandbox-api").join(id);
        let bundle = dir.join(id);
        fs::create_dir_all(&bundle).unwrap();
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            containerd_grpc_address: SOCKET.to_owned(),
            containerd_ttrpc_address: format!("{SOCKET}.ttrpc"),
            ..BootstrapParams::default()
        };
        let script = format!(
            "cd {} && exec {SHIM} -namespace {NAMESPACE} -address {SOCKET} -id {id} start",
            bundle.display()
        );
        let input = params.write_to_bytes().unwrap();
        let reply = run_with_input("sh", &["-c", &script], &input).success();
        let result = BootstrapResult::parse_from_bytes(reply.stdout.as_bytes()).unwrap();
        assert_eq!(result.version, 3);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = runtime.block_on(Client::connect(&result.address)).unwrap();
        Self {
            id: id.to_owned(),
            dir,
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client),
            runtime,
        }
    }

    fn create(&self, hostname: &str) -> ttrpc::Result<api::CreateSandboxResponse> {
        let request = api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.dir.join(&self.id).display().to_string(),
            options: Some(config(hostname)).into(),
            ..Default::default()
        };
        let created = self.sandbox.create_sandbox(context(), &request);
        self.runtime.block_on(created)
    }

    fn start(&self) -> ttrpc::Result<api::StartSandboxResponse> {
        let request = api::StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let started = self.sandbox.start_sandbox(context(), &request);
        self.runtime.block_on(started)
    }

    fn state(&self) -> String {
        let request = api::SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let status = self.sandbox.sandbox_status(context(), &request);
        self.runtime.block_on(status).unwrap().state
    }

    fn wait(&self) -> u32 {
        let request = api::WaitSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let ended = self.sandbox.wait_sandbox(context(), &request);
        self.runtime.block_on(ended).unwrap().exit_status
    }

    fn stop(&self) {
        let request = api::StopSandboxRequest {
            sandbox_id: self.id.clone(),
            timeout_secs: 60,
            ..Default::default()
        };
        let stopped = self.sandbox.stop_sandbox(context(), &request);
        self.runtime.block_on(stopped).unwrap();
    }

    fn metrics(&self) -> String {
        let request = api::SandboxMetricsRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let metrics = self.sandbox.sandbox_metrics(context(), &request);
        let metrics = self.runtime.block_on(metrics).unwrap().metrics;
        metrics.unwrap_or_default().data.type_url.clone()
    }

    /// Runs `script` in a container of the pod to its end and answers its exit status.
    fn run(&self, id: &str, script: &str) -> u32 {
        let bundle = self.dir.join(id);
        write_bundle(&bundle, script);
        let create = task_api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        let start = task_api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let wait = task_api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let delete = task_api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let shutdown = task_api::ShutdownRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.runtime.block_on(async {
            self.task.create(context(), &create).await.unwrap();
            self.task.start(context(), &start).await.unwrap();
            let exit = self.task.wait(context(), &wait).await.unwrap();
            self.task.delete(context(), &delete).await.unwrap();
            self.task.shutdown(context(), &shutdown).await.unwrap();
            exit.exit_status
        })
    }

    /// Ends the shim as containerd does when it removes a pod.
    fn remove(&self) {
        let request = api::ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let ended = self.sandbox.shutdown_sandbox(context(), &request);
        self.runtime.block_on(ended).unwrap();
        eventually("the shim is gone", || {
            named("containerd-shim-coffer-v2").is_empty().then_some(())
        });
        self.delete();
    }

    /// containerd's `delete`.
    fn delete(&self) {
        let bundle = self.dir.join(&self.id);
        let script = format!(
            "cd {0} && exec {SHIM} -namespace {NAMESPACE} -address {SOCKET} -id {1} -bundle {0} delete",
            bundle.display(),
            self.id
        );
        run("sh", &["-c", &script]).success();
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

/// A container of busybox as containerd 2.x makes its spec: in the pod's network, IPC and UTS namespaces.
fn write_bundle(bundle: &Path, script: &str) {
    let bin = bundle.join("rootfs/bin");
    for name in ["bin", "etc", "proc", "dev"] {
        fs::create_dir_all(bundle.join("rootfs").join(name)).unwrap();
    }
    fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    fs::set_permissions(bin.join("busybox"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink("busybox", bin.join("sh")).unwrap();
    let spec = serde_json::json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "cwd": "/", "env": ["PATH=/bin"],
            "args": ["/bin/sh", "-c", script],
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
        ],
        "linux": { "namespaces": [
            { "type": "pid" }, { "type": "mount" }, { "type": "network", "path": "/proc/1/ns/net" },
            { "type": "ipc", "path": "/proc/1/ns/ipc" }, { "type": "uts", "path": "/proc/1/ns/uts" },
        ]},
    });
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
}

#[test]
fn pod_without_a_pause_container_runs_its_containers_in_one_vm() {
    let _node = Node::new("pod_without_a_pause_container_runs_its_containers_in_one_vm");
    let pod = Pod::new("api-pod");
    assert!(named("coffer-vmm").is_empty(), "not before it is described");
    pod.create("web").unwrap();
    let started = pod.start().unwrap();
    assert_eq!(named("coffer-vmm"), [i32::try_from(started.pid).unwrap()]);
    assert_eq!(pod.state(), "SANDBOX_READY");

    let as_described = "test $(busybox hostname) = web && \
        test $(busybox cat /etc/hostname) = web && \
        busybox grep -q 'nameserver 10.9.8.7' /etc/resolv.conf && \
        test -f /etc/hosts && \
        test $(busybox awk '/MemTotal/ {print $2}' /proc/meminfo) -lt 500000 && \
        echo note > /dev/shm/note";
    assert_eq!(pod.run("one", as_described), 0);
    assert_eq!(
        pod.run("two", "test $(busybox cat /dev/shm/note) = note; exit 4$?"),
        40,
        "containers share the pod's memory"
    );
    assert_eq!(pod.state(), "SANDBOX_READY", "it outlives its containers");
    assert_eq!(named("coffer-vmm").len(), 1);
    assert_eq!(pod.metrics(), "io.containerd.cgroups.v2.Metrics");

    pod.stop();
    pod.stop();
    assert_eq!(pod.wait(), 137);
    assert_eq!(pod.state(), "SANDBOX_NOTREADY");
    assert!(named("coffer-vmm").is_empty());
    pod.remove();
}

#[test]
fn death_of_the_vm_ends_the_wait_for_the_sandbox() {
    let _node = Node::new("death_of_the_vm_ends_the_wait_for_the_sandbox");
    let pod = Pod::new("api-death");
    pod.create("web").unwrap();
    pod.start().unwrap();
    let vmm = Pid::from_raw(named("coffer-vmm")[0]);
    let request = api::WaitSandboxRequest {
        sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    let ended = pod.runtime.block_on(async {
        let waiting = pod.sandbox.wait_sandbox(context(), &request);
        let (ended, killed) = tokio::join!(waiting, async { kill(vmm, Signal::SIGKILL) });
        killed.unwrap();
        ended.unwrap()
    });
    assert_eq!(ended.exit_status, 137);
    assert_eq!(pod.state(), "SANDBOX_NOTREADY");
    match pod.start() {
        Err(ttrpc::Error::RpcStatus(status)) => {
            assert_eq!(status.code(), Code::FAILED_PRECONDITION, "{status}");
        }
        other => panic!("{other:?}"),
    }
    pod.stop();
    pod.remove();
}
