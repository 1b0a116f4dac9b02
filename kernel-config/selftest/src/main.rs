// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The only program of a test initramfs: checks the kernel that runs it, says each result on the console, and reboots.
//!
//! Each check is a line, `ok <name>` or `FAIL <name>: <why>`; the last line is `selftest: <passed> passed, <failed> failed`.
//! What the machine offers is named by the command line (`selftest.have=blk,net,...`): a device that it names must work.
//! With `selftest.panic` the kernel is made to panic instead.

mod checks;
mod devices;
mod netlink;
mod network;
mod syscalls;

use std::fs;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

/// Results of the checks so far.
#[derive(Default)]
pub(crate) struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Notes the result of one check.
    pub(crate) fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed = self.passed.saturating_add(1);
                println!("ok {name}");
            }
            Err(error) => {
                self.failed = self.failed.saturating_add(1);
                println!("FAIL {name}: {error:#}");
            }
        }
    }
}

fn main() {
    let mut report = Report::default();
    report.check("mount pseudo file systems", mount_all());
    if devices::command_line().contains("selftest.panic") {
        // The kernel panics when its init ends.
        return;
    }
    checks::run(&mut report);
    syscalls::run(&mut report);
    network::run(&mut report);
    devices::run(&mut report);
    println!(
        "selftest: {} passed, {} failed",
        report.passed, report.failed
    );
    // The VMM is told to exit on a reboot.
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    println!("cannot reboot: {error}");
}

fn mount_all() -> Result<()> {
    let mounts = [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("devpts", "/dev/pts"),
        ("mqueue", "/dev/mqueue"),
        ("hugetlbfs", "/dev/hugepages"),
        ("tmpfs", "/run"),
    ];
    for (kind, target) in mounts {
        // A directory of sysfs exists already, and cannot be made.
        fs::create_dir_all(target).ok();
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mount {kind}"))?;
    }
    Ok(())
}
