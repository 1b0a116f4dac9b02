// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Another size for a VM that runs.
//!
//! | | more than at the start | less than at the start |
//! |---|---|---|
//! | vCPUs | made by the threads that wait for it; the guest brings them up | the guest takes them down |
//! | memory | plugged by the memory device, which comes with the first such wish | given up to the balloon |
//!
//! KVM cannot take a vCPU away, so what has been made stays; one that the guest has taken down sleeps. Nothing here waits
//! for the guest: the answer says how far it has come.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ids::{Bytes, Mib, VcpuCount};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuFd, VmFd};
use virtio_device::balloon::{BalloonHandle, MemoryRelease};
use virtio_device::mem::{Mem, MemHandle, MemOptions, MemorySlots};
use vm_memory::GuestAddressSpace;

use super::{BeforeThread, Machine};
use crate::boot::cmdline;
use crate::control::{Config, Size};
use crate::devices::Memory;
use crate::kvm::configure_vcpu;
use crate::layout;
use crate::slots::HotSlots;
use crate::vcpu::{SpareVcpu, Surroundings, Vcpu};
use crate::{VmmError, memory, sharing};

/// What a VM can be resized to, and with what.
pub(super) struct Resizing {
    /// Memory that it started with.
    started_with: Mib,
    max_memory: Mib,
    /// Where memory can be plugged.
    pub(super) pluggable: Range<u64>,
    /// The window of the memory device.
    window: u16,
    slots: Arc<HotSlots>,
    /// The memory device, once there is one.
    plugged: Option<MemHandle>,
    balloon: BalloonHandle,
    spares: VecDeque<SpareVcpu>,
}

/// The most that a VM of this configuration can have.
pub(super) fn most(config: &Config) -> (u8, Mib) {
    (
        config.max_vcpus.max(config.vcpus),
        Mib(config.max_memory_mib.max(config.memory_mib)),
    )
}

/// Whether a VM of this configuration can have a memory device.
pub(super) fn has_window(config: &Config) -> bool {
    let (_, max) = most(config);
    !layout::pluggable(Mib(config.memory_mib), max).is_empty()
}

impl Resizing {
    /// For the VM of `config`, whose memory device goes into `window`.
    pub(super) fn new(
        config: &Config,
        window: u16,
        vm: Arc<VmFd>,
        memory: Memory,
        balloon: BalloonHandle,
    ) -> Self {
        let started_with = Mib(config.memory_mib);
        let (_, max_memory) = most(config);
        let pluggable = layout::pluggable(started_with, max_memory);
        let pages = memory::pages(&layout::ram_blocks(started_with));
        Self {
            started_with,
            max_memory,
            slots: Arc::new(HotSlots::new(vm, memory, pluggable.clone(), pages)),
            pluggable,
            window,
            plugged: None,
            balloon,
            spares: VecDeque::new(),
        }
    }

    /// From now on guest memory is in `file`.
    pub(super) fn share(&self, memory: &Memory, file: Arc<File>) {
        let offset = sharing::pluggable_offset(&memory.memory(), &self.pluggable);
        self.slots.share(file, offset);
    }

    /// What was asked for and what there is, for people.
    pub(super) fn dump(&self) -> serde_json::Value {
        serde_json::json!({
            "started_with_mib": self.started_with.0,
            "max_memory_mib": self.max_memory.0,
            "memory_mib": self.memory().0,
            "plug_bytes": self.plugged.as_ref().map(MemHandle::requested),
            "plugged_bytes": self.plugged.as_ref().map(MemHandle::plugged),
            "balloon_target_bytes": self.balloon.target(),
            "balloon_bytes": self.balloon.actual(),
            "spare_vcpus": self.spares.len(),
        })
    }

    /// What the guest has by its own account: less than it started with what it has given up, and what it has plugged.
    fn memory(&self) -> Mib {
        let plugged = self.plugged.as_ref().map_or(0, MemHandle::plugged);
        // It may say that it has given up more than it was asked to.
        let given_up = self.balloon.actual().min(self.balloon.target());
        let bytes = Bytes::from(self.started_with)
            .0
            .saturating_sub(given_up)
            .saturating_add(plugged);
        Bytes(bytes).to_mib_ceil().unwrap_or(self.max_memory)
    }
}

