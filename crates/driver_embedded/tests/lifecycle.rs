// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The driver with real VMM processes and guests of a few instructions, which run on any KVM. Needs `/dev/kvm`.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use driver_embedded::{DISK_SLOTS, EmbeddedDriver, EmbeddedOptions};
use hypervisor::{
    Disk, DiskAccess, Driver, DriverError, DriverErrorKind, FileSystem, NetworkInterface,
    RunningVm, VmExit, VmSpec,
};
use ids::{GuestCid, Limits, Mib, Rate, VcpuCount, VsockPort};
use network_testbed::{Namespace, is_root};
use pod_network::{Metadata, PodNetwork};
use virtio_testdriver::{honest, run_back_end};

#[path = "../../vmm/tests/common/pvh_kernel.rs"]
mod pvh_kernel;

use pvh_kernel::pvh_kernel;

/// Faults without handlers: a triple fault.
const RESET: &[u8] = &[0x0f, 0x0b];
/// Runs for ever.
const SPIN: &[u8] = &[0xeb, 0xfe];

/// The VMM, built from the same sources: `$COFFER_VMM` where there is no cargo.
fn vmm() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("COFFER_VMM") {
            return program.into();
        }
        let built = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--package",
                "vmm",
                "--bin",
                "coffer-vmm",
            ])
            .status()
            .unwrap();
        assert!(built.success());
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        profile.join("coffer-vmm")
    })
}

fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn spec(code: &[u8]) -> VmSpec {
    VmSpec {
        sandbox: "test".parse().unwrap(),
        vcpus: VcpuCount::ONE,
        max_vcpus: VcpuCount::ONE,
        memory: Mib(64),
        max_memory: Mib(64),
        kernel: file_with(&pvh_kernel(code)),
        initramfs: file_with(b""),
        kernel_arguments: Vec::new(),
        networks: Vec::new(),
        disks: Vec::new(),
        limits: Limits::default(),
        cid: GuestCid::DEFAULT,
        host_ports: vec![VsockPort(1024)],
        console_log: None,
    }
}

fn disk(serial: &str) -> Disk {
    Disk {
        serial: serial.parse().unwrap(),
        file: file_with(&[0; 4096]),
        access: DiskAccess::ReadOnly,
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    driver: EmbeddedDriver,
}

fn fixture_with(vmm: &Path) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let driver = EmbeddedDriver::new(EmbeddedOptions {
        vmm: vmm.to_owned(),
        kvm: "/dev/kvm".into(),
        private_dir: directory.path().to_owned(),
        jail: None,
    });
    Fixture { directory, driver }
}

