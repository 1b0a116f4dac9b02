// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The fake driver and its VMs.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_proto::{CONTROL_PORT, PROTOCOL_VERSION, STDIO_PORT, api, hello, service};
use async_trait::async_trait;
use futures::StreamExt;
use hypervisor::{
    Adjustable, AttachedDisk, AttachedFileSystem, Capabilities, Console, Disk, Driver, DriverError,
    DriverErrorKind, FileSystem, NetworkInterface, Resize, Resized, RunningVm, VmExit, VmProcesses,
    VmSpec, VmTarget,
};
use ids::{DiskSerial, Limits, VsockPort};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::agent::Service;
use crate::guest::{Files, Guest};
use crate::script::{Boot, Script};

/// What fake VMs say is their VMM's pid, unless the script says another. Linux gives it to no process (proc(5), pid_max), so
/// nobody is mistaken for a VMM.
pub const FAKE_VMM_PID: u32 = 1 << 22;

/// How many disks a fake VM can have.
const MAX_DISKS: u16 = 8;

/// A driver whose VMs are tasks of the test.
pub struct FakeDriver {
    script: Script,
    vms: Mutex<Vec<Arc<FakeVm>>>,
}

/// A fake VM.
pub struct FakeVm {
    script: Script,
    guest: Arc<Guest>,
    exit: watch::Sender<Option<VmExit>>,
    dialled: Mutex<Option<UnixStream>>,
    /// Taps are open as long as the VM lives.
    networks: Mutex<Vec<NetworkInterface>>,
    /// What it has, and the most that it can have.
    size: Mutex<(VmTarget, VmTarget)>,
    disks: Mutex<BTreeSet<DiskSerial>>,
    limits: Mutex<Limits>,
    file_system: Mutex<Option<FileSystem>>,
    console: Mutex<String>,
    relay: Mutex<Option<JoinHandle<()>>>,
}

