// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One VM: memory, vCPUs, interrupt lines and devices, put together.

mod disks;
mod file_system;
mod resize;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ids::{GuestCid, Mib, VcpuCount, VsockPort};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};
use virtio_device::balloon::{Backing, BackingSwitch, Balloon, MemoryRelease};
use virtio_device::console::{Console, ConsoleLog, LogFile};
use virtio_device::net::{Net, NetLimits, NetOptions, Tap};
use virtio_device::rng::{HostEntropy, Rng};
use virtio_device::vsock::{HostPorts, Vsock, VsockHandle, VsockOptions};
use virtio_device::{Limiter, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootSource, Entry, cmdline};
use crate::control::{Config, LimitsConfig, MAX_NETWORKS, NetworkConfig};
use crate::cpu::cpuid;
use crate::devices::{
    Bus, IoThread, Memory, Signals, Transport, TransportParts, TransportState, WorkerHost,
};
use crate::kvm::{KvmDoorbells, configure_vcpu, create_vm, register_memory, set_entry};
use crate::layout::{self, RamBlock};
use crate::state::{KvmState, VcpuState};
use crate::vcpu::{ExitCounters, Surroundings, Vcpu, VcpuThread};
use crate::{Ends, VmmError, memory};

pub use file_system::FileSystemParts;
use resize::{Resizing, SpareParts};

/// The most vCPUs: what the guest kernel is built for.
const MAX_VCPUS: u8 = 64;
/// Bytes after which the console log file takes no more.
const CONSOLE_LOG_BYTES: u64 = 16 << 20;
/// Connections in a dump, which must fit a control message.
const MAX_DUMPED_CONNECTIONS: usize = 64;

const VSOCK_WINDOW: u16 = 0;
const CONSOLE_WINDOW: u16 = 1;
const RNG_WINDOW: u16 = 2;
const BALLOON_WINDOW: u16 = 3;

/// What a VM is made of besides its configuration.
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// The guest kernel.
    pub kernel: File,
    /// The initramfs; empty if there is none.
    pub initramfs: File,
    /// Where connections to the guest arrive.
    pub vsock: UnixListener,
    /// Where connections of the guest go.
    pub host_ports: Box<dyn HostPorts>,
    /// Where the console goes besides memory.
    pub console_log: Option<File>,
    /// One for each network card of the configuration.
    pub taps: Vec<OwnedFd>,
    /// One for each disk of the configuration.
    pub disks: Vec<File>,
}

/// Saved state of a whole VM but for its memory.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct MachineState {
    kvm: KvmState,
    vcpus: Vec<VcpuState>,
    devices: BTreeMap<u16, TransportState>,
}

/// A VM.
pub struct Machine {
    // Fields are dropped in this order: vCPUs and devices before what they run on.
    vcpus: Vec<VcpuThread>,
    resizing: Resizing,
    bus: Arc<Bus>,
    /// For what must answer at once.
    io: Arc<IoThread>,
    /// For disks, whose reads and writes block their thread.
    disk_io: Arc<IoThread>,
    /// For network cards, whose traffic nothing else shall wait behind; none without them.
    net_io: Option<Arc<IoThread>>,
    limiters: Limiters,
    disk_slots: u16,
    lines: BTreeMap<u32, Arc<EventFd>>,
    disks: BTreeMap<u16, String>,
    /// The slot of the file system device, and its tag.
    file_system: Option<(u16, String)>,
    /// What of guest memory is mapped from files while it is private.
    from_files: Vec<RamBlock>,
    backing: BackingSwitch,
    paused: AtomicBool,
    console: Arc<ConsoleLog>,
    vsock: VsockHandle,
    exits: Arc<ExitCounters>,
    vm: Arc<VmFd>,
    kvm: Kvm,
    memory: Memory,
}

/// What holds the VM's traffic to its limits.
#[derive(Default)]
struct Limiters {
    net: NetLimits,
    disk: Arc<Limiter>,
}

/// What a thread does before it works: its seccomp filter.
type BeforeThread = fn() -> Result<(), VmmError>;

/// What the threads of each kind do first.
#[derive(Clone, Copy)]
pub struct ThreadSetup {
    /// The I/O threads.
    pub io: fn() -> Result<(), VmmError>,
    /// Every vCPU thread.
    pub vcpu: fn() -> Result<(), VmmError>,
    /// The threads of vCPUs that are made later.
    pub spare: fn() -> Result<(), VmmError>,
}

