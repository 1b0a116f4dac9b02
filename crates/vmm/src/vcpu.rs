// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One virtual CPU and its thread.
//!
//! ```text
//! Vcpu (configured, not running) ── start ──> VcpuThread ── stop ──> gone
//!                                               │  ^
//!                                          pause│  │resume
//!                                               v  │
//!                                             paused: save, restore
//! ```
//! The thread is kicked out of KVM_RUN by a signal whose handler sets `immediate_exit`, so that a kick that arrives just
//! before KVM_RUN is not lost.
#![expect(
    unsafe_code,
    reason = "the kick's signal handler writes to the kvm_run page of its own thread"
)]

use std::cell::Cell;
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use virtio_device::Counter;
use virtio_device::console::ConsoleLog;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::devices::Bus;
use crate::ends::{End, Ends};
use crate::state::VcpuState;
use crate::{VmmError, threads};

/// Port and value by which an old-style guest asks the keyboard controller for a reset.
const RESET_PORT: u16 = 0x64;
const RESET_VALUE: u8 = 0xfe;
/// The transmit register of a PC's first serial port. A kernel that fails before it has found its virtio console says why
/// there (`earlyprintk`). Nothing else of such a port is needed: reads of its status answer all ones, "ready to send".
pub(crate) const EARLY_CONSOLE_PORT: u16 = 0x3f8;

thread_local! {
    /// The kvm_run page of the vCPU that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Why vCPUs left the guest, since the start.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Register reads of devices.
    pub mmio_read: Counter,
    /// Register writes of devices.
    pub mmio_write: Counter,
    /// Port reads; there are no ports.
    pub port_read: Counter,
    /// Port writes.
    pub port_write: Counter,
    /// Signals and kicks.
    pub interrupted: Counter,
}

impl ExitCounters {
    /// Name and value of each.
    #[must_use]
    pub fn snapshot(&self) -> [(&'static str, u64); 5] {
        [
            ("mmio_read", self.mmio_read.get()),
            ("mmio_write", self.mmio_write.get()),
            ("port_read", self.port_read.get()),
            ("port_write", self.port_write.get()),
            ("interrupted", self.interrupted.get()),
        ]
    }
}

/// What a vCPU reaches when it leaves the guest.
#[derive(Clone)]
pub struct Surroundings {
    /// Devices.
    pub bus: Arc<Bus>,
    /// Where the VM's end is told.
    pub ends: Arc<Ends>,
    /// Where a guest's last words go while its console does not work yet.
    pub console: Arc<ConsoleLog>,
    /// Counters of all vCPUs.
    pub exits: Arc<ExitCounters>,
}

/// A vCPU that has its registers and does not run yet.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    surroundings: Surroundings,
}

enum Command {
    Pause(SyncSender<()>),
    Resume,
    Save(Arc<[u32]>, SyncSender<Result<VcpuState, VmmError>>),
    Stop,
}

/// The handle of a vCPU's thread.
pub struct VcpuThread {
    id: u8,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// Whether to enter the guest again.
enum Next {
    Run,
    Leave,
}

impl Vcpu {
    /// Takes a vCPU with its registers set.
    #[must_use]
    pub fn new(fd: VcpuFd, id: u8, surroundings: Surroundings) -> Self {
        Self {
            fd,
            id,
            surroundings,
        }
    }

    /// Starts its thread, paused: no instruction runs before [`VcpuThread::resume`]. `before` runs on the thread first.
    ///
    /// # Errors
    /// The host has no thread left, or `before` fails.
    pub fn start(
        self,
        before: impl FnOnce() -> Result<(), VmmError> + Send + 'static,
    ) -> Result<VcpuThread, VmmError> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(VmmError::host("handle the signal that stops a vCPU"))?;
        let (commands, receiver) = channel();
        let id = self.id;
        let thread = threads::spawn(&format!("vcpu{id}"), before, move || self.run(&receiver))?;
        Ok(VcpuThread {
            id,
            commands,
            thread: Some(thread),
        })
    }

    fn run(mut self, commands: &Receiver<Command>) {
        RUN.set(ptr::from_mut(self.fd.get_kvm_run()));
        // A kick that came before the line above is lost, but the command that it was for has come before it.
        if self.wait_for_resume(commands) && self.obey(commands) {
            while let Next::Run = self.enter(commands) {}
        }
        // From here on a late kick must not touch the page, which goes with the descriptor.
        RUN.set(ptr::null_mut());
    }