/// What a spare vCPU is made of.
pub(super) struct SpareParts {
    pub(super) policy: Vec<kvm_cpuid_entry2>,
    pub(super) count: VcpuCount,
    pub(super) surroundings: Surroundings,
}

/// Has KVM count the vCPU in where it looks for an interrupt's target. At the start the boot processor's accesses to its
/// local APIC do that for all; a vCPU that comes later would never hear the INIT that is to wake it.
fn enter_apic_map(fd: &VcpuFd) -> Result<(), VmmError> {
    fd.get_lapic()
        .and_then(|state| fd.set_lapic(&state))
        .map_err(VmmError::kvm("set the local APIC"))
}

impl Machine {
    /// Has threads wait to make the vCPUs from number `first` on.
    pub(super) fn add_spares(
        &mut self,
        first: u8,
        parts: &SpareParts,
        before: BeforeThread,
    ) -> Result<(), VmmError> {
        for id in first..parts.count.get() {
            let vm = Arc::clone(&self.vm);
            let (policy, count) = (parts.policy.clone(), parts.count);
            let surroundings = parts.surroundings.clone();
            let spare = Vcpu::spare(id, before, move || {
                let fd = vm
                    .create_vcpu(u64::from(id))
                    .map_err(VmmError::kvm("create a vCPU"))?;
                configure_vcpu(&fd, &policy, id, count)?;
                enter_apic_map(&fd)?;
                Ok(Vcpu::new(fd, id, surroundings))
            })?;
            self.resizing.spares.push_back(spare);
        }
        Ok(())
    }

    /// Lets the guest have so many vCPUs and so much memory, and says what it has by now. The same may be asked again.
    ///
    /// # Errors
    /// [`VmmError::Config`] for what the VM was not started to become, or why the host cannot do it.
    pub fn resize(&mut self, vcpus: u8, memory: Mib) -> Result<Size, VmmError> {
        let most = self.vcpus.len().saturating_add(self.resizing.spares.len());
        if !(1..=most).contains(&usize::from(vcpus)) {
            return Err(VmmError::Config {
                reason: format!("resize to {vcpus} vCPUs: 1 to {most} are possible"),
            });
        }
        let max = self.resizing.max_memory;
        if !(layout::MIN_MEMORY..=max).contains(&memory) {
            let min = layout::MIN_MEMORY;
            return Err(VmmError::Config {
                reason: format!("resize to {memory} of memory: {min} to {max} are possible"),
            });
        }
        while self.vcpus.len() < usize::from(vcpus)
            && let Some(spare) = self.resizing.spares.pop_front()
        {
            let vcpu = spare.make()?;
            if !self.paused.load(Ordering::SeqCst) {
                vcpu.resume();
            }
            self.vcpus.push(vcpu);
        }
        self.ask_for_memory(memory)?;
        Ok(Size {
            vcpus: u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX),
            memory_mib: self.resizing.memory().0,
            device: self
                .resizing
                .plugged
                .as_ref()
                .map(|_| cmdline::platform_device(self.resizing.window)),
        })
    }

    fn ask_for_memory(&mut self, memory: Mib) -> Result<(), VmmError> {
        let started_with = self.resizing.started_with;
        let more = Mib(memory.0.saturating_sub(started_with.0));
        let less = Mib(started_with.0.saturating_sub(memory.0));
        if more.0 > 0 && self.resizing.plugged.is_none() {
            let handle = self.add_memory_device()?;
            self.resizing.plugged = Some(handle);
        }
        if let Some(plugged) = &self.resizing.plugged {
            plugged.set_requested(Bytes::from(more).0);
        }
        self.resizing.balloon.set_target(Bytes::from(less).0);
        Ok(())
    }

    fn add_memory_device(&mut self) -> Result<MemHandle, VmmError> {
        let slots = Arc::clone(&self.resizing.slots) as Arc<dyn MemorySlots>;
        let release = MemoryRelease::new(self.memory.clone(), self.backing.clone());
        let device = Mem::new(MemOptions {
            region: self.resizing.pluggable.clone(),
            slots,
            release: Arc::new(release),
        });
        let handle = device.handle();
        let kicks = Self::kicks(1)?;
        let io = Arc::clone(&self.io);
        self.install(self.resizing.window, Box::new(device), kicks, io)?;
        Ok(handle)
    }
}