async fn launch(spec: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError> {
    let fixture = fixture_with(vmm());
    let vm = fixture.driver.launch(spec).await;
    let left = std::fs::read_dir(fixture.directory.path()).unwrap().count();
    assert_eq!(left, 0, "files are left in the private folder");
    vm
}

fn is_running(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn guest_that_resets_itself_is_told_to_every_waiter_and_later() {
    let vm = launch(spec(RESET)).await.unwrap();
    let (one, two) = tokio::join!(vm.wait(), vm.wait());
    assert_eq!((one, two), (VmExit::Guest, VmExit::Guest));
    assert_eq!(vm.wait().await, VmExit::Guest);
    assert_eq!(vm.kill().await, VmExit::Guest, "it was not killed");
    assert!(!is_running(vm.processes().vmm));
}

fn file_system() -> FileSystem {
    let (connection, theirs) = UnixStream::pair().unwrap();
    let _ = run_back_end(theirs, honest);
    FileSystem {
        tag: "volumes".to_owned(),
        connection,
    }
}

#[tokio::test]
async fn vm_has_one_file_system_in_a_slot_of_its_own() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let attached = vm.attach_file_system(file_system()).await.unwrap();
    assert_eq!(attached.bind_device.as_deref(), Some("virtio-mmio.4"));
    let disk = vm.attach_disk(disk("a")).await.unwrap();
    assert_eq!(disk.bind_device.as_deref(), Some("virtio-mmio.5"));
    let second = vm.attach_file_system(file_system()).await;
    assert_eq!(second.unwrap_err().kind(), DriverErrorKind::Conflict);
    let dump = vm.dump().await.unwrap();
    assert!(dump.contains(r#""device":"fs""#), "{dump}");
    assert_eq!(vm.kill().await, VmExit::Killed);
    let late = vm.attach_file_system(file_system()).await;
    assert_eq!(late.unwrap_err().kind(), DriverErrorKind::Gone);
}

#[tokio::test]
async fn limits_change_while_the_vm_runs() {
    let mut limited = spec(SPIN);
    limited.disks = vec![disk("a")];
    limited.limits.disk.bytes = Rate::new(1 << 20);
    let vm = launch(limited).await.unwrap();
    vm.set_limits(Limits::default()).await.unwrap();
    let dump = vm.dump().await.unwrap();
    assert!(dump.contains(r#""waits_for_limits""#), "{dump}");
    vm.kill().await;
    let late = vm.set_limits(Limits::default()).await;
    assert_eq!(late.unwrap_err().kind(), DriverErrorKind::Gone);
}

#[tokio::test]
async fn taps_are_the_vms_and_go_with_it() {
    if !is_root() {
        return;
    }
    let pod = Namespace::new();
    for name in ["eth0", "net1"] {
        pod.ip(&format!("link add {name} type veth peer name {name}p"));
        pod.ip(&format!("link set {name} up"));
    }
    let taps = || pod.ip("-brief link show").matches("coffer").count();
    let (_network, plan) = PodNetwork::attach(&pod.path(), Metadata::Denied).unwrap();
    let mut spec = spec(SPIN);
    // Cards and disks do not take each other's descriptors.
    spec.disks = vec![disk("a")];
    spec.networks = plan
        .taps
        .into_iter()
        .map(|tap| NetworkInterface {
            tap: tap.tap,
            mac: tap.interface.mac,
            mtu: tap.interface.mtu,
        })
        .collect();
    let vm = launch(spec).await.unwrap();
    assert_eq!(taps(), 2);
    let dump: serde_json::Value = serde_json::from_str(&vm.dump().await.unwrap()).unwrap();
    let cards = dump.to_string().matches("\"device\":\"net\"").count();
    assert_eq!(cards, 2, "{dump}");
    vm.kill().await;
    assert_eq!(taps(), 0);
}

#[tokio::test]
async fn calls_after_the_end_fail_as_gone() {
    let vm = launch(spec(RESET)).await.unwrap();
    vm.wait().await;
    let gone = DriverErrorKind::Gone;
    assert_eq!(vm.connect(VsockPort(1)).await.unwrap_err().kind(), gone);
    assert_eq!(vm.accept().await.unwrap_err().kind(), gone);
    assert_eq!(vm.attach_disk(disk("a")).await.unwrap_err().kind(), gone);
    assert_eq!(vm.dump().await.unwrap_err().kind(), gone);
    let last_words = vm.console(None).await.text;
    assert!(last_words.starts_with("triple fault"), "{last_words}");
}

#[tokio::test]
async fn kill_is_idempotent_and_leaves_no_process() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let pid = vm.processes().vmm;
    assert!(is_running(pid));
    let (one, two) = tokio::join!(vm.kill(), vm.kill());
    assert_eq!((one, two), (VmExit::Killed, VmExit::Killed));
    assert!(!is_running(pid));
}

#[tokio::test]
async fn vmm_killed_by_others_is_told_with_the_signal() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let pid = vm.processes().vmm;
    let killed = Command::new("kill").arg("-9").arg(pid.to_string()).status();
    assert!(killed.unwrap().success());
    assert_eq!(vm.wait().await, VmExit::Signal(9));
}

#[tokio::test]
async fn dropped_handle_kills_the_vm() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let pid = vm.processes().vmm;
    let waiting = {
        // A pidfd to see the end without asking the VM.
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    };
    drop(vm);
    let ended = tokio::task::spawn_blocking(move || {
        let mut fds = [rustix::event::PollFd::new(
            &waiting,
            rustix::event::PollFlags::IN,
        )];
        let limit = rustix::time::Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut fds, Some(&limit)).unwrap()
    });
    assert_eq!(ended.await.unwrap(), 1);
}

#[tokio::test]
async fn corrupt_kernel_is_an_artifact_error_with_the_reason() {
    let mut spec = spec(SPIN);
    spec.kernel = file_with(b"not a kernel");
    let error = launch(spec).await.err().unwrap();
    assert_eq!(error.kind(), DriverErrorKind::Artifact);
    assert!(error.to_string().contains("guest kernel"), "{error}");
}

#[tokio::test]
async fn missing_programs_and_devices_are_node_errors() {
    let error = fixture_with(Path::new("/nonexistent/coffer-vmm"))
        .driver
        .launch(spec(SPIN))
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), DriverErrorKind::Node);
    let driver = EmbeddedDriver::new(EmbeddedOptions {
        vmm: vmm().to_owned(),
        kvm: "/nonexistent/kvm".into(),
        private_dir: std::env::temp_dir(),
        jail: None,
    });
    let error = driver.launch(spec(SPIN)).await.err().unwrap();
    assert_eq!(error.kind(), DriverErrorKind::Node);
    assert!(error.to_string().contains("cofferctl check"), "{error}");
}