    /// Obeys commands until one lets the vCPU run; false if it is to stop.
    fn wait_for_resume(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            match commands.recv() {
                Ok(Command::Resume) => return true,
                Ok(Command::Pause(done)) => {
                    let _ = done.send(());
                }
                Ok(Command::Save(msrs, reply)) => {
                    let _ = reply.send(VcpuState::save(&self.fd, &msrs));
                }
                Ok(Command::Stop) | Err(_) => return false,
            }
        }
    }

    /// Obeys what has come with a kick; false if the vCPU is to stop.
    fn obey(&mut self, commands: &Receiver<Command>) -> bool {
        self.fd.set_kvm_immediate_exit(0);
        // All of it: the kicks of two commands may have become one.
        while let Ok(command) = commands.try_recv() {
            match command {
                Command::Pause(done) => {
                    self.complete_exit();
                    let _ = done.send(());
                    if !self.wait_for_resume(commands) {
                        return false;
                    }
                }
                Command::Stop => return false,
                Command::Save(_, reply) => {
                    let _ = reply.send(Err(VmmError::State {
                        reason: "the vCPU runs",
                    }));
                }
                Command::Resume => {}
            }
        }
        true
    }

    /// Lets KVM finish the access that the last exit was for (KVM API §5): state saved before would lose it.
    fn complete_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn enter(&mut self, commands: &Receiver<Command>) -> Next {
        let Surroundings {
            bus,
            ends,
            console,
            exits,
        } = &self.surroundings;
        let failure = match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio_read.increment();
                bus.read(address, data);
                return Next::Run;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio_write.increment();
                bus.write(address, data);
                return Next::Run;
            }
            Ok(VcpuExit::IoIn(_, data)) => {
                exits.port_read.increment();
                data.fill(0xff);
                return Next::Run;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.port_write.increment();
                if port == RESET_PORT && data == [RESET_VALUE] {
                    ends.report(End::Guest);
                    return Next::Leave;
                }
                if port == EARLY_CONSOLE_PORT {
                    early_output(console, data);
                }
                return Next::Run;
            }
            // A triple fault is how the guest resets itself.
            Ok(VcpuExit::Shutdown) => {
                if console.tail().is_empty() {
                    // It did not mean to.
                    console.append_to_tail(format!("triple fault; {}", self.describe()).as_bytes());
                }
                ends.report(End::Guest);
                return Next::Leave;
            }
            Ok(VcpuExit::SystemEvent(
                KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH,
                _,
            )) => {
                ends.report(End::Guest);
                return Next::Leave;
            }
            Ok(VcpuExit::Intr) => None,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Ok(other) => Some(format!("{other:?}")),
            Err(error) => Some(format!("KVM_RUN: {}", std::io::Error::from(error))),
        };
        match failure {
            None => {
                exits.interrupted.increment();
                if self.obey(commands) {
                    Next::Run
                } else {
                    Next::Leave
                }
            }
            Some(what) => {
                let reason = format!("{what}; {}", self.describe());
                let vcpu = self.id;
                ends.report(End::Failed(VmmError::Vcpu { vcpu, reason }));
                Next::Leave
            }
        }
    }

    /// Where the guest was.
    fn describe(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "rip {:#x} rsp {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cs.selector,
                sregs.cr0,
                sregs.cr3,
                sregs.cr4,
                sregs.efer
            ),
            _ => "registers cannot be read".to_owned(),
        }
    }
}

impl VcpuThread {
    /// Lets a paused vCPU run.
    pub fn resume(&self) {
        let _ = self.commands.send(Command::Resume);
    }

    /// Takes the vCPU out of the guest; answers when it is out.
    pub fn pause(&self) {
        let (send, done) = sync_channel(1);
        let _ = self.commands.send(Command::Pause(send));
        self.kick();
        let _ = done.recv();
    }

    /// The state of a paused vCPU, with these model-specific registers.
    ///
    /// # Errors
    /// KVM refuses, or the vCPU is not paused.
    pub fn save(&self, msrs: &Arc<[u32]>) -> Result<VcpuState, VmmError> {
        let (send, state) = sync_channel(1);
        let _ = self.commands.send(Command::Save(Arc::clone(msrs), send));
        self.kick();
        state.recv().unwrap_or(Err(VmmError::State {
            reason: "a vCPU has stopped",
        }))
    }

    /// Number of the vCPU.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes the text of what a guest sends to the early console; the rest is the set-up of a serial port that is not there.
fn early_output(console: &ConsoleLog, data: &[u8]) {
    for byte in data {
        if matches!(byte, b' '..=b'~' | b'\n') {
            console.append_to_tail(&[*byte]);
        }
    }
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: `run` points to the kvm_run page of the vCPU that this very thread owns, mapped until after `RUN` is
        // cleared. KVM and this handler are the only others to touch the field, and KVM reads it once per entry.
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}
