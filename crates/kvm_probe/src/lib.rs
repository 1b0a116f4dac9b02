// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Proves that a node's KVM can run a stock Linux guest.
//!
//! That `/dev/kvm` opens says little: some cloud machines offer a KVM in software that runs a kernel but not its user
//! space. So [`probe`] runs a guest of 132 bytes through what every Linux boot needs (long mode, user mode, SYSCALL and
//! back) and says at which step it stopped. It takes milliseconds, leaves nothing behind and cannot hang: a guest that
//! is not done within a second is stopped by a signal (the first real-time one, for which it sets an empty handler).

mod capabilities;
mod guest;
mod run;

use std::fmt;
use std::io;
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

/// What a KVM that passed can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The most vCPUs a VM can have.
    pub max_vcpus: usize,
    /// How long the probe took, from opening the device to the guest's last step.
    pub elapsed: Duration,
}

/// What the probe guest does, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// From protected mode to long mode.
    LongMode,
    /// From CPL 0 to CPL 3 with IRETQ.
    UserMode,
    /// From CPL 3 to CPL 0 with SYSCALL.
    Syscall,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LongMode => "enter long mode",
            Self::UserMode => "enter user mode",
            Self::Syscall => "come back from user mode with SYSCALL",
        })
    }
}

/// What every failure of the guest itself means.
const SOFTWARE_KVM: &str = "this KVM emulates guests in software and cannot boot Linux; use a bare-metal machine, or one \
                            whose provider offers nested virtualization (the CPU flags must show vmx or svm)";

/// Why a KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such device.
    #[error(
        "{} does not exist: load the module (modprobe kvm_intel or kvm_amd) and enable virtualization in the \
         firmware or, in a VM, nested virtualization", path.display()
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// The device may not be opened.
    #[error("{} may not be opened: run as root or as a member of its group", path.display())]
    Denied {
        /// The device.
        path: PathBuf,
    },
    /// The device cannot be opened for another reason.
    #[error("{} cannot be opened: check that it is the KVM device (character device 10:232)", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is not KVM, or one of another age.
    #[error("the KVM API has version {found}, not 12: check that the file is the KVM device")]
    ApiVersion {
        /// What it said; -1 if it is not KVM at all.
        found: i32,
    },
    /// KVM is too old or built without something.
    #[error("KVM lacks {name}, needed for {purpose}: use a newer kernel")]
    Capability {
        /// The capability.
        name: &'static str,
        /// What the VMM needs it for.
        purpose: &'static str,
    },
    /// A VM could not be made.
    #[error("cannot {operation}: see the cause, then the kernel log")]
    Setup {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest stopped before its end.
    #[error("the probe guest could not {step} ({what} at {rip:#x}): {SOFTWARE_KVM}")]
    Stopped {
        /// What it was about to do.
        step: Step,
        /// What came instead.
        what: String,
        /// The guest's instruction pointer.
        rip: u64,
    },
    /// The guest ran on, at the wrong privilege level.
    #[error("the probe guest could not {step} (it was at CPL {cpl} afterwards): {SOFTWARE_KVM}")]
    WrongPrivilege {
        /// What it had tried.
        step: Step,
        /// Where it was.
        cpl: u8,
    },
    /// The guest could not be stopped.
    #[error("the probe guest does not stop: see the kernel log; this KVM cannot be used")]
    Stuck,
}

/// Runs the probe guest on the KVM at `path` (`/dev/kvm`). Blocks for a few milliseconds, and at most two seconds.
///
/// # Errors
/// What is wrong with this KVM, and what to do about it.
pub fn probe(path: &Path) -> Result<Report, ProbeError> {
    let started = Instant::now();
    let kvm = open(path)?;
    capabilities::check(&kvm)?;
    run::ProbeVm::new(&kvm)?.run()?;
    Ok(Report {
        max_vcpus: kvm.get_max_vcpus(),
        elapsed: started.elapsed(),
    })
}

fn open(path: &Path) -> Result<Kvm, ProbeError> {
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path);
    let file = opened.map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => ProbeError::Missing { path },
            io::ErrorKind::PermissionDenied => ProbeError::Denied { path },
            _ => ProbeError::Open { path, source },
        }
    })?;
    #[expect(unsafe_code, reason = "taking over a descriptor")]
    // SAFETY: the descriptor was just released by `file`, so `Kvm` is its only owner.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(file.into_raw_fd()) };
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_says_which_module_to_load() {
        let error = probe(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, ProbeError::Missing { .. }));
        assert!(error.to_string().contains("modprobe"), "{error}");
    }

    #[test]
    fn file_that_is_not_kvm_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = probe(file.path()).unwrap_err();
        assert!(
            matches!(error, ProbeError::ApiVersion { found: -1 }),
            "{error}"
        );
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            probe(dir.path()).unwrap_err(),
            ProbeError::Open { .. }
        ));
    }

    /// Passes on a real KVM and on a software one: what it must not do is hang, or say yes after a failed step.
    #[test]
    fn this_machine_gets_an_answer_in_time() {
        let started = Instant::now();
        match probe(Path::new("/dev/kvm")) {
            Ok(report) => assert!(report.max_vcpus > 0),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        assert!(started.elapsed() < Duration::from_secs(3));
    }
}
