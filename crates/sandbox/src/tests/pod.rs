// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A sandbox over the fake driver, with everything around it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_proto::api;
use driver_fake::{FakeDriver, FakeVm, Script, fake_spec};
use hypervisor::{Disk, DiskAccess};
use ids::Mib;
use pod_spec::{HostCopy, HostFolder, Limits, LiveVolume, WriteBack};
use pod_storage::{EmptyDirVolume, WrittenBack};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::{
    Boot, ContainerKind, ContainerPlan, CreateTask, Deadlines, Deleted, EventSink, ExecTask, Exit,
    GuestContainer, GuestDisk, GuestRootfs, Host, InterfaceCounters, KillScope, Pid, PodPlan,
    ProcessId, SandboxError, SandboxErrorKind, SandboxHandle, SandboxOptions, StdioPaths,
    TaskEvent, spawn,
};

/// A wait in real time that no machine needs.
pub(super) const LONG: Duration = Duration::from_secs(5);

/// The events so far, as short words: "created web", "exited web/probe 137".
#[derive(Clone)]
pub(super) struct Told(watch::Sender<Vec<String>>);

impl EventSink for Told {
    fn publish(&self, event: TaskEvent) {
        let text = match event {
            TaskEvent::Created { request, .. } => format!("created {}", request.container),
            TaskEvent::Started { container, .. } => format!("started {container}"),
            TaskEvent::ExecAdded { container, exec } => format!("added {container}/{exec}"),
            TaskEvent::ExecStarted {
                container, exec, ..
            } => format!("started {container}/{exec}"),
            TaskEvent::OutOfMemory { container } => format!("oom {container}"),
            TaskEvent::Paused { container } => format!("paused {container}"),
            TaskEvent::Resumed { container } => format!("resumed {container}"),
            TaskEvent::Exited { process, exit, .. } => match process.exec {
                None => format!("exited {} {}", process.container, exit.status),
                Some(exec) => format!("exited {}/{exec} {}", process.container, exit.status),
            },
            TaskEvent::Deleted { container, .. } => format!("deleted {container}"),
        };
        self.0.send_modify(|told| told.push(text));
    }
}

/// A container that the fake host knows.
#[derive(Clone)]
pub(super) enum Known {
    Sandbox,
    /// The guest's program, and the serial numbers of the rootfs's disks.
    Guest(Vec<&'static str>, Vec<&'static str>),
    /// The guest's program, and a host file that gets back what it leaves.
    Writer(Vec<&'static str>, PathBuf, WriteBack),
    /// A container that sleeps, and volumes that are kept current.
    Reader(Vec<LiveVolume>),
    Sharer(Vec<HostFolder>),
    /// A container that sleeps, with limits.
    Limited(Limits),
    /// A container that sleeps, with a value for the node's OOM killer.
    Precious(i32),
    /// A container that sleeps, and emptyDirs with the files that their disks are in.
    Keeper(Vec<PathBuf>),
}

/// A file server that is not there.
pub(super) const FILE_SERVER: &str = "/nowhere/coffer-virtiofsd";

pub(super) struct FakeHost {
    known: Mutex<BTreeMap<String, Known>>,
    /// What the pod's cgroup on the host allows the VM.
    pub(super) memory_limit: Mutex<Option<Mib>>,
    /// What is made on the host and not undone yet.
    pub(super) made: Arc<()>,
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

fn spec(args: &[&str]) -> Vec<u8> {
    serde_json::json!({ "process": { "args": args } })
        .to_string()
        .into_bytes()
}

impl Host for FakeHost {
    fn plan_pod(&self) -> Result<PodPlan, SandboxError> {
        Ok(PodPlan {
            vm: fake_spec("pod".parse().unwrap()).unwrap(),
            overhead: Mib(64),
            configure: api::ConfigureSandboxRequest {
                hostname: "pod".to_owned(),
                ..Default::default()
            },
            loopback: None,
            guard: Box::new(Arc::clone(&self.made)),
        })
    }