/// A spec that the fake driver is content with.
///
/// # Errors
/// If `/dev/null` cannot be opened, which stands for kernel and initramfs.
pub fn fake_spec(sandbox: ids::SandboxId) -> io::Result<VmSpec> {
    let null = || std::fs::File::open("/dev/null");
    Ok(VmSpec {
        sandbox,
        vcpus: ids::VcpuCount::ONE,
        max_vcpus: ids::VcpuCount::new(4).unwrap_or(ids::VcpuCount::ONE),
        memory: ids::Mib(128),
        max_memory: ids::Mib(1024),
        kernel: null()?,
        initramfs: null()?,
        kernel_arguments: Vec::new(),
        networks: Vec::new(),
        disks: Vec::new(),
        limits: ids::Limits::default(),
        cid: ids::GuestCid::DEFAULT,
        host_ports: vec![CONTROL_PORT],
        console_log: None,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> DriverError {
    DriverError::new(DriverErrorKind::Gone, "the fake VM has ended")
}

impl FakeDriver {
    /// A driver that follows `script`.
    pub fn new(script: Script) -> Arc<Self> {
        Arc::new(Self {
            script,
            vms: Mutex::default(),
        })
    }

    /// The VMs launched so far.
    pub fn vms(&self) -> Vec<Arc<FakeVm>> {
        lock(&self.vms).clone()
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "fake",
            max_disks: MAX_DISKS,
            max_networks: 8,
            max_vcpus: 8,
        }
    }

    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError> {
        self.script.enter("Launch", "").await;
        let boot = self.script.how_to_boot();
        if let Boot::LaunchFails(kind) = boot {
            return Err(DriverError::new(kind, "the fake driver was told to fail"));
        }
        let disks = spec.disks.iter().map(|disk| disk.serial.clone()).collect();
        let vm = Arc::new(FakeVm {
            script: self.script.clone(),
            guest: Guest::new(self.script.clone()),
            exit: watch::Sender::new(None),
            dialled: Mutex::default(),
            networks: Mutex::new(spec.networks),
            size: Mutex::new((
                VmTarget {
                    vcpus: spec.vcpus,
                    memory: spec.memory,
                },
                VmTarget {
                    vcpus: spec.max_vcpus,
                    memory: spec.max_memory,
                },
            )),
            disks: Mutex::new(disks),
            limits: Mutex::new(spec.limits),
            file_system: Mutex::default(),
            console: Mutex::new("Linux version 6.12 (fake)\n".to_owned()),
            relay: Mutex::default(),
        });
        vm.boot(boot).await.map_err(|error| {
            DriverError::new(DriverErrorKind::Failed, "boot the fake VM").because(error)
        })?;
        lock(&self.vms).push(Arc::clone(&vm));
        Ok(vm)
    }
}

impl FakeVm {
    async fn boot(self: &Arc<Self>, boot: Boot) -> io::Result<()> {
        let (host, mut guest) = UnixStream::pair()?;
        match boot {
            Boot::Never | Boot::LaunchFails(_) => return Ok(()),
            Boot::Panic(console) => {
                lock(&self.console).push_str(&console);
                self.die(VmExit::Guest);
                return Ok(());
            }
            Boot::Mute => {
                // Kept open, or the silence would be an end.
                let relay = tokio::spawn(async move {
                    let _guest = guest;
                    std::future::pending::<()>().await;
                });
                *lock(&self.relay) = Some(relay);
            }
            Boot::Ready | Boot::WrongVersion => {
                let version = match boot {
                    Boot::Ready => PROTOCOL_VERSION,
                    _ => PROTOCOL_VERSION.saturating_add(1),
                };
                guest.write_all(&hello_frame(version)?).await?;
                self.serve(guest).await?;
            }
        }
        *lock(&self.dialled) = Some(host);
        Ok(())
    }

    /// Serves the agent behind a relay, whose end is the end of the connection.
    async fn serve(self: &Arc<Self>, mut outer: UnixStream) -> io::Result<()> {
        let (mut inner, served) = UnixStream::pair()?;
        let vm = Arc::downgrade(self);
        let service = Service {
            guest: Arc::clone(&self.guest),
            die: Arc::new(move |exit| {
                if let Some(vm) = vm.upgrade() {
                    vm.die(exit);
                }
            }),
        };
        let connections = futures::stream::once(async move { Ok::<_, io::Error>(served) })
            .chain(futures::stream::pending());
        let listener = ttrpc::asynchronous::transport::Listener::new(connections);
        let mut server = ttrpc::asynchronous::Server::new()
            .add_listener(listener)
            .register_service(service::create_agent(Arc::new(service)));
        server.start().await.map_err(io::Error::other)?;
        let relay = tokio::spawn(async move {
            let _server = server;
            // However it ends, both connections do.
            let _end = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
        });
        *lock(&self.relay) = Some(relay);
        Ok(())
    }

    /// Ends the VM as `exit` says. Only the first end counts.
    pub fn die(&self, exit: VmExit) {
        lock(&self.networks).clear();
        self.exit.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(exit);
            first
        });
        self.guest.power_off();
        if let Some(relay) = lock(&self.relay).take() {
            relay.abort();
        }
    }

    /// What its traffic is held to.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// The serial numbers of the disks that are attached.
    pub fn disks(&self) -> Vec<String> {
        lock(&self.disks).iter().map(ToString::to_string).collect()
    }

    /// vCPUs that the guest has been told to have up, and its memory in MiB.
    pub fn size(&self) -> (u32, u32) {
        let memory = lock(&self.size).0.memory.0;
        (self.guest.vcpus(), memory)
    }

    /// The size of a process's terminal, columns before rows; `exec` is empty for an init.
    pub fn terminal_size(&self, container: &str, exec: &str) -> Option<(u32, u32)> {
        self.guest.size(container, exec)
    }

    /// The resources that a container was last given, as JSON.
    pub fn resources(&self, container: &str) -> Option<Vec<u8>> {
        self.guest.resources(container)
    }

    /// Waits until a volume in the guest is as wanted, and gives its files.
    pub async fn volume(&self, name: &str, wanted: impl Fn(&Files) -> bool) -> Files {
        self.guest.volume(name, wanted).await
    }

    /// The guest tells this, true or not.
    pub fn tell(&self, event: api::event::Event) {
        self.guest.tell(event);
    }

    fn alive(&self) -> Result<(), DriverError> {
        match *self.exit.borrow() {
            None => Ok(()),
            Some(_) => Err(gone()),
        }
    }
}

fn hello_frame(protocol_version: u32) -> io::Result<Vec<u8>> {
    let said = api::Hello {
        protocol_version,
        agent_version: "fake".to_owned(),
        kernel_release: "6.12.0-fake".to_owned(),
        agent_started_ns: 1,
        agent_ready_ns: 2,
        ..Default::default()
    };
    hello::encode(&said).map_err(io::Error::other)
}

#[async_trait]
impl Adjustable for FakeVm {
    async fn set_limits(&self, limits: Limits) -> Result<(), DriverError> {
        self.alive()?;
        *lock(&self.limits) = limits;
        Ok(())
    }
}

