// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The driver contract: what a VMM must do for a sandbox, and what it may.
//!
//! ```text
//! Driver::launch(VmSpec) ──> RunningVm ──wait()──> VmExit
//!                              │  connect / accept        vsock, both ways
//!                              │  attach / detach         disks, any time; one file system
//!                              │  resize                  vCPUs and memory, any time
//!                              └  kill                    any time, twice, from any task
//! ```
//!
//! A sandbox sees a VM only through [`RunningVm`]; no type of a VMM or of the rust-vmm crates is named here. Everything
//! a VM needs reaches the driver as an open file: a driver resolves no path of a pod's.
//!
//! Every call has a deadline inside the driver, so no caller waits for ever, and dropping the future of a call leaves
//! the VM in a state from which [`RunningVm::kill`] still works. Dropping the last handle of a VM kills it.
#![forbid(unsafe_code)]

mod error;
mod resize;
mod spec;

use std::sync::Arc;

use async_trait::async_trait;
use ids::{DiskSerial, Limits, VsockPort};
use tokio::net::UnixStream;

pub use error::{DriverError, DriverErrorKind};
pub use resize::{Resize, Resized, VmTarget};
pub use spec::{
    AttachedDisk, AttachedFileSystem, Capabilities, Console, Disk, DiskAccess, FileSystem,
    NetworkInterface, VmExit, VmProcesses, VmSpec,
};

/// A VMM that can run sandboxes.
#[async_trait]
pub trait Driver: Send + Sync {
    /// What VMs of this driver can do beyond the contract.
    fn capabilities(&self) -> Capabilities;

    /// Starts a VMM and lets the guest boot; answers once the vCPUs run, long before the guest is ready.
    ///
    /// # Errors
    /// Any [`DriverErrorKind`]; nothing is left behind.
    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError>;
}

/// What of a VM can be changed while it runs.
#[async_trait]
pub trait Adjustable: Send + Sync {
    /// Holds the VM's traffic to these limits from now on.
    ///
    /// # Errors
    /// [`DriverErrorKind::Gone`] after its end, [`DriverErrorKind::Timeout`] if the VMM does not answer.
    async fn set_limits(&self, limits: Limits) -> Result<(), DriverError>;
}

/// A VM whose vCPUs have been started. All methods may be called at any time, also after the VM's end, when they fail
/// with [`DriverErrorKind::Gone`].
#[async_trait]
pub trait RunningVm: Adjustable + Resize {
    /// The host processes that make up the VM. They are gone once [`RunningVm::wait`] has answered.
    fn processes(&self) -> VmProcesses;

    /// Connects to a port on which the guest listens.
    ///
    /// # Errors
    /// [`DriverErrorKind::Refused`] if nobody listens there, [`DriverErrorKind::Timeout`] if the guest does not answer.
    async fn connect(&self, port: VsockPort) -> Result<UnixStream, DriverError>;

    /// The next connection that the guest opened to one of [`VmSpec::host_ports`]. One caller at a time.
    ///
    /// # Errors
    /// [`DriverErrorKind::Gone`] once the VM has ended.
    async fn accept(&self) -> Result<(VsockPort, UnixStream), DriverError>;

    /// Attaches a disk while the VM runs; answers once the guest can find it.
    ///
    /// # Errors
    /// [`DriverErrorKind::Exhausted`] if no slot is free, [`DriverErrorKind::Conflict`] if the serial is in use.
    async fn attach_disk(&self, disk: Disk) -> Result<AttachedDisk, DriverError>;

    /// Detaches a disk that the guest has let go of; an unknown serial is not an error, so it can be repeated.
    ///
    /// # Errors
    /// [`DriverErrorKind::Failed`] if the VMM refuses.
    async fn detach_disk(&self, serial: &DiskSerial) -> Result<(), DriverError>;

    /// Attaches the file system of a file server while the VM runs; a VM has at most one, with all shared directories in it.
    /// Answers once the guest can find it. If the file server ends or misbehaves later, the VM ends and says so: a
    /// guest does not recover from a file system that is gone.
    ///
    /// # Errors
    /// [`DriverErrorKind::Conflict`] if there is one, [`DriverErrorKind::Exhausted`] if no slot is free,
    /// [`DriverErrorKind::Unsupported`] if VMs of this driver cannot have one.
    async fn attach_file_system(
        &self,
        file_system: FileSystem,
    ) -> Result<AttachedFileSystem, DriverError>;

    /// Waits for the VM's end. Any number of callers, each of which gets the same answer, also later.
    async fn wait(&self) -> VmExit;

    /// Ends the VM now and waits until its processes are gone. Idempotent; never fails.
    async fn kill(&self) -> VmExit;

    /// What the guest has printed on its console from byte number `from` on, as far as it is kept and fits into one
    /// answer; without `from` the last 4 KiB of it, which a VM that has ended gives too. Printable text: control
    /// characters are the guest's and are replaced. Never fails; a VMM that does not answer has printed nothing.
    async fn console(&self, from: Option<u64>) -> Console;

    /// The VMM's queues, connections and counters, as JSON for people.
    ///
    /// # Errors
    /// [`DriverErrorKind::Timeout`] if the VMM does not answer.
    async fn dump(&self) -> Result<String, DriverError>;
}
