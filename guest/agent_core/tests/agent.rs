// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent on a machine that is none: what it tells and what it undoes.
#![expect(clippy::unwrap_used, reason = "test")]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};

use agent_core::{
    Agent, Cgroups, Code, ContainerPlan, Error, ExecPlan, FileEnd, Files, Gate, Job, Launched,
    PidNamespace, PutPlan, RootfsPlan, SandboxPlan, StdioPlan, System,
};
use agent_proto::{ProcessKey, api};
use ids::{ContainerId, Generation};
use oci_process::Streams;
use oci_spec::runtime::LinuxResources;

#[derive(Default)]
struct Fake {
    log: Mutex<Vec<String>>,
    oom_kills: Mutex<u64>,
    fail_ready: bool,
    fail_freeze: bool,
    /// While it is shut, mounts take for ever.
    mounts: (Mutex<bool>, Condvar),
}

struct Process {
    fails: bool,
}

impl Fake {
    fn note(&self, line: impl Into<String>) {
        self.log.lock().unwrap().push(line.into());
    }

    fn open_mounts(&self) {
        *self.mounts.0.lock().unwrap() = true;
        self.mounts.1.notify_all();
    }
}

impl Files for Fake {
    fn put(&self, plan: &PutPlan) -> Result<(), Error> {
        self.note(format!("put {}", plan.volume));
        Ok(())
    }

    fn read_copied(&self, _: &ContainerId, index: u32, max: usize) -> Result<FileEnd, Error> {
        self.note(format!("read {index} {max}"));
        Ok(FileEnd {
            size: 5,
            data: b"ended".to_vec(),
        })
    }
}

impl System for Fake {
    fn configure(&self, _: &SandboxPlan) -> Result<(), Error> {
        Ok(())
    }

    fn make_container(&self, plan: &ContainerPlan) -> Result<(), Error> {
        if plan.key.container.as_str() == "slow" {
            let open = self.mounts.0.lock().unwrap();
            drop(self.mounts.1.wait_while(open, |open| !*open).unwrap());
        }
        self.note(format!("make {}", plan.key.container));
        Ok(())
    }

    fn launch(&self, _: Job<'_>, _: Streams) -> Result<Box<dyn Launched>, Error> {
        Ok(Box::new(Process {
            fails: self.fail_ready,
        }))
    }

    fn signal(&self, _: &OwnedFd, signal: u32) -> Result<(), Error> {
        self.note(format!("signal {signal}"));
        Ok(())
    }

    fn signal_all(&self, container: &ContainerId, signal: u32) -> Result<(), Error> {
        self.note(format!("signal all {container} {signal}"));
        Ok(())
    }

    fn processes(&self, _: &ContainerId) -> Result<Vec<u32>, Error> {
        Ok(vec![7, 99])
    }

    fn oom_kills(&self, _: &ContainerId) -> u64 {
        *self.oom_kills.lock().unwrap()
    }

    fn remove_container(&self, container: &ContainerId) -> Result<(), Error> {
        self.note(format!("remove {container}"));
        Ok(())
    }

    fn set_clock(&self, _: u64) -> Result<(), Error> {
        self.note("set the clock".to_owned());
        Ok(())
    }

    fn power_off(&self) {}
}

impl Cgroups for Fake {
    fn freeze(&self, container: &ContainerId) -> Result<(), Error> {
        if container.as_str() == "slow" {
            let open = self.mounts.0.lock().unwrap();
            drop(self.mounts.1.wait_while(open, |open| !*open).unwrap());
        }
        self.note(format!("freeze {container}"));
        if self.fail_freeze {
            return Err(Error::Internal("freezing"));
        }
        Ok(())
    }

    fn thaw(&self, container: &ContainerId) -> Result<(), Error> {
        self.note(format!("thaw {container}"));
        Ok(())
    }

    fn update(&self, container: &ContainerId, _: &LinuxResources) -> Result<(), Error> {
        self.note(format!("update {container}"));
        Ok(())
    }

    fn stats(&self, _: &ContainerId) -> Result<api::ContainerStats, Error> {
        Ok(api::ContainerStats::default())
    }
}

impl Launched for Process {
    fn pid(&self) -> u32 {
        7
    }

    fn handle(&self) -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn ready(self: Box<Self>) -> Result<(Box<dyn Gate>, Option<OwnedFd>), Error> {
        if self.fails {
            return Err(Error::Internal("getting ready"));
        }
        Ok((self, None))
    }
}

impl Gate for Process {
    fn start(self: Box<Self>) -> Result<(), Error> {
        Ok(())
    }
}

fn plan(id: &str) -> ContainerPlan {
    ContainerPlan {
        key: ProcessKey {
            container: id.parse().unwrap(),
            exec: None,
            generation: Generation(1),
        },
        spec: Arc::default(),
        pids: PidNamespace::Own,
        rootfs: RootfsPlan::Layered(Vec::new()),
        stdio: StdioPlan::default(),
        copied: Vec::new(),
        volumes: Vec::new(),
        sub_paths: Vec::new(),
        host_folders: None,
    }
}

