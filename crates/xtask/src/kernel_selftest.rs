// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Boots the guest kernel in QEMU's software emulation, on the kinds of machine that it must run on, with an init
//! that checks it from inside (`kernel-config/selftest`).
//!
//! `microvm` is the embedded driver's machine: virtio-mmio devices on the command line, an MPTABLE, no ACPI, no PCI.
//! `q35` is Cloud Hypervisor's kind: PCI and ACPI, with memory to plug in and persistent memory.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{build, process, step, workspace};

/// Seconds after which a machine that has not ended is killed; it takes 2 to 5.
const DEADLINE: &str = "120";

/// Command line of all machines: `reboot=t` makes the init's last act the end of QEMU (`-no-reboot`).
const COMMAND_LINE: &str = "console=hvc0 reboot=t quiet earlyprintk=ttyS0";

/// A machine to boot on.
struct Machine {
    name: &'static str,
    /// The transport's suffix of QEMU's device names.
    transport: &'static str,
    /// Further arguments of QEMU, apart by spaces.
    arguments: &'static str,
    command_line: &'static str,
    /// What the init must find: `selftest.have` in `kernel-config/selftest/src/devices.rs`.
    have: &'static str,
}

const MACHINES: [Machine; 2] = [
    Machine {
        name: "microvm",
        transport: "device",
        arguments: "-m 256M -M microvm,acpi=off,x-option-roms=off,auto-kernel-cmdline=on",
        command_line: "acpi=off pci=off",
        have: "blk,net,console,rng,balloon,smp,noacpi",
    },
    Machine {
        name: "q35",
        transport: "pci",
        arguments: "-M q35 -m 256M,maxmem=4G,slots=2 \
            -object memory-backend-ram,id=pmem,size=16M -device virtio-pmem-pci,memdev=pmem \
            -object memory-backend-ram,id=mem,size=1G -device virtio-mem-pci,memdev=mem,requested-size=128M",
        command_line: "",
        have: "blk,net,console,rng,balloon,mem,pmem,smp,acpi",
    },
];

/// Boots `image` on each machine and checks what the init says, and what the kernel says when it panics.
///
/// # Errors
/// A check that failed (its line is in the error), or a kernel that does not come to the end of the checks.
pub(crate) fn run(image: &Path) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let bench = Bench::new(image, folder.path())?;
    for machine in &MACHINES {
        step::step(&format!("guest kernel on {}", machine.name), || {
            judge(&bench.boot(machine, &format!("selftest.have={}", machine.have))?)
        })?;
        step::step(&format!("guest kernel panics on {}", machine.name), || {
            let said = bench.boot(machine, "selftest.panic")?;
            let told = said.console.contains("Kernel panic - not syncing");
            ensure!(told, "the console does not tell of the panic:\n{said}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Every check ran, and none failed.
fn judge(said: &Said) -> Result<()> {
    let failed: Vec<&str> = said
        .console
        .lines()
        .filter(|line| line.starts_with("FAIL "))
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    let ended = |line: &str| line.starts_with("selftest: ") && line.ends_with(" 0 failed");
    ensure!(
        said.console.lines().any(ended),
        "the checks do not come to their end:\n{said}"
    );
    Ok(())
}

/// What a machine wrote before it ended.
struct Said {
    /// hvc0.
    console: String,
    /// The serial port, which the kernel uses until hvc0 is there.
    early: String,
}

impl fmt::Display for Said {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = process::last_lines(&self.console);
        let early = process::last_lines(&self.early);
        write!(to, "{last}\nbefore the console:\n{early}")
    }
}

/// Files that each boot uses.
struct Bench<'a> {
    image: &'a Path,
    initramfs: PathBuf,
    folder: &'a Path,
}

impl<'a> Bench<'a> {
    /// Makes the initramfs, and a disk image in `folder`.
    fn new(image: &'a Path, folder: &'a Path) -> Result<Self> {
        let bench = Self {
            image,
            initramfs: build::initramfs("kernel_selftest", "kernel_selftest")?,
            folder,
        };
        let tree = bench.file("tree");
        fs::create_dir(&tree).with_context(|| format!("cannot create {}", tree.display()))?;
        let hello = "hello from the image\n".repeat(10_000);
        fs::write(tree.join("hello"), hello).context("cannot write the image's file")?;
        let mut erofs = Command::new("mkfs.erofs");
        process::output(erofs.arg("-zlz4hc").arg(bench.file("image")).arg(&tree))?;
        Ok(bench)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Boots to the machine's end.
    fn boot(&self, machine: &Machine, command_line: &str) -> Result<Said> {
        let scratch = self.file("scratch");
        let sized = File::create(&scratch).and_then(|file| file.set_len(64 << 20));
        sized.with_context(|| format!("cannot make {}", scratch.display()))?;
        let mut ext4 = Command::new("mke2fs");
        process::output(
            ext4.args(["-q", "-F", "-t", "ext4", "-O", "quota,project"])
                .arg(&scratch),
        )?;
        let console = workspace::logs().join(format!("kernel-selftest-{}.log", machine.name));
        process::logged(&mut self.qemu(machine, command_line), &console)?;
        let read = |path: &Path| {
            let bytes =
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            anyhow::Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Said {
            console: read(&console)?,
            early: read(&self.file("early"))?,
        })
    }

    fn qemu(&self, machine: &Machine, command_line: &str) -> Command {
        let device = |name: &str| format!("virtio-{name}-{}", machine.transport);
        let mut qemu = Command::new("timeout");
        qemu.arg(DEADLINE).arg("qemu-system-x86_64");
        qemu.args("-accel tcg -cpu max -smp 2 -nodefaults -no-reboot -display none".split(' '));
        qemu.args(machine.arguments.split(' '));
        qemu.arg("-kernel").arg(self.image);
        qemu.arg("-initrd").arg(&self.initramfs);
        qemu.arg("-append").arg(format!(
            "{COMMAND_LINE} {} {command_line}",
            machine.command_line
        ));
        // With one port its driver does not wait for messages of the device, so the console is there before init.
        qemu.args(["-chardev", "stdio,id=console", "-device"])
            .arg(device("serial") + ",max_ports=1");
        qemu.args(["-device", "virtconsole,chardev=console"]);
        qemu.arg("-serial")
            .arg(format!("file:{}", self.file("early").display()));
        for (id, rest) in [("image", ",readonly=on"), ("scratch", "")] {
            let file = self.file(id);
            qemu.arg("-drive").arg(format!(
                "if=none,format=raw,id={id},file={}{rest}",
                file.display()
            ));
            qemu.arg("-device")
                .arg(format!("{},drive={id}", device("blk")));
        }
        qemu.args(["-netdev", "user,id=net,restrict=on", "-device"])
            .arg(device("net") + ",netdev=net");
        qemu.arg("-device").arg(device("rng"));
        qemu.arg("-device")
            .arg(device("balloon") + ",free-page-reporting=on");
        qemu
    }
}