#[tokio::test]
async fn program_that_is_no_vmm_is_an_error_and_no_hang() {
    let error = fixture_with(Path::new("/bin/true"))
        .driver
        .launch(spec(SPIN))
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), DriverErrorKind::Failed);
}

#[tokio::test]
async fn vmm_that_breaks_the_protocol_is_killed() {
    // Answers with a message that is none, and would stay.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("vmm");
    let script = "#!/bin/sh\nprintf nonsense >&0\nexec sleep 1000\n";
    std::fs::write(&program, script).unwrap();
    let mut permissions = std::fs::metadata(&program).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    std::fs::set_permissions(&program, permissions).unwrap();
    let launched = fixture_with(&program).driver.launch(spec(SPIN)).await;
    let error = launched.err().unwrap();
    assert_eq!(error.kind(), DriverErrorKind::Failed);
    assert!(error.to_string().contains("signal 9"), "{error}");
}

#[tokio::test]
async fn disks_fill_slots_until_none_is_left_and_detached_slots_are_free_again() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let mut devices = Vec::new();
    for number in 0..DISK_SLOTS {
        let attached = vm.attach_disk(disk(&format!("d{number}"))).await.unwrap();
        devices.push(attached.bind_device.unwrap());
    }
    assert_eq!(devices[0], "virtio-mmio.4");
    let error = vm.attach_disk(disk("more")).await.unwrap_err();
    assert_eq!(error.kind(), DriverErrorKind::Exhausted);
    vm.detach_disk(&"d3".parse().unwrap()).await.unwrap();
    vm.detach_disk(&"d3".parse().unwrap()).await.unwrap();
    let error = vm.attach_disk(disk("d4")).await.unwrap_err();
    assert_eq!(error.kind(), DriverErrorKind::Conflict);
    let again = vm.attach_disk(disk("d3")).await.unwrap();
    assert_eq!(again.bind_device.as_ref(), Some(&devices[3]));
    let dump = vm.dump().await.unwrap();
    assert!(dump.contains("\"serial\":\"d3\""), "{dump}");
    vm.kill().await;
}

#[tokio::test]
async fn guest_that_does_not_answer_on_vsock_is_refused() {
    let vm = launch(spec(SPIN)).await.unwrap();
    let error = vm.connect(VsockPort(5000)).await.unwrap_err();
    let kind = error.kind();
    assert!(
        matches!(kind, DriverErrorKind::Refused | DriverErrorKind::Timeout),
        "{error}"
    );
}