#[tokio::test]
async fn oom_is_told_before_the_exit_that_it_caused() {
    let agent = Agent::new(Arc::new(Fake::default()));
    assert_eq!(agent.create_container(plan("c")).await.unwrap(), 7);
    agent.start_container(&"c".parse().unwrap()).await.unwrap();
    *agent.system().oom_kills.lock().unwrap() = 1;
    agent.reaped(7, 137);
    let events = agent.events().next(0).await;
    assert!(matches!(
        events.first().unwrap().event,
        Some(api::event::Event::OutOfMemory(_))
    ));
    assert!(
        matches!(&events.get(1).unwrap().event, Some(api::event::Event::Exited(exited)) if exited.exit_status == 137)
    );
    agent.remove_container(&"c".parse().unwrap()).await.unwrap();
    assert_eq!(*agent.system().log.lock().unwrap(), ["make c", "remove c"]);
}

#[tokio::test]
async fn failed_create_is_undone_and_frees_the_name() {
    let agent = Agent::new(Arc::new(Fake {
        fail_ready: true,
        ..Fake::default()
    }));
    for _ in 0..2 {
        let error = agent.create_container(plan("c")).await.unwrap_err();
        assert_eq!(error.code(), Code::Internal);
    }
    let undone = ["make c", "signal 9", "remove c"];
    assert_eq!(
        *agent.system().log.lock().unwrap(),
        [undone, undone].concat()
    );
    // Nobody is told of a process that never was.
    agent.reaped(7, 127);
    assert_eq!(agent.events().state(), (0, 0));
}

#[tokio::test]
async fn slow_mount_delays_neither_signals_nor_events() {
    let agent = Agent::new(Arc::new(Fake::default()));
    let slow = tokio::spawn({
        let agent = agent.clone();
        async move { agent.create_container(plan("slow")).await }
    });
    agent.create_container(plan("quick")).await.unwrap();
    let quick = plan("quick").key;
    agent.signal(&quick, 15, false).await.unwrap();
    agent.reaped(7, 143);
    assert_eq!(agent.events().next(0).await.len(), 1);
    assert!(!slow.is_finished());
    let error = agent.create_container(plan("slow")).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    agent.system().open_mounts();
    slow.await.unwrap().unwrap();
}

fn exec_plan() -> ExecPlan {
    ExecPlan {
        key: ProcessKey {
            exec: Some("e".parse().unwrap()),
            generation: Generation(2),
            ..plan("c").key
        },
        process: oci_spec::runtime::Process::default(),
        stdio: StdioPlan::default(),
    }
}

#[tokio::test]
async fn frozen_container_takes_no_exec_until_it_is_thawed() {
    let agent = Agent::new(Arc::new(Fake::default()));
    let id = "c".parse().unwrap();
    let error = agent.pause(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    agent.create_container(plan("c")).await.unwrap();
    let error = agent.pause(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "not started");
    agent.start_container(&id).await.unwrap();
    agent.pause(&id).await.unwrap();
    let error = agent.pause(&id).await.unwrap_err();
    assert_eq!(error.to_string(), "container c is paused");
    let error = agent.start_exec(exec_plan()).await.unwrap_err();
    assert_eq!(error.to_string(), "container c is paused");
    agent.update(&id, LinuxResources::default()).await.unwrap();
    let error = agent.start_exec(exec_plan()).await.unwrap_err();
    assert_eq!(error.to_string(), "container c is paused");
    agent.signal(&plan("c").key, 9, false).await.unwrap();
    agent.resume(&id).await.unwrap();
    agent.resume(&id).await.unwrap();
    agent.start_exec(exec_plan()).await.unwrap();
    assert_eq!(
        *agent.system().log.lock().unwrap(),
        [
            "make c", "freeze c", "update c", "signal 9", "thaw c", "thaw c"
        ]
    );
}

#[tokio::test]
async fn container_that_cannot_be_frozen_goes_on() {
    let agent = Agent::new(Arc::new(Fake {
        fail_freeze: true,
        ..Fake::default()
    }));
    let id = "c".parse().unwrap();
    agent.create_container(plan("c")).await.unwrap();
    agent.start_container(&id).await.unwrap();
    assert_eq!(agent.pause(&id).await.unwrap_err().code(), Code::Internal);
    agent.start_exec(exec_plan()).await.unwrap();
}

#[tokio::test]
async fn one_change_of_a_container_at_a_time() {
    let agent = Agent::new(Arc::new(Fake::default()));
    let id: ContainerId = "slow".parse().unwrap();
    agent.system().open_mounts();
    agent.create_container(plan("slow")).await.unwrap();
    agent.start_container(&id).await.unwrap();
    *agent.system().mounts.0.lock().unwrap() = false;
    let mut slow = Box::pin(agent.pause(&id));
    tokio::select! {
        biased;
        _ = &mut slow => unreachable!("it is held"),
        () = tokio::task::yield_now() => {}
    }
    let resources = LinuxResources::default();
    let error = agent.update(&id, resources.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "container slow is being changed");
    agent.stats(&id).await.unwrap();
    agent.system().open_mounts();
    slow.await.unwrap();
    agent.update(&id, resources).await.unwrap();
}

#[tokio::test]
async fn copied_file_of_a_known_container_is_read_up_to_the_cap() {
    let agent = Agent::new(Arc::new(Fake::default()));
    let id: ContainerId = "c".parse().unwrap();
    let error = agent.read_copied(&id, 0, 4096).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    agent.create_container(plan("c")).await.unwrap();
    let max = u32::try_from(agent_proto::MAX_FILE_END_LEN).unwrap();
    let end = agent.read_copied(&id, 0, max).await.unwrap();
    assert_eq!(end.data, b"ended");
    let error = agent.read_copied(&id, 0, max + 1).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}
