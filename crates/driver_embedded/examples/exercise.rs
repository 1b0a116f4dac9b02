// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Exercises every device of a VM through a guest program that obeys lines on vsock port 1024 (not in this repository):
//! `exercise <coffer-vmm> <kernel> <initramfs> <vcpus> <MiB> [jail|no-jail]`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a tool for developers"
)]

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use driver_embedded::{EmbeddedDriver, EmbeddedOptions, JailUser};
use hypervisor::{Disk, DiskAccess, Driver, VmSpec};
use ids::{GuestCid, Mib, VcpuCount, VsockPort};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

struct Guest(BufReader<UnixStream>);

impl Guest {
    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        line.trim_end().to_owned()
    }
    async fn ask(&mut self, question: &str) -> String {
        let line = format!("{question}\n");
        self.0.get_mut().write_all(line.as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), self.line()).await;
        println!("{question}: {answer:?}");
        answer.unwrap_or_default()
    }
}

fn disk(serial: &str, bytes: usize, access: DiskAccess) -> Disk {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![b'd'; bytes]).unwrap();
    Disk {
        serial: serial.parse().unwrap(),
        file,
        access,
    }
}

fn rss(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let wanted =
        |l: &&str| l.starts_with("Rss") || l.starts_with("Pss:") || l.starts_with("Anonymous");
    text.lines().filter(wanted).collect::<Vec<_>>().join("; ")
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let jailed = args.get(5).is_none_or(|arg| arg != "no-jail");
    let directory = tempfile::tempdir().unwrap();
    let driver = EmbeddedDriver::new(EmbeddedOptions {
        vmm: args[0].clone().into(),
        kvm: "/dev/kvm".into(),
        private_dir: directory.path().to_owned(),
        jail: jailed.then_some(JailUser {
            uid: 64999,
            gid: 64999,
        }),
    });
    let spec = VmSpec {
        sandbox: "exercise".parse().unwrap(),
        vcpus: VcpuCount::new(args[3].parse().unwrap()).unwrap(),
        memory: Mib(args[4].parse().unwrap()),
        kernel: File::open(&args[1]).unwrap(),
        initramfs: File::open(&args[2]).unwrap(),
        kernel_arguments: Vec::new(),
        disks: vec![disk("boot-disk", 4 << 20, DiskAccess::ReadWrite)],
        cid: GuestCid::DEFAULT,
        host_ports: vec![VsockPort(1024)],
        console_log: None,
    };
    let started = Instant::now();
    let vm = driver.launch(spec).await.unwrap();
    println!("launched after {:?}", started.elapsed());
    let pid = vm.processes().vmm;
    let (_, stream) = tokio::select! {
        accepted = vm.accept() => accepted.unwrap(),
        exit = vm.wait() => panic_exit(&exit.to_string(), &vm.console_tail().await),
    };
    let mut guest = Guest(BufReader::new(stream));
    println!(
        "guest: {} after {:?}",
        guest.line().await,
        started.elapsed()
    );
    println!("{}", rss(pid));
    for question in [
        "cpus",
        "rng",
        "ls",
        "serial vda",
        "read vda",
        "write vda",
        "read vda",
    ] {
        if guest.ask(question).await.is_empty() {
            println!("{}", vm.dump().await.unwrap());
            panic_exit("no answer", &vm.console_tail().await);
        }
    }
    let attached = vm
        .attach_disk(disk("hot-disk", 1 << 20, DiskAccess::ReadOnly))
        .await
        .unwrap();
    let device = attached.bind_device.unwrap();
    guest.ask(&format!("bind {device}")).await;
    guest.ask("serial vdb").await;
    guest.ask("read vdb").await;
    let busy = vm.detach_disk(&"hot-disk".parse().unwrap()).await;
    println!("detach while bound: {}", busy.unwrap_err());
    guest.ask(&format!("unbind {device}")).await;
    vm.detach_disk(&"hot-disk".parse().unwrap()).await.unwrap();
    println!("detached");
    guest.ask("alloc 40").await;
    let mut stream = vm.connect(VsockPort(5000)).await.unwrap();
    let sent = Instant::now();
    let (mut read, mut write) = stream.split();
    let data = vec![7u8; 64 << 20];
    let mut back = vec![0; data.len()];
    let (written, received) = tokio::join!(write.write_all(&data), read.read_exact(&mut back));
    written.unwrap();
    received.unwrap();
    println!(
        "echo of 64 MiB equal: {} in {:?}",
        back == data,
        sent.elapsed()
    );
    drop(stream);
    println!("refused: {}", vm.connect(VsockPort(7)).await.unwrap_err());
    guest.ask("irq").await;
    println!("{}", vm.dump().await.unwrap());
    println!("{}", rss(pid));
    guest.0.get_mut().write_all(b"panic\n").await.unwrap();
    println!("{}", vm.wait().await);
    let tail = vm.console_tail().await;
    println!("console: {}", &tail[tail.len().saturating_sub(600)..]);
}

fn panic_exit(exit: &str, console: &str) -> ! {
    println!("{exit}; console: {console}");
    std::process::exit(1)
}
