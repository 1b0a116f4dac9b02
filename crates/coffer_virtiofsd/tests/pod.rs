// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The file server as a sandbox has it: a real server, real mounts, and a VM that is none. Needs root.
#![expect(clippy::unwrap_used, reason = "helpers outside the test functions")]

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_proto::api;
use driver_fake::{FakeDriver, Script, fake_spec};
use ids::Mib;
use pod_spec::{FolderAccess, FolderPropagation, HostFolder};
use rustix::process::{Pid, Signal, kill_process};
use sandbox::{
    ContainerKind, ContainerPlan, CreateTask, Deadlines, EventSink, GuestContainer, GuestRootfs,
    Host, PodPlan, ProcessId, SandboxError, SandboxHandle, SandboxOptions, StdioPaths, TaskEvent,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_coffer-virtiofsd");

/// How precious the node's containers are to its OOM killer: less than the test, so that anybody may set it.
const OOM_SCORE: i32 = 500;

/// A generous end of every wait.
const DEADLINE: Duration = Duration::from_secs(60);

async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap()
}

struct Nobody;

impl EventSink for Nobody {
    fn publish(&self, _: TaskEvent) {}
}

/// A node whose next container has these folders.
#[derive(Default)]
struct Node(Mutex<Vec<HostFolder>>);

impl Host for Node {
    fn plan_pod(&self) -> Result<PodPlan, SandboxError> {
        Ok(PodPlan {
            vm: fake_spec("pod".parse().unwrap()).unwrap(),
            overhead: Mib(64),
            configure: api::ConfigureSandboxRequest::new(),
            loopback: None,
            guard: Box::new(()),
        })
    }

    fn plan_container(&self, _: &CreateTask) -> Result<ContainerPlan, SandboxError> {
        let kind = ContainerKind::Guest(Box::new(GuestContainer {
            spec_json: br#"{"process":{"args":["sleep"]}}"#.to_vec(),
            oom_score_adj: Some(OOM_SCORE),
            limits: None,
            rootfs: GuestRootfs::Layered(Vec::new()),
            copied_mounts: Vec::new(),
            live: Vec::new(),
            written_back: Vec::new(),
            volumes: Vec::new(),
            sub_paths: Vec::new(),
            host_folders: self.0.lock().unwrap().clone(),
            block_devices: Vec::new(),
        }));
        Ok(ContainerPlan {
            kind,
            guard: Box::new(()),
        })
    }

    fn memory_limit(&self) -> Result<Option<Mib>, SandboxError> {
        Ok(None)
    }
}

struct Pod {
    node: Arc<Node>,
    sandbox: SandboxHandle,
}

impl Pod {
    fn new() -> Self {
        let node = Arc::<Node>::default();
        let sandbox = sandbox::spawn(SandboxOptions {
            id: "pod".parse().unwrap(),
            driver: FakeDriver::new(Script::new()),
            host: Arc::<Node>::clone(&node),
            events: Arc::new(Nobody),
            deadlines: Deadlines::default(),
            file_server: PROGRAM.into(),
            boot: sandbox::Boot::AtOnce,
        });
        Self { node, sandbox }
    }

    async fn create(&self, id: &str, folders: Vec<HostFolder>) -> Result<(), SandboxError> {
        *self.node.0.lock().unwrap() = folders;
        let task = CreateTask {
            container: id.parse().unwrap(),
            bundle: PathBuf::from("/bundle"),
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            shell: None,
        };
        bounded(self.sandbox.create(task)).await.map(drop)
    }

    /// The server's process id, if there is one.
    async fn server(&self) -> Option<u64> {
        let dump = bounded(self.sandbox.dump()).await.unwrap();
        dump.pointer("/vm/host_folders/server")?.as_u64()
    }

    async fn end(&self) {
        bounded(self.sandbox.terminate()).await;
    }
}

fn folder(name: &str, source: &Path, access: FolderAccess) -> HostFolder {
    HostFolder {
        name: name.to_owned(),
        source: source.to_owned(),
        access,
        propagation: FolderPropagation::Private,
        writable: Vec::new(),
    }
}

fn process(pid: u64) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

#[tokio::test]
async fn containers_of_a_pod_have_one_server_which_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("note"), "shared").unwrap();
    let pod = Pod::new();
    pod.create("none", Vec::new()).await.unwrap();
    assert_eq!(pod.server().await, None, "nobody needs one");

    let data = folder("rw-data", dir.path(), FolderAccess::ReadWrite);
    let fixed = folder("ro-data", dir.path(), FolderAccess::ReadOnly);
    pod.create("one", vec![data.clone()]).await.unwrap();
    let server = pod.server().await.unwrap();
    let score = fs::read_to_string(process(server).join("oom_score_adj")).unwrap();
    assert_eq!(score, format!("{OOM_SCORE}\n"), "not that of its parent");
    pod.create("two", vec![data, fixed]).await.unwrap();
    assert_eq!(pod.server().await, Some(server));
    for name in ["rw-data", "ro-data"] {
        let note = process(server).join("root").join(name).join("note");
        assert_eq!(fs::read(note).unwrap(), b"shared", "{name}");
    }

    let gone = folder("rw-gone", &dir.path().join("gone"), FolderAccess::ReadWrite);
    let error = pod.create("three", vec![gone]).await.unwrap_err().report();
    assert!(
        error.contains("gone") && error.contains("with the pod"),
        "{error}"
    );
    assert_eq!(pod.server().await, Some(server), "the others go on");

    pod.end().await;
    assert!(!process(server).exists());
}

#[tokio::test]
async fn lost_server_ends_the_pod_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let pod = Pod::new();
    let data = folder("rw-data", dir.path(), FolderAccess::ReadWrite);
    pod.create("web", vec![data]).await.unwrap();
    let init = ProcessId::init("web".parse().unwrap());
    bounded(pod.sandbox.start(init.clone())).await.unwrap();
    let server = pod.server().await.unwrap();
    let pid = Pid::from_raw(i32::try_from(server).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(bounded(pod.sandbox.wait(init)).await.unwrap().status, 137);
    let dump = bounded(pod.sandbox.dump()).await.unwrap();
    let reason = dump["vm"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("the file server was ended by signal 9"),
        "{reason}"
    );
    pod.end().await;
}
