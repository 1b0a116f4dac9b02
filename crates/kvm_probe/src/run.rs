// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs the probe guest on a thread of its own, with a deadline.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION takes a pointer that the caller vouches for"
)]

use std::os::raw::{c_int, c_void};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{ProbeError, Step, guest};

/// How long the guest may take. It takes microseconds on hardware, and 20 ms where KVM itself runs in an emulator.
const DEADLINE: Duration = Duration::from_secs(1);
/// Time between two signals to a vCPU that does not come back: one that lands just before KVM_RUN is lost.
const KICK_EVERY: Duration = Duration::from_millis(10);
/// Signals before the thread is given up.
const KICKS: u32 = 100;
/// Exits before a guest that makes no progress is given up; each step of a good one takes one.
const MAX_EXITS: u32 = 64;
/// Where KVM on Intel keeps three pages of its own for real mode: below 4 GiB, outside guest memory.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM with the guest loaded.
pub(crate) struct ProbeVm {
    vcpu: VcpuFd,
    // Keeps what the vCPU runs on alive, in this order.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl ProbeVm {
    pub(crate) fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let setup = |operation| move |source| ProbeError::Setup { operation, source };
        let vm = kvm
            .create_vm()
            .map_err(|error| setup("create a VM")(error.into()))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(|error| setup("set the TSS address")(error.into()))?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), guest::MEMORY_BYTES)])
            .map_err(|error| setup("map guest memory")(std::io::Error::other(error)))?;
        guest::load(&memory)
            .map_err(|error| setup("load the guest")(std::io::Error::other(error)))?;
        let host = memory
            .get_host_address(GuestAddress(0))
            .map_err(|error| setup("find guest memory")(std::io::Error::other(error)))?;
        let region = kvm_userspace_memory_region {
            memory_size: guest::MEMORY_BYTES as u64,
            userspace_addr: host as u64,
            ..Default::default()
        };
        // SAFETY: the region is the whole mapping of `memory`, which this struct drops after the vCPU and the VM.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| setup("give the VM its memory")(error.into()))?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(|error| setup("create a vCPU")(error.into()))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| setup("read the supported CPUID")(error.into()))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|error| setup("set the CPUID")(error.into()))?;
        let sregs = vcpu
            .get_sregs()
            .map_err(|error| setup("read the registers")(error.into()))?;
        vcpu.set_sregs(&guest::special_registers(sregs))
            .and_then(|()| vcpu.set_regs(&guest::registers()))
            .map_err(|error| setup("set the registers")(error.into()))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Runs the guest to its end or to the deadline, and never waits longer than twice that.
    pub(crate) fn run(self) -> Result<(), ProbeError> {
        let signal = SIGRTMIN();
        register_signal_handler(signal, on_kick).map_err(|error| ProbeError::Setup {
            operation: "handle the signal that stops the guest",
            source: error.into(),
        })?;
        let (send, result) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("kvm-probe".to_owned())
            .spawn(move || {
                // The receiver may have given up.
                let _ = send.send(self.run_to_end());
            })
            .map_err(|source| ProbeError::Setup {
                operation: "start a thread",
                source,
            })?;
        let mut answer = result.recv_timeout(DEADLINE);
        for _ in 0..KICKS {
            if !matches!(answer, Err(RecvTimeoutError::Timeout)) {
                break;
            }
            let _ = thread.kill(signal);
            answer = result.recv_timeout(KICK_EVERY);
        }
        answer.unwrap_or(Err(ProbeError::Stuck))
    }

    fn run_to_end(mut self) -> Result<(), ProbeError> {
        let started = Instant::now();
        let mut progress = Progress::default();
        for _ in 0..MAX_EXITS {
            let what = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(guest::MARK_PORT, data)) => match progress.mark(data)? {
                    Some(()) => return Ok(()),
                    None => continue,
                },
                Ok(VcpuExit::Shutdown) => "a triple fault".to_owned(),
                Ok(other) => format!("{other:?}"),
                Err(error) if error.errno() == libc::EINTR => {
                    if started.elapsed() < DEADLINE {
                        continue;
                    }
                    "no further step in one second".to_owned()
                }
                Err(error) => format!("KVM_RUN failed: {}", std::io::Error::from(error)),
            };
            return Err(self.stopped(progress, what));
        }
        Err(self.stopped(progress, "exits without progress".to_owned()))
    }

    fn stopped(&self, progress: Progress, what: String) -> ProbeError {
        ProbeError::Stopped {
            step: progress.next_step(),
            what,
            rip: self.vcpu.get_regs().map_or(0, |regs| regs.rip),
        }
    }
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// The steps that the guest has done.
#[derive(Clone, Copy, Default)]
struct Progress {
    long_mode: bool,
    user: bool,
}

impl Progress {
    /// Takes a mark; `Some` when it was the last.
    fn mark(&mut self, data: &[u8]) -> Result<Option<()>, ProbeError> {
        let mark = data.first().copied().unwrap_or(0);
        let wrong_cpl = |step| ProbeError::WrongPrivilege {
            step,
            cpl: mark & 3,
        };
        match (mark & 0xf0, mark & 3) {
            (guest::MARK_LONG_MODE, _) => self.long_mode = true,
            (guest::MARK_USER, 3) => self.user = true,
            (guest::MARK_USER, _) => return Err(wrong_cpl(Step::UserMode)),
            (guest::MARK_SYSCALL, 0) if self.long_mode && self.user => return Ok(Some(())),
            _ => return Err(wrong_cpl(Step::Syscall)),
        }
        Ok(None)
    }

    fn next_step(self) -> Step {
        match self {
            Self {
                long_mode: false, ..
            } => Step::LongMode,
            Self { user: false, .. } => Step::UserMode,
            _ => Step::Syscall,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_in_order_end_in_success() {
        let mut progress = Progress::default();
        assert!(progress.mark(&[0x10]).unwrap().is_none());
        assert_eq!(progress.next_step(), Step::UserMode);
        assert!(progress.mark(&[0x23]).unwrap().is_none());
        assert_eq!(progress.next_step(), Step::Syscall);
        assert!(progress.mark(&[0x30]).unwrap().is_some());
    }

    #[test]
    fn syscall_that_stays_at_cpl_3_is_named() {
        let mut progress = Progress::default();
        progress.mark(&[0x10]).unwrap();
        progress.mark(&[0x23]).unwrap();
        let error = progress.mark(&[0x33]).unwrap_err();
        assert!(matches!(
            error,
            ProbeError::WrongPrivilege {
                step: Step::Syscall,
                cpl: 3
            }
        ));
    }

    #[test]
    fn syscall_mark_without_the_steps_before_is_no_success() {
        assert!(Progress::default().mark(&[0x30]).is_err());
        assert!(Progress::default().mark(&[]).is_err());
    }
}