    fn plan_container(&self, task: &CreateTask) -> Result<ContainerPlan, SandboxError> {
        let known = self.known.lock().unwrap();
        let known = known.get(task.container.as_str()).cloned();
        let kind = match known {
            None => {
                return Err(SandboxError::new(
                    SandboxErrorKind::InvalidArgument,
                    "the bundle is no bundle",
                ));
            }
            Some(Known::Sandbox) => ContainerKind::Sandbox,
            Some(Known::Guest(args, serials)) => guest(container(&args, serials)),
            Some(Known::Reader(live)) => guest(GuestContainer {
                live,
                ..container(&["sleep"], vec!["layer"])
            }),
            Some(Known::Sharer(host_folders)) => guest(GuestContainer {
                host_folders,
                ..container(&["sleep"], vec!["layer"])
            }),
            Some(Known::Limited(limits)) => guest(GuestContainer {
                limits: Some(limits),
                ..container(&["sleep"], vec!["layer"])
            }),
            Some(Known::Precious(adjustment)) => guest(GuestContainer {
                oom_score_adj: Some(adjustment),
                ..container(&["sleep"], vec!["layer"])
            }),
            Some(Known::Keeper(files)) => guest(GuestContainer {
                volumes: files.iter().map(|file| empty_dir(file)).collect(),
                ..container(&["sleep"], vec!["layer"])
            }),
            Some(Known::Writer(args, source, back)) => {
                let copy = HostCopy {
                    index: 0,
                    source,
                    back: Some(back),
                };
                guest(GuestContainer {
                    written_back: WrittenBack::open_all(&[copy]).unwrap(),
                    ..container(&args, vec!["layer"])
                })
            }
        };
        Ok(ContainerPlan {
            kind,
            guard: Box::new(Arc::clone(&self.made)),
        })
    }

    fn memory_limit(&self) -> Result<Option<Mib>, SandboxError> {
        Ok(*self.memory_limit.lock().unwrap())
    }

    fn interfaces(&self) -> Vec<InterfaceCounters> {
        interfaces()
    }
}

/// What the pod's only interface has counted.
pub(super) fn interfaces() -> Vec<InterfaceCounters> {
    vec![InterfaceCounters {
        name: "eth0".to_owned(),
        ..InterfaceCounters::default()
    }]
}

fn guest(container: GuestContainer) -> ContainerKind {
    ContainerKind::Guest(Box::new(container))
}

fn container(args: &[&str], serials: Vec<&str>) -> GuestContainer {
    GuestContainer {
        spec_json: spec(args),
        oom_score_adj: None,
        limits: Some(Limits::default()),
        rootfs: GuestRootfs::Layered(serials.into_iter().map(disk).collect()),
        copied_mounts: Vec::new(),
        live: Vec::new(),
        written_back: Vec::new(),
        volumes: Vec::new(),
        sub_paths: Vec::new(),
        host_folders: Vec::new(),
        block_devices: Vec::new(),
    }
}

/// An emptyDir that is named like the file that its disk is in.
fn empty_dir(file: &Path) -> EmptyDirVolume {
    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
    let disk = Disk {
        serial: name.parse().unwrap(),
        file: File::options().read(true).write(true).open(file).unwrap(),
        access: DiskAccess::ReadWrite,
    };
    let medium = api::volume::Medium::Disk(api::Disk {
        serial: name.clone(),
        fs_type: "ext4".to_owned(),
        ..Default::default()
    });
    EmptyDirVolume {
        volume: api::Volume {
            name,
            medium: Some(medium),
            ..Default::default()
        },
        disk: Some(disk),
    }
}

fn disk(serial: &str) -> GuestDisk {
    GuestDisk {
        disk: Disk {
            serial: serial.parse().unwrap(),
            file: null(),
            access: DiskAccess::ReadOnly,
        },
        fs_type: "erofs".to_owned(),
        mount_options: vec!["ro".to_owned()],
    }
}

pub(super) fn init(id: &str) -> ProcessId {
    ProcessId::init(id.parse().unwrap())
}

pub(super) fn exec(id: &str, exec: &str) -> ProcessId {
    ProcessId::exec(id.parse().unwrap(), exec.parse().unwrap())
}

pub(super) struct Pod {
    pub(super) script: Script,
    pub(super) driver: Arc<FakeDriver>,
    pub(super) host: Arc<FakeHost>,
    pub(super) told: Told,
    pub(super) sandbox: SandboxHandle,
    pub(super) dir: TempDir,
}

impl Pod {
    pub(super) fn new(script: &Script) -> Self {
        Self::with(script, Boot::AtOnce)
    }

    pub(super) fn with(script: &Script, boot: Boot) -> Self {
        let driver = FakeDriver::new(script.clone());
        let host = Arc::new(FakeHost {
            known: Mutex::default(),
            memory_limit: Mutex::new(None),
            made: Arc::new(()),
        });
        let told = Told(watch::Sender::new(Vec::new()));
        let sandbox = spawn(SandboxOptions {
            id: "pod".parse().unwrap(),
            driver: Arc::<FakeDriver>::clone(&driver),
            host: Arc::<FakeHost>::clone(&host),
            events: Arc::new(told.clone()),
            deadlines: Deadlines::default(),
            file_server: FILE_SERVER.into(),
            boot,
        });
        Self {
            script: script.clone(),
            driver,
            host,
            told,
            sandbox,
            dir: TempDir::new().unwrap(),
        }
    }

