// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! QEMU's command line, and QEMU as a child that cannot outlive the thread that started it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::{Image, Job, Running, Work, child, tsc};
use crate::{process, workspace};

/// The size of containerd's disk; sparse.
const DATA_DISK_BYTES: u64 = 32 << 30;

/// The kernel's parameters. The emulated clock needs no check, the guest no mitigations, and a panic ends QEMU.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init mitigations=off nokaslr \
                                 tsc=reliable no_timer_check random.trust_cpu=on unknown_nmi_panic";

/// Starts QEMU. It dies with the calling thread.
pub(crate) fn start(image: &Image, job: &Job) -> Result<Running> {
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
        Work::Script(_) => {
            let log = job.folder.join("monitor.log");
            let log =
                File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
            qemu.args(["-chardev", "stdio,id=monitor,signal=off"])
                .args(["-mon", "chardev=monitor"])
                .stdin(Stdio::piped())
                .stdout(log)
        }
        Work::Terminal => qemu
            .args(["-chardev", "stdio,id=terminal,signal=off"])
            .args(["-device", "virtconsole,chardev=terminal"]),
    };
    let inherited = [
        out_end.as_fd(),
        err_end.as_fd(),
        control_end.as_fd(),
        data.as_fd(),
    ];
    let process = child::spawn(&mut qemu, &inherited)?;
    Ok(Running {
        process,
        out,
        err,
        control,
    })
}

fn machine(qemu: &mut Command, image: &Image, job: &Job) {
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    // Without the features that make kernels copy and clear pages byte by byte: emulated, that is one slow step each, the
    // slower where a page has held code, as all of a dead guest's have. It makes the boots of all but the first guest twice
    // as fast. And without an instruction whose flags QEMU 7.2 gets wrong.
    qemu.args([
        "-machine",
        "q35",
        "-cpu",
        "max,-erms,-fsrm,-cx16",
        "-nic",
        "none",
    ]);
    // One processor: with two, QEMU 7.2 at times runs kernel code that the other one has just patched away. Work that can
    // be divided gets several nodes instead. A small cache of translated code: what was translated from the memory of dead
    // guests slows down every write of the next one to the same pages until it is thrown out.
    qemu.args(["-smp", "1", "-accel", "tcg,thread=single,tb-size=256"]);
    if job.machine.count_instructions {
        qemu.args(["-icount", "shift=0,sleep=off"]);
    }
    qemu.arg("-m").arg(job.machine.memory_mib.to_string());
    qemu.arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs);
    let mut parameters = KERNEL_PARAMETERS.to_owned();
    if !job.machine.count_instructions {
        parameters.push_str(&format!(" tsc_early_khz={}", tsc::khz()));
    }
    qemu.arg("-append").arg(parameters);
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
fn by_descriptor(descriptor: RawFd) -> PathBuf {
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
