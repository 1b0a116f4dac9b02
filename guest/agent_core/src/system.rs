// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the agent needs of the machine it runs on. [`crate::linux`] is the real one; tests have their own.
//!
//! Every call may block and is made on a thread that may; only [`System::signal`], [`System::oom_kills`] and
//! [`System::power_off`] are made on the event loop, and answer at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use agent_proto::api;
use ids::ContainerId;
use oci_process::Streams;
use oci_spec::runtime::{LinuxResources, Process, Spec};

use crate::Error;
use crate::pid_namespace::PidNamespace;
use crate::plan::{ContainerPlan, SandboxPlan};
use crate::volume_plan::PutPlan;

/// The files that the host has put into the guest.
pub trait Files {
    /// Takes one part of what a volume is to hold; with the last one the volume is made, or changed over to it.
    ///
    /// # Errors
    /// [`Error`]; the parts are forgotten.
    fn put(&self, plan: &PutPlan) -> Result<(), Error>;

    /// The last `max` bytes of a copied mount that is a single file, and how many it has.
    ///
    /// # Errors
    /// [`Error`].
    fn read_copied(
        &self,
        container: &ContainerId,
        index: u32,
        max: usize,
    ) -> Result<FileEnd, Error>;
}

/// The end of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEnd {
    /// How many bytes the file has.
    pub size: u64,
    /// The last of them.
    pub data: Vec<u8>,
}

/// The machine.
pub trait System: Cgroups + Files + Send + Sync + 'static {
    /// Makes what the pod's containers share.
    ///
    /// # Errors
    /// [`Error`] for the first thing that cannot be made; the sandbox is then of no use.
    fn configure(&self, plan: &SandboxPlan) -> Result<(), Error>;

    /// Makes a container's root file system, copied mounts and cgroup.
    ///
    /// # Errors
    /// [`Error`]; what was made is left for [`System::remove_container`].
    fn make_container(&self, plan: &ContainerPlan) -> Result<(), Error>;

    /// Makes the init or a further process of a container, which then waits for [`Launched::ready`].
    ///
    /// # Errors
    /// [`Error`]; no process is left.
    fn launch(&self, job: Job<'_>, streams: Streams) -> Result<Box<dyn Launched>, Error>;

    /// Sends a signal to a process; to one that has ended it is `NotFound`.
    ///
    /// # Errors
    /// [`Error`].
    fn signal(&self, process: &OwnedFd, signal: u32) -> Result<(), Error>;

    /// Sends a signal to every process of a container.
    ///
    /// # Errors
    /// [`Error`].
    fn signal_all(&self, container: &ContainerId, signal: u32) -> Result<(), Error>;

    /// The pids of a container's processes.
    ///
    /// # Errors
    /// [`Error`].
    fn processes(&self, container: &ContainerId) -> Result<Vec<u32>, Error>;

    /// How often the OOM killer has struck in a container; 0 if that is not known.
    fn oom_kills(&self, container: &ContainerId) -> u64;

    /// Ends what still runs in a container and takes away all that [`System::make_container`] made. What is not there is
    /// no error.
    ///
    /// # Errors
    /// [`Error`] for what cannot be taken away; the call may be repeated.
    fn remove_container(&self, container: &ContainerId) -> Result<(), Error>;

    /// Sets the wall clock, in ns since the epoch.
    ///
    /// # Errors
    /// [`Error`].
    fn set_clock(&self, wall_clock_ns: u64) -> Result<(), Error>;

    /// Syncs file systems and ends the machine.
    fn power_off(&self);
}

/// What can be changed and seen of a container's cgroup while it is there. Every call may block.
pub trait Cgroups {
    /// Freezes all processes of a container; answers once they are.
    ///
    /// # Errors
    /// [`Error`], also if that takes too long; none of them is frozen then.
    fn freeze(&self, container: &ContainerId) -> Result<(), Error>;

    /// Lets the processes of a container go on, frozen or not.
    ///
    /// # Errors
    /// [`Error`].
    fn thaw(&self, container: &ContainerId) -> Result<(), Error>;

    /// Sets the limits that are there; devices are left as they are.
    ///
    /// # Errors
    /// [`Error::Resource`] for what cannot be applied; what was set before it has been set back.
    fn update(&self, container: &ContainerId, resources: &LinuxResources) -> Result<(), Error>;

    /// What a container uses and may use.
    ///
    /// # Errors
    /// [`Error`] if it has no cgroup.
    fn stats(&self, container: &ContainerId) -> Result<api::ContainerStats, Error>;
}

/// A process to make.
#[derive(Debug, Clone, Copy)]
pub enum Job<'a> {
    /// A container's init.
    Init {
        /// The container.
        container: &'a ContainerId,
        /// Its spec.
        spec: &'a Spec,
        /// Its pid namespace, another container's by the pidfd of its init.
        pids: PidNamespace<&'a OwnedFd>,
    },
    /// A further process.
    Exec {
        /// The container.
        container: &'a ContainerId,
        /// Its spec.
        spec: &'a Spec,
        /// The pidfd of its init.
        init: &'a OwnedFd,
        /// What to run.
        process: &'a Process,
    },
}

/// A process that has a pid and waits. Dropped, it ends.
pub trait Launched: Send {
    /// The process's pid.
    fn pid(&self) -> u32;
    /// Its pidfd.
    fn handle(&self) -> Arc<OwnedFd>;
    /// Lets it become all it is to be, except its program; gives its terminal if it has one.
    ///
    /// # Errors
    /// [`Error`]; the process ends.
    fn ready(self: Box<Self>) -> Result<(Box<dyn Gate>, Option<OwnedFd>), Error>;
}

/// A process that lacks only its program. Dropped, it ends.
pub trait Gate: Send {
    /// Runs the program.
    ///
    /// # Errors
    /// [`Error`]; the process ends.
    fn start(self: Box<Self>) -> Result<(), Error>;
}