impl Machine {
    /// Builds the VM of `config` and starts its threads, with the vCPUs paused before their first instruction.
    ///
    /// # Errors
    /// Whatever is wrong with the configuration or refused by the host; nothing is left running.
    pub fn build(
        config: &Config,
        resources: Resources,
        ends: Arc<Ends>,
        setup: ThreadSetup,
    ) -> Result<Self, VmmError> {
        let vcpus = check(config)?;
        let blocks = layout::ram_blocks(Mib(config.memory_mib));
        let possible = VcpuCount::new(resize::most(config).0).unwrap_or(vcpus);
        let vm = Arc::new(create_vm(&resources.kvm)?);
        let memory = memory::map_ram(&blocks)?;
        register_memory(&vm, &memory, &blocks)?;
        let windows = windows(config);
        let source = BootSource {
            kernel: &resources.kernel,
            initramfs: &resources.initramfs,
            protocol: config.boot,
            command_line: &cmdline::build(windows, vcpus, &config.kernel_arguments)?,
            vcpus: possible,
        };
        let (entry, from_files) = boot::load(&memory, &blocks, &source)?;
        let memory = Memory::new(memory);
        let vsock = vsock(config, resources.vsock, resources.host_ports)?;
        let backing = BackingSwitch::new(Backing::Private);
        let release = MemoryRelease::new(memory.clone(), backing.clone());
        let balloon = Balloon::new(
            ids::Bytes::from(Mib(config.memory_mib)).0,
            Arc::new(release),
        );
        let last_window = windows.saturating_sub(1);
        let resizing = Resizing::new(
            config,
            last_window,
            Arc::clone(&vm),
            memory.clone(),
            balloon.handle(),
        );
        let mut machine = Self {
            vcpus: Vec::new(),
            resizing,
            bus: Arc::new(Bus::new(windows)),
            io: Arc::new(IoThread::start("io", setup.io)?),
            disk_io: Arc::new(IoThread::start("disk", setup.io)?),
            net_io: match config.networks.as_slice() {
                [] => None,
                _ => Some(Arc::new(IoThread::start("net", setup.io)?)),
            },
            limiters: Limiters::default(),
            disk_slots: config.disk_slots,
            lines: BTreeMap::new(),
            disks: BTreeMap::new(),
            file_system: None,
            from_files,
            backing,
            paused: AtomicBool::new(false),
            console: Arc::new(ConsoleLog::new(
                resources
                    .console_log
                    .map(|file| LogFile::new(file, CONSOLE_LOG_BYTES)),
            )),
            vsock: vsock.handle(),
            exits: Arc::default(),
            vm,
            kvm: resources.kvm,
            memory,
        };
        machine.set_limits(config.limits);
        machine.add_device(VSOCK_WINDOW, Box::new(vsock))?;
        machine.add_device(BALLOON_WINDOW, Box::new(balloon))?;
        machine.add_devices()?;
        for (disk, file) in config.disks.iter().zip(resources.disks) {
            machine.attach_disk(disk, file)?;
        }
        machine.add_networks(config, resources.taps)?;
        machine.add_vcpus((vcpus, possible), entry, &ends, setup)?;
        Ok(machine)
    }

    /// Lets the vCPUs run, for the first time or after a pause.
    pub fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.for_each_device(|_, transport| transport.resume());
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Lets the vCPUs run for the first time.
    pub fn boot(&self) {
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Takes the vCPUs out of the guest and stops all work on its memory.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
        for vcpu in &self.vcpus {
            vcpu.pause();
        }
        self.for_each_device(|_, transport| transport.pause());
    }