    pub(super) fn vm(&self) -> Arc<FakeVm> {
        self.driver.vms().remove(0)
    }

    pub(super) fn know(&self, id: &str, known: Known) {
        self.host.known.lock().unwrap().insert(id.to_owned(), known);
    }

    pub(super) fn task(id: &str) -> CreateTask {
        CreateTask {
            container: id.parse().unwrap(),
            bundle: PathBuf::from("/bundle"),
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            shell: None,
        }
    }

    pub(super) async fn create_as(&self, id: &str, known: Known) -> Result<Pid, SandboxError> {
        self.know(id, known);
        self.sandbox.create(Self::task(id)).await
    }

    pub(super) async fn create(
        &self,
        id: &str,
        args: &[&'static str],
    ) -> Result<Pid, SandboxError> {
        self.create_as(id, Known::Guest(args.to_vec(), vec!["layer"]))
            .await
    }

    /// A container that runs.
    pub(super) async fn run(&self, id: &str, args: &[&'static str]) {
        self.create(id, args).await.unwrap();
        self.start(&init(id)).await.unwrap();
    }

    pub(super) async fn start(&self, process: &ProcessId) -> Result<Pid, SandboxError> {
        self.sandbox.start(process.clone()).await
    }

    pub(super) fn exec_task(process: &ProcessId, args: &[&str]) -> ExecTask {
        let json = serde_json::json!({ "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 } });
        ExecTask {
            container: process.container.clone(),
            exec: process.exec.clone().unwrap(),
            process_json: json.to_string().into_bytes(),
            stdio: StdioPaths::default(),
        }
    }

    pub(super) async fn exec(
        &self,
        process: &ProcessId,
        args: &[&str],
    ) -> Result<Pid, SandboxError> {
        self.sandbox.exec(Self::exec_task(process, args)).await?;
        self.start(process).await
    }

    pub(super) async fn wait(&self, process: &ProcessId) -> u32 {
        self.sandbox.wait(process.clone()).await.unwrap().status
    }

    pub(super) async fn kill(&self, process: &ProcessId, signal: u32) -> Result<(), SandboxError> {
        self.sandbox
            .kill(process.clone(), signal, KillScope::Process)
            .await
    }

    pub(super) async fn delete(&self, process: &ProcessId) -> Result<Deleted, SandboxError> {
        self.sandbox.delete(process.clone()).await
    }

    pub(super) fn events(&self) -> Vec<String> {
        self.told.0.borrow().clone()
    }

    pub(super) async fn told(&self, event: &str) {
        let mut told = self.told.0.subscribe();
        told.wait_for(|told| told.iter().any(|each| each == event))
            .await
            .unwrap();
    }

    /// Paths of new FIFOs.
    pub(super) fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        path.display().to_string()
    }

    /// The sandbox has ended, every VM too, and nothing of it is left on the host.
    pub(super) async fn nothing_is_left(&self) {
        self.sandbox.ended().await;
        for vm in self.driver.vms() {
            let exit = hypervisor::RunningVm::wait(&*vm).await;
            drop(exit);
        }
        self.plans_are_undone().await;
        let answer = self.sandbox.state(init("web")).await;
        assert_eq!(
            answer.unwrap_err().kind(),
            SandboxErrorKind::Unavailable,
            "after the end"
        );
    }

    /// Nothing that a plan has made is left. A plan that nobody waits for any more goes on, and is dropped when it is there.
    pub(super) async fn plans_are_undone(&self) {
        let undone = async {
            while Arc::strong_count(&self.host.made) != 1 {
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, undone).await.expect("a plan's guard");
    }

    /// Deletes what is left, as containerd does, and shuts down.
    pub(super) async fn clean_up(&self, ids: &[&str]) {
        for id in ids {
            match self.delete(&init(id)).await {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), SandboxErrorKind::NotFound, "{error}"),
            }
        }
        self.sandbox.shutdown().await.unwrap();
        self.nothing_is_left().await;
    }
}

pub(super) fn kind<T: std::fmt::Debug>(result: Result<T, SandboxError>) -> SandboxErrorKind {
    result.unwrap_err().kind()
}

pub(super) fn status(exit: Exit) -> u32 {
    exit.status
}
