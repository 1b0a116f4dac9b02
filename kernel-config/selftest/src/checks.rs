// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What files under `/proc`, `/sys` and `/dev` tell: file systems, cgroup controllers, namespaces, hardening.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::Report;

const FILESYSTEMS: &[&str] = &[
    "cgroup2",
    "devpts",
    "devtmpfs",
    "erofs",
    "ext4",
    "fuse",
    "hugetlbfs",
    "mqueue",
    "overlay",
    "proc",
    "sysfs",
    "tmpfs",
    "virtiofs",
];

const CONTROLLERS: &[&str] = &["cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc"];

/// Files of a cgroup that resources of an OCI spec end up in.
const CGROUP_FILES: &[&str] = &[
    "cgroup.freeze",
    "cgroup.kill",
    "cgroup.events",
    "cpu.max",
    "cpu.weight",
    "cpu.stat",
    "cpu.pressure",
    "cpuset.cpus",
    "cpuset.mems",
    "hugetlb.2MB.max",
    "io.max",
    "io.weight",
    "io.stat",
    "io.pressure",
    "memory.events",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.pressure",
    "memory.reclaim",
    "memory.stat",
    "memory.swap.max",
    "misc.max",
    "pids.max",
    "pids.current",
];

const NAMESPACES: &[&str] = &["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Doors that must not be there.
const ABSENT: &[&str] = &[
    "/dev/mem",
    "/dev/port",
    "/dev/kmem",
    "/dev/nvram",
    "/proc/kcore",
    "/proc/config.gz",
    "/proc/modules",
    "/proc/sysrq-trigger",
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
    "/proc/sys/kernel/modprobe",
];

/// Files with the content that they must have.
const SETTINGS: &[(&str, &str)] = &[
    ("/proc/sys/kernel/dmesg_restrict", "1"),
    ("/proc/sys/kernel/unprivileged_bpf_disabled", "2"),
    ("/proc/sys/kernel/perf_event_paranoid", "3"),
    ("/proc/sys/kernel/randomize_va_space", "2"),
    ("/proc/sys/kernel/panic_on_oops", "1"),
    ("/proc/sys/kernel/panic", "-1"),
    ("/proc/sys/net/core/bpf_jit_enable", "1"),
    ("/proc/sys/dev/tty/ldisc_autoload", "0"),
    ("/proc/sys/dev/tty/legacy_tiocsti", "0"),
];

pub(crate) fn run(report: &mut Report) {
    report.check("file systems", filesystems());
    report.check("cgroup controllers", cgroup());
    for name in NAMESPACES {
        report.check(
            &format!("namespace {name}"),
            exists(&format!("/proc/self/ns/{name}")),
        );
    }
    for path in ABSENT {
        report.check(&format!("no {path}"), absent(path));
    }
    for (path, value) in SETTINGS {
        report.check(&format!("{path} is {value}"), setting(path, value));
    }
    report.check(
        "pressure of the whole guest",
        exists("/proc/pressure/memory"),
    );
    report.check("terminals", exists("/dev/pts/ptmx"));
    report.check(
        "no writable and executable kernel memory was reported",
        no_warning(),
    );
}

fn exists(path: &str) -> Result<()> {
    ensure!(
        Path::new(path).symlink_metadata().is_ok(),
        "{path} is not there"
    );
    Ok(())
}

fn absent(path: &str) -> Result<()> {
    ensure!(Path::new(path).symlink_metadata().is_err(), "it is there");
    Ok(())
}

fn setting(path: &str, wanted: &str) -> Result<()> {
    let value = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    ensure!(value.trim() == wanted, "it is {}", value.trim());
    Ok(())
}

fn filesystems() -> Result<()> {
    let text = fs::read_to_string("/proc/filesystems")?;
    let have: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    let missing: Vec<_> = FILESYSTEMS
        .iter()
        .filter(|name| !have.contains(**name))
        .collect();
    ensure!(missing.is_empty(), "missing: {missing:?}");
    Ok(())
}

fn cgroup() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let all = CONTROLLERS
        .iter()
        .map(|name| format!("+{name}"))
        .collect::<Vec<_>>()
        .join(" ");
    fs::write(root.join("cgroup.subtree_control"), &all)
        .with_context(|| format!("enable {all}"))?;
    let child = root.join("selftest");
    fs::create_dir(&child)?;
    let missing: Vec<_> = CGROUP_FILES
        .iter()
        .filter(|name| !child.join(name).exists())
        .collect();
    ensure!(missing.is_empty(), "missing: {missing:?}");
    fs::write(child.join("memory.swap.max"), "0").context("set memory.swap.max")?;
    fs::write(child.join("cpu.max"), "50000 100000").context("set cpu.max")?;
    fs::remove_dir(&child)?;
    Ok(())
}

/// A kernel that warned during boot is tainted.
fn no_warning() -> Result<()> {
    setting("/proc/sys/kernel/tainted", "0")
}