#[async_trait]
impl Resize for FakeVm {
    async fn resize(&self, target: VmTarget, _within: Duration) -> Result<Resized, DriverError> {
        let VmTarget { vcpus, memory } = target;
        let wanted = format!("{} {}", vcpus.get(), memory.0);
        tokio::select! {
            () = self.script.enter("Resize", &wanted) => {}
            _ = self.wait() => {}
        }
        self.alive()?;
        let mut size = lock(&self.size);
        let (now, most) = &mut *size;
        if vcpus > most.vcpus || memory > most.memory {
            let message = format!("the fake VM cannot be resized to {wanted}");
            return Err(DriverError::new(DriverErrorKind::Unsupported, message));
        }
        let (least, greatest) = self.script.guest_memory();
        now.memory = memory.clamp(least, greatest);
        now.vcpus = now.vcpus.max(vcpus);
        Ok(Resized {
            vcpus: now.vcpus,
            memory: now.memory,
            bind_device: Some("virtio-mmio.31".to_owned()),
        })
    }
}

#[async_trait]
impl RunningVm for FakeVm {
    fn processes(&self) -> VmProcesses {
        VmProcesses {
            vmm: self.script.vmm_pid(),
        }
    }

    async fn connect(&self, port: VsockPort) -> Result<UnixStream, DriverError> {
        self.alive()?;
        if port != STDIO_PORT || self.script.refuses_streams() {
            let message = format!("nobody listens on port {port}");
            return Err(DriverError::new(DriverErrorKind::Refused, message));
        }
        let (host, guest_end) = UnixStream::pair()
            .map_err(|error| DriverError::new(DriverErrorKind::Failed, "pair").because(error))?;
        let guest = Arc::clone(&self.guest);
        tokio::spawn(async move { guest.accept_stream(guest_end).await });
        Ok(host)
    }

    async fn accept(&self) -> Result<(VsockPort, UnixStream), DriverError> {
        let dialled = lock(&self.dialled).take();
        if let Some(stream) = dialled {
            return Ok((CONTROL_PORT, stream));
        }
        self.wait().await;
        Err(gone())
    }

    async fn attach_disk(&self, disk: Disk) -> Result<AttachedDisk, DriverError> {
        // A real driver's call does not outlive its VM either.
        tokio::select! {
            () = self.script.enter("AttachDisk", disk.serial.as_str()) => {}
            _ = self.wait() => {}
        }
        self.alive()?;
        let mut disks = lock(&self.disks);
        if disks.len() >= usize::from(MAX_DISKS) {
            return Err(DriverError::new(
                DriverErrorKind::Exhausted,
                "no disk slot is free",
            ));
        }
        let serial = disk.serial.clone();
        if !disks.insert(disk.serial) {
            let message = format!("disk {serial} is attached already");
            return Err(DriverError::new(DriverErrorKind::Conflict, message));
        }
        Ok(AttachedDisk {
            bind_device: Some(format!("virtio-mmio.{}", disks.len())),
            serial,
        })
    }

    async fn detach_disk(&self, serial: &DiskSerial) -> Result<(), DriverError> {
        self.alive()?;
        lock(&self.disks).remove(serial);
        Ok(())
    }

    async fn attach_file_system(
        &self,
        file_system: FileSystem,
    ) -> Result<AttachedFileSystem, DriverError> {
        self.alive()?;
        let mut attached = lock(&self.file_system);
        if attached.is_some() {
            let message = "a file system is attached already";
            return Err(DriverError::new(DriverErrorKind::Conflict, message));
        }
        // Kept open, or its server would end.
        *attached = Some(file_system);
        Ok(AttachedFileSystem {
            bind_device: Some("virtio-mmio.30".to_owned()),
        })
    }

    async fn wait(&self) -> VmExit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        // The sender is here, so there is an exit.
        ended
            .ok()
            .and_then(|exit| exit.clone())
            .unwrap_or(VmExit::Killed)
    }

    async fn kill(&self) -> VmExit {
        self.die(VmExit::Killed);
        self.wait().await
    }

    async fn console(&self, from: Option<u64>) -> Console {
        let text = lock(&self.console).clone();
        let next = u64::try_from(text.len()).unwrap_or(u64::MAX);
        let from = from.unwrap_or(0).min(next);
        let skipped = usize::try_from(from).unwrap_or(usize::MAX);
        Console {
            from,
            next,
            text: text.get(skipped..).unwrap_or_default().to_owned(),
        }
    }

    async fn dump(&self) -> Result<String, DriverError> {
        self.alive()?;
        Ok("{\"driver\":\"fake\"}".to_owned())
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.die(VmExit::Killed);
    }
}
