// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Boots a kernel with an initramfs and shows its console: `boot <coffer-vmm> <kernel> <initramfs> <vcpus> <MiB> [kernel arguments]`.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use nix::sys::socket::MsgFlags;
use vmm::boot::BootProtocol;
use vmm::control::{Call, Config, ControlSocket, JailConfig, Received, Request};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, kernel, initramfs, vcpus, memory, rest @ ..] = &args[..] else {
        return Err(
            "usage: boot <coffer-vmm> <kernel> <initramfs> <vcpus> <MiB> [kernel arguments]".into(),
        );
    };
    let jail = std::env::var_os("COFFER_NO_JAIL")
        .is_none()
        .then_some(JailConfig {
            uid: 64999,
            gid: 64999,
        });
    let boot = match std::env::var_os("COFFER_LINUX64") {
        Some(_) => BootProtocol::Linux64,
        None => BootProtocol::Auto,
    };
    let config = Config {
        vcpus: vcpus.parse()?,
        memory_mib: memory.parse()?,
        boot,
        kernel_arguments: rest.join(" "),
        cid: 3,
        host_ports: Vec::new(),
        console_log: true,
        disks: Vec::new(),
        networks: Vec::new(),
        limits: Default::default(),
        disk_slots: 24,
        jail,
    };
    let (ours, theirs) = ControlSocket::pair()?;
    let mut child = Command::new(vmm)
        .stdin(Stdio::from(theirs.into_fd()))
        .spawn()?;
    let path = std::env::temp_dir().join(format!("boot-{}", std::process::id()));
    let listener = UnixListener::bind(&path)?;
    std::fs::remove_file(&path)?;
    listener.set_nonblocking(true)?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let (kernel, initramfs) = (File::open(kernel)?, File::open(initramfs)?);
    let stdout = std::io::stdout();
    let fds: [BorrowedFd<'_>; 5] = [
        kvm.as_fd(),
        kernel.as_fd(),
        initramfs.as_fd(),
        listener.as_fd(),
        stdout.as_fd(),
    ];
    let started = std::time::Instant::now();
    let request = Request::Start(Box::new(config));
    ours.send(&Call { id: 1, request }, &fds, MsgFlags::empty())?;
    while let Received::Message(bytes, _) = ours.receive(MsgFlags::empty())? {
        println!(
            "[{:?}] {}",
            started.elapsed(),
            String::from_utf8_lossy(&bytes)
        );
    }
    println!("[{:?}] {}", started.elapsed(), child.wait()?);
    Ok(())
}
