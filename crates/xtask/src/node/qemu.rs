// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! QEMU's command line, and QEMU as a child that cannot outlive the thread that started it.

#![expect(
    unsafe_code,
    reason = "the parent-death signal and inherited descriptors are set between fork and exec"
)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::{Image, Job, Work};
use crate::{process, workspace};

/// The size of containerd's disk; sparse.
const DATA_DISK_BYTES: u64 = 32 << 30;

/// The kernel's parameters. The emulated clock needs no check, the guest no mitigations, and a panic ends QEMU.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init mitigations=off nokaslr \
                                 tsc=reliable no_timer_check random.trust_cpu=on";

/// A running QEMU and the pipes from the node's ports.
pub(crate) struct Qemu {
    pub(crate) process: Child,
    pub(crate) out: PipeReader,
    pub(crate) err: PipeReader,
    pub(crate) control: PipeReader,
}

/// Starts QEMU. It dies with the calling thread.
pub(crate) fn start(image: &Image, job: &Job) -> Result<Qemu> {
    let (out, out_end) = io::pipe().context("cannot make a pipe")?;
    let (err, err_end) = io::pipe().context("cannot make a pipe")?;
    let (control, control_end) = io::pipe().context("cannot make a pipe")?;
    let data = data_disk()?;
    let mut qemu = Command::new("qemu-system-x86_64");
    machine(&mut qemu, image, job);
    disk(&mut qemu, "root", &image.root, "readonly=on");
    disk(
        &mut qemu,
        "data",
        &by_descriptor(data.as_raw_fd()),
        "cache=unsafe,discard=unmap",
    );
    share(&mut qemu, "job", job.folder, "");
    share(&mut qemu, "dist", job.dist, ",readonly=on");
    share(&mut qemu, "source", job.source, ",readonly=on");
    qemu.args(["-device", "virtio-serial-pci,max_ports=8"]);
    for (name, end) in [
        ("out", &out_end),
        ("err", &err_end),
        ("control", &control_end),
    ] {
        port(&mut qemu, name, end);
    }
    match job.work {
        Work::Script(_) => qemu.stdin(Stdio::null()),
        Work::Terminal => qemu
            .args(["-chardev", "stdio,id=terminal,signal=off"])
            .args(["-device", "virtconsole,chardev=terminal"]),
    };
    let inherited = [
        out_end.as_raw_fd(),
        err_end.as_raw_fd(),
        control_end.as_raw_fd(),
        data.as_raw_fd(),
    ];
    // SAFETY: between fork and exec only prctl and fcntl are called, which are async-signal-safe, and no memory is
    // allocated; `inherited` are open descriptors of this function, copied into the child.
    unsafe {
        qemu.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            inherited
                .iter()
                .try_for_each(|descriptor| keep_at_exec(*descriptor))
        });
    }
    let process = qemu.spawn().context("cannot run qemu-system-x86_64")?;
    Ok(Qemu {
        process,
        out,
        err,
        control,
    })
}

/// Clears the close-on-exec flag.
fn keep_at_exec(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: called in the child for descriptors that the parent's `start` holds open until after the fork.
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

fn machine(qemu: &mut Command, image: &Image, job: &Job) {
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    qemu.args(["-machine", "q35", "-cpu", "max", "-nic", "none"]);
    if job.machine.count_instructions {
        qemu.args([
            "-accel",
            "tcg,thread=single",
            "-smp",
            "1",
            "-icount",
            "shift=0,sleep=off",
        ]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]);
    }
    qemu.arg("-m").arg(job.machine.memory_mib.to_string());
    qemu.arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs);
    qemu.args(["-append", KERNEL_PARAMETERS]);
    qemu.arg("-serial")
        .arg(joined("file:", &job.folder.join("console.log"), ""));
}

fn disk(qemu: &mut Command, name: &str, file: &Path, options: &str) {
    let drive = joined(
        "if=none,format=raw,file=",
        file,
        &format!(",id={name},{options}"),
    );
    qemu.arg("-drive").arg(drive);
    qemu.arg("-device")
        .arg(format!("virtio-blk-pci,drive={name},serial={name}"));
}

fn share(qemu: &mut Command, tag: &str, folder: &Path, options: &str) {
    let rest = format!(",mount_tag={tag},id={tag},security_model=none,multidevs=remap{options}");
    qemu.arg("-virtfs")
        .arg(joined("local,path=", folder, &rest));
}

fn port(qemu: &mut Command, name: &str, end: &PipeWriter) {
    let path = by_descriptor(end.as_raw_fd());
    qemu.arg("-chardev")
        .arg(joined(&format!("file,id={name},path="), &path, ""));
    qemu.arg("-device")
        .arg(format!("virtserialport,chardev={name},name={name}"));
}

/// A path at which QEMU, which inherits the descriptor, opens the same file, also if it has no name any more.
fn by_descriptor(descriptor: RawFd) -> std::path::PathBuf {
    Path::new("/proc/self/fd").join(descriptor.to_string())
}

/// An option with a path in it, in which QEMU wants commas doubled.
fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut option = OsString::from(before);
    option.push(path.to_string_lossy().replace(',', ",,"));
    option.push(after);
    option
}

/// An empty ext4 file system in a sparse file without a name, so that nothing is left of it whatever ends the node.
fn data_disk() -> Result<File> {
    let folder = workspace::cache();
    let disk = tempfile::NamedTempFile::new_in(&folder);
    let disk = disk.with_context(|| format!("cannot create a disk in {}", folder.display()))?;
    disk.as_file()
        .set_len(DATA_DISK_BYTES)
        .context("cannot size the node's data disk")?;
    let mut mkfs = Command::new("/sbin/mkfs.ext4");
    mkfs.args([
        "-q",
        "-F",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        "-J",
        "size=16",
    ]);
    process::output(mkfs.arg(disk.path()))?;
    Ok(disk.into_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comma_in_a_path_is_doubled() {
        assert_eq!(
            joined("path=", Path::new("/a,b"), ",id=x"),
            "path=/a,,b,id=x"
        );
    }
}
