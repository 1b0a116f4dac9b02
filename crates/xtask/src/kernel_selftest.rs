// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Boots the guest kernel in QEMU's software emulation, on both kinds of machine that it must run on, with an init
//! that checks it from inside (`kernel-config/selftest`).
//!
//! `microvm` is the embedded driver's machine: virtio-mmio devices on the command line, an MPTABLE, no ACPI, no PCI.
//! `q35` is Cloud Hypervisor's kind: PCI and ACPI.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::cpio::Archive;
use crate::{process, step, workspace};

/// Seconds after which a machine that has not ended is killed; it takes 2 to 5.
const DEADLINE: &str = "120";

/// Command line of both machines: `reboot=t` makes the init's last act the end of QEMU (`-no-reboot`).
const COMMAND_LINE: &str = "console=hvc0 reboot=t quiet earlyprintk=ttyS0";

/// A machine to boot on.
struct Machine {
    name: &'static str,
    /// The transport's suffix of QEMU's device names.
    transport: &'static str,
    arguments: &'static [&'static str],
    command_line: &'static str,
    /// What the init must find: `selftest.have` in `kernel-config/selftest/src/devices.rs`.
    have: &'static str,
}

const MACHINES: [Machine; 2] = [
    Machine {
        name: "microvm",
        transport: "device",
        arguments: &[
            "-M",
            "microvm,acpi=off,rtc=off,x-option-roms=off,auto-kernel-cmdline=on",
            "-m",
            "256M",
        ],
        command_line: "acpi=off pci=off",
        have: "blk,net,console,rng,balloon,smp,noacpi",
    },
    Machine {
        name: "q35",
        transport: "pci",
        arguments: &[
            "-M",
            "q35",
            "-m",
            "256M,maxmem=4G,slots=2",
            "-object",
            "memory-backend-ram,id=pmem,size=16M",
            "-device",
            "virtio-pmem-pci,memdev=pmem",
            "-object",
            "memory-backend-ram,id=mem,size=1G",
            "-device",
            "virtio-mem-pci,memdev=mem,requested-size=128M",
        ],
        command_line: "",
        have: "blk,net,console,rng,balloon,mem,pmem,smp,acpi",
    },
];

/// Boots `image` on each machine and checks what the init says.
///
/// # Errors
/// A check that failed (its line is in the error), or a kernel that does not come to the end of the checks.
pub(crate) fn run(image: &Path) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let initramfs = folder.path().join("initramfs");
    write_initramfs(&initramfs)?;
    for machine in MACHINES {
        step::step(&format!("guest kernel on {}", machine.name), || {
            boot(&machine, image, &initramfs, folder.path())
        })?;
    }
    Ok(())
}

/// Builds the init, statically linked, and packs it as the only file of an initramfs.
fn write_initramfs(to: &Path) -> Result<()> {
    let target = "x86_64-unknown-linux-gnu";
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "--package",
        "kernel_selftest",
        "--profile",
        "guest",
        "--target",
        target,
    ]);
    cargo
        .current_dir(workspace::root())
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    process::output(&mut cargo)?;
    let program = workspace::target()
        .join(target)
        .join("guest/kernel_selftest");
    let program =
        fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let write = || {
        let mut archive = Archive::new(File::create(to)?);
        archive.directory("dev")?;
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, &program)?;
        archive.finish()
    };
    write()
        .map(drop)
        .with_context(|| format!("cannot write {}", to.display()))
}

/// Boots once and judges the console's output.
fn boot(machine: &Machine, image: &Path, initramfs: &Path, folder: &Path) -> Result<()> {
    let (image_disk, scratch_disk) = disks(folder)?;
    let console = workspace::logs().join(format!("kernel-selftest-{}.log", machine.name));
    let early = folder.join("early");
    let device = |name: &str, rest: &str| format!("virtio-{name}-{}{rest}", machine.transport);
    let disk = |id: &str, path: &Path, rest: &str| {
        [
            "-drive".to_owned(),
            format!("if=none,format=raw,id={id},file={}{rest}", path.display()),
        ]
    };
    let mut qemu = Command::new("timeout");
    qemu.args([
        DEADLINE,
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        "2",
    ]);
    qemu.args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(machine.arguments);
    qemu.arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append");
    qemu.arg(format!(
        "{COMMAND_LINE} {} selftest.have={}",
        machine.command_line, machine.have
    ));
    qemu.args([
        "-chardev",
        "stdio,id=console",
        "-device",
        &device("serial", ""),
        "-device",
        "virtconsole,chardev=console",
    ]);
    qemu.arg("-serial").arg(format!("file:{}", early.display()));
    qemu.args(disk("image", &image_disk, ",readonly=on"))
        .args(["-device", &device("blk", ",drive=image")]);
    qemu.args(disk("scratch", &scratch_disk, ""))
        .args(["-device", &device("blk", ",drive=scratch")]);
    qemu.args([
        "-netdev",
        "user,id=net,restrict=on",
        "-device",
        &device("net", ",netdev=net"),
    ]);
    qemu.args([
        "-device",
        &device("rng", ""),
        "-device",
        &device("balloon", ",free-page-reporting=on"),
    ]);

    let ended = process::logged(&mut qemu, &console);
    let said = fs::read(&console).with_context(|| format!("cannot read {}", console.display()))?;
    let said = String::from_utf8_lossy(&said);
    let failed: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("FAIL "))
        .collect();
    ensure!(
        failed.is_empty(),
        "on {}:\n{}",
        machine.name,
        failed.join("\n")
    );
    let early = fs::read(&early).unwrap_or_default();
    ended.with_context(|| {
        format!(
            "the first console said:\n{}",
            process::last_lines(&String::from_utf8_lossy(&early))
        )
    })?;
    ensure!(
        said.lines()
            .any(|line| line.starts_with("selftest: ") && line.ends_with(" 0 failed")),
        "the checks did not come to their end on {}:\n{}",
        machine.name,
        process::last_lines(&said)
    );
    Ok(())
}

/// An EROFS image with the file `hello`, compressed, and an empty ext4 with quotas.
fn disks(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let tree = folder.join("tree");
    fs::create_dir_all(&tree).with_context(|| format!("cannot create {}", tree.display()))?;
    let hello = "hello from the image\n".repeat(10_000);
    fs::write(tree.join("hello"), hello).context("cannot write the image's file")?;
    let image = folder.join("image.erofs");
    process::output(
        Command::new("mkfs.erofs")
            .arg("-zlz4hc")
            .arg(&image)
            .arg(&tree),
    )?;
    let scratch = folder.join("scratch.ext4");
    File::create(&scratch)?
        .set_len(64 << 20)
        .context("cannot size the scratch disk")?;
    process::output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "quota,project"])
            .arg(&scratch),
    )?;
    Ok((image, scratch))
}