    /// The state of a paused VM.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn save(&self) -> Result<MachineState, VmmError> {
        let msrs = self
            .kvm
            .get_msr_index_list()
            .map_err(VmmError::kvm("list the model-specific registers"))?;
        let msrs: Arc<[u32]> = msrs.as_slice().into();
        let mut vcpus = Vec::new();
        for vcpu in &self.vcpus {
            vcpus.push(vcpu.save(&msrs)?);
        }
        let mut devices = BTreeMap::new();
        self.for_each_device(|index, transport| {
            devices.insert(index, transport.save());
        });
        Ok(MachineState {
            kvm: KvmState::save(&self.vm)?,
            vcpus,
            devices,
        })
    }

    /// Holds traffic to these limits from now on.
    pub fn set_limits(&self, limits: LimitsConfig) {
        self.limiters.net.ingress.set(limits.ingress.into());
        self.limiters.net.egress.set(limits.egress.into());
        self.limiters.disk.set(limits.disk.into());
        for thread in [Some(&self.disk_io), self.net_io.as_ref()]
            .into_iter()
            .flatten()
        {
            thread.look_again();
        }
    }

    /// The console's output.
    #[must_use]
    pub fn console(&self) -> &ConsoleLog {
        &self.console
    }

    /// Counters and states, for people.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let mut devices = Vec::new();
        self.for_each_device(|index, transport| {
            let counters: BTreeMap<_, _> = transport.metrics().into_iter().collect();
            devices.push(serde_json::json!({
                "window": index,
                "device": transport.name(),
                "status": transport.status().0,
                "serial": self.disks.get(&index),
                "error": transport.last_error(),
                "counters": counters,
            }));
        });
        let exits: BTreeMap<_, _> = self.exits.snapshot().into_iter().collect();
        let mut vsock = self.vsock.dump();
        let connections = vsock.connections.len();
        vsock.connections.truncate(MAX_DUMPED_CONNECTIONS);
        serde_json::json!({
            "vcpus": self.vcpus.len(),
            "size": self.resizing.dump(),
            "exits": exits,
            "stray_accesses": self.bus.stray_accesses.get(),
            "devices": devices,
            "waits_for_limits": {
                "ingress": self.limiters.net.ingress.waits(),
                "egress": self.limiters.net.egress.waits(),
                "disk": self.limiters.disk.waits(),
            },
            "vsock_connections": connections,
            "vsock": vsock,
        })
    }

    fn for_each_device(&self, mut action: impl FnMut(u16, &mut Transport)) {
        for index in 0..self.bus.len() {
            if let Some(mut window) = self.bus.window(index)
                && let Some(transport) = &mut *window
            {
                action(index, transport);
            }
        }
    }

    fn add_devices(&mut self) -> Result<(), VmmError> {
        let console =
            Console::new(Arc::clone(&self.console)).map_err(|source| VmmError::Device {
                name: "console",
                source,
            })?;
        self.add_device(CONSOLE_WINDOW, Box::new(console))?;
        self.add_device(RNG_WINDOW, Box::new(Rng::new(Arc::new(HostEntropy))))
    }

    fn add_networks(&mut self, config: &Config, taps: Vec<OwnedFd>) -> Result<(), VmmError> {
        let first = layout::FIRST_DISK_SLOT.saturating_add(config.disk_slots);
        for ((network, tap), index) in config.networks.iter().zip(taps).zip(first..) {
            let NetworkConfig { mac, mtu } = *network;
            let tap = Tap::new(tap).map_err(VmmError::host("take a tap over"))?;
            let io = Arc::new(tap);
            let limits = self.limiters.net.clone();
            let options = NetOptions {
                io,
                mac,
                mtu,
                limits,
            };
            let net = Net::new(options).map_err(|source| VmmError::Device {
                name: "net",
                source,
            })?;
            self.add_device(index, Box::new(net))?;
        }
        Ok(())
    }

    /// Puts a device into its window, on the thread for its kind.
    fn add_device(
        &mut self,
        index: u16,
        device: Box<dyn VirtioDevice<Memory>>,
    ) -> Result<(), VmmError> {
        let host = if index < layout::FIRST_DISK_SLOT {
            &self.io
        } else if index < layout::FIRST_DISK_SLOT.saturating_add(self.disk_slots) {
            &self.disk_io
        } else {
            self.net_io.as_ref().unwrap_or(&self.io)
        };
        let host = Arc::clone(host);
        let kicks = Self::kicks(device.queue_sizes().len())?;
        self.install(index, device, kicks, host)
    }

    /// A kick for each of `count` queues.
    fn kicks(count: usize) -> Result<Vec<Arc<EventFd>>, VmmError> {
        let kick = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
        (0..count)
            .map(|_| kick().map_err(VmmError::host("create a queue's event")))
            .collect()
    }

    /// Gives a device its interrupt line and its registers.
    fn install(
        &mut self,
        index: u16,
        device: Box<dyn VirtioDevice<Memory>>,
        kicks: Vec<Arc<EventFd>>,
        host: Arc<IoThread>,
    ) -> Result<(), VmmError> {
        let line = self.line(layout::gsi(index))?;
        let transport = Transport::new(TransportParts {
            device,
            index,
            memory: self.memory.clone(),
            signals: Arc::new(Signals::new(line)),
            kicks,
            host: host as Arc<dyn WorkerHost>,
            doorbells: Arc::new(KvmDoorbells(Arc::clone(&self.vm))),
        });
        if let Some(mut window) = self.bus.window(index) {
            *window = Some(transport);
        }
        Ok(())
    }

    /// The event that raises an interrupt line, one for all devices on it.
    fn line(&mut self, gsi: u32) -> Result<Arc<EventFd>, VmmError> {
        if let Some(line) = self.lines.get(&gsi) {
            return Ok(Arc::clone(line));
        }
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(VmmError::host("create an interrupt's event"))?;
        self.vm
            .register_irqfd(&line, gsi)
            .map_err(VmmError::kvm("connect an interrupt line"))?;
        let line = Arc::new(line);
        self.lines.insert(gsi, Arc::clone(&line));
        Ok(line)
    }

    fn add_vcpus(
        &mut self,
        (count, possible): (VcpuCount, VcpuCount),
        entry: Entry,
        ends: &Arc<Ends>,
        setup: ThreadSetup,
    ) -> Result<(), VmmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmmError::kvm("read the supported CPUID"))?;
        let policy = cpuid::policy(supported.as_slice().to_vec());
        let surroundings = Surroundings {
            bus: Arc::clone(&self.bus),
            ends: Arc::clone(ends),
            console: Arc::clone(&self.console),
            exits: Arc::clone(&self.exits),
        };
        for id in 0..count.get() {
            let fd = self
                .vm
                .create_vcpu(u64::from(id))
                .map_err(VmmError::kvm("create a vCPU"))?;
            configure_vcpu(&fd, &policy, id, possible)?;
            if id == 0 {
                set_entry(&fd, entry)?;
            }
            let vcpu = Vcpu::new(fd, id, surroundings.clone()).start(setup.vcpu)?;
            self.vcpus.push(vcpu);
        }
        let parts = SpareParts {
            policy,
            count: possible,
            surroundings,
        };
        self.add_spares(count.get(), &parts, setup.spare)
    }
}

