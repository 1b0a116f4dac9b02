// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Measures a VMM from its process start through the guest's first instruction to its exit, 1 vCPU and 128 MiB:
//! `start_to_exit <coffer-vmm> [repetitions]`. Beside it, in turn, Cloud Hypervisor with the same guest, if it is on PATH.
//! Prints microseconds as JSON: for each VMM every sample, and the median.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::socket::MsgFlags;
use vmm::boot::BootProtocol;
use vmm::control::{Call, Config, ControlSocket, JailConfig, Received, Request};

#[path = "../tests/common/pvh_kernel.rs"]
mod pvh_kernel;

/// Faults without handlers: a triple fault, on the first instruction.
const RESET: &[u8] = &[0x0f, 0x0b];

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let program = args
        .next()
        .ok_or("usage: start_to_exit <coffer-vmm> [repetitions]")?;
    let repetitions: usize = args.next().unwrap_or_else(|| "50".to_owned()).parse()?;
    let folder = std::env::temp_dir().join(format!("start-to-exit-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let path = folder.join("kernel");
    File::create(&path)?.write_all(&pvh_kernel::pvh_kernel(RESET))?;
    let empty = folder.join("initramfs");
    File::create(&empty)?;
    let peer = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|folder| folder.join("cloud-hypervisor"))
        .find(|program| program.is_file());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..repetitions {
        let (kernel, initramfs) = (File::open(&path)?, File::open(&empty)?);
        ours.push(once(&program, &kernel, &initramfs, &folder.join("vsock"))?);
        if let Some(program) = &peer {
            theirs.push(once_cloud_hypervisor(program, &path)?);
        }
    }
    std::fs::remove_dir_all(&folder)?;
    let (ours, theirs) = (series(ours), peer.map(|_| series(theirs)));
    let theirs = theirs.unwrap_or_else(|| "null".to_owned());
    println!("{{\"coffer-vmm\":{ours},\"cloud-hypervisor\":{theirs}}}");
    Ok(())
}

fn series(samples: Vec<u128>) -> String {
    let mut sorted = samples.clone();
    sorted.sort_unstable();
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
    format!("{{\"median_us\":{median},\"samples_us\":{samples:?}}}")
}

fn once_cloud_hypervisor(program: &Path, kernel: &Path) -> Result<u128, Box<dyn Error>> {
    let started = Instant::now();
    let status = Command::new(program)
        .arg("--kernel")
        .arg(kernel)
        .args(["--cpus", "boot=1", "--memory", "size=128M"])
        .args(["--console", "off", "--serial", "off"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(format!("Cloud Hypervisor failed: {status}").into());
    }
    Ok(started.elapsed().as_micros())
}

fn once(
    program: &str,
    kernel: &File,
    initramfs: &File,
    socket: &Path,
) -> Result<u128, Box<dyn Error>> {
    let config = Config {
        vcpus: 1,
        memory_mib: 128,
        boot: BootProtocol::Auto,
        kernel_arguments: String::new(),
        cid: 3,
        host_ports: Vec::new(),
        console_log: false,
        disks: Vec::new(),
        networks: Vec::new(),
        limits: Default::default(),
        disk_slots: 24,
        jail: std::env::var_os("COFFER_NO_JAIL")
            .is_none()
            .then_some(JailConfig {
                uid: 64999,
                gid: 64999,
            }),
    };
    let started = Instant::now();
    let (ours, theirs) = ControlSocket::pair()?;
    let mut child = Command::new(program)
        .env_clear()
        .stdin(Stdio::from(theirs.into_fd()))
        .spawn()?;
    let listener = UnixListener::bind(socket)?;
    std::fs::remove_file(socket)?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let fds = [
        kvm.as_fd(),
        kernel.as_fd(),
        initramfs.as_fd(),
        listener.as_fd(),
    ];
    let request = Request::Start(Box::new(config));
    ours.send(&Call { id: 1, request }, &fds, MsgFlags::empty())?;
    while let Received::Message(..) = ours.receive(MsgFlags::empty())? {}
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("the VMM failed: {status}").into());
    }
    Ok(started.elapsed().as_micros())
}