fn vsock(
    config: &Config,
    listener: UnixListener,
    ports: Box<dyn HostPorts>,
) -> Result<Vsock, VmmError> {
    let guest_cid = GuestCid::new(config.cid).ok_or_else(|| VmmError::Config {
        reason: format!("vsock address {}: 3 to 4294967294 are possible", config.cid),
    })?;
    Vsock::new(VsockOptions {
        guest_cid,
        listener,
        host_ports: config.host_ports.iter().copied().map(VsockPort).collect(),
        ports,
    })
    .map_err(|source| VmmError::Device {
        name: "vsock",
        source,
    })
}

/// How many windows there are: the first devices, the disk slots, the network cards, and one for memory that is plugged
/// later if there can be any.
fn windows(config: &Config) -> u16 {
    let networks = u16::try_from(config.networks.len()).unwrap_or(u16::MAX);
    layout::FIRST_DISK_SLOT
        .saturating_add(config.disk_slots)
        .saturating_add(networks)
        .saturating_add(u16::from(resize::has_window(config)))
}

fn check(config: &Config) -> Result<VcpuCount, VmmError> {
    let bad = |reason| Err(VmmError::Config { reason });
    let Some(vcpus) = VcpuCount::new(config.vcpus).filter(|count| count.get() <= MAX_VCPUS) else {
        return bad(format!(
            "{} vCPUs: 1 to {MAX_VCPUS} are possible",
            config.vcpus
        ));
    };
    let (most_vcpus, most_memory) = resize::most(config);
    if most_vcpus > MAX_VCPUS || most_memory > layout::MAX_MEMORY {
        return bad(format!(
            "up to {most_vcpus} vCPUs and {most_memory} of memory: {MAX_VCPUS} and {} are the most",
            layout::MAX_MEMORY
        ));
    }
    let memory = Mib(config.memory_mib);
    if !(layout::MIN_MEMORY..=layout::MAX_MEMORY).contains(&memory) {
        let (min, max) = (layout::MIN_MEMORY, layout::MAX_MEMORY);
        return bad(format!("{memory} of memory: {min} to {max} are possible"));
    }
    let networks = config.networks.len();
    if networks > MAX_NETWORKS {
        return bad(format!(
            "{networks} network cards: at most {MAX_NETWORKS} are possible"
        ));
    }
    let max_slots = layout::MAX_DEVICES.saturating_sub(layout::FIRST_DISK_SLOT);
    if config.disk_slots > max_slots {
        let slots = config.disk_slots;
        return bad(format!(
            "{slots} disk slots: at most {max_slots} are possible"
        ));
    }
    if windows(config) > layout::MAX_DEVICES {
        let slots = config.disk_slots;
        return bad(format!(
            "{slots} disk slots and {networks} network cards: at most {max_slots} together are possible, one less if memory can \
             be plugged"
        ));
    }
    Ok(vcpus)
}
