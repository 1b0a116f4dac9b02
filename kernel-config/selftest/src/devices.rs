// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Devices that the command line promises (`selftest.have=blk,net,...`), and file systems on them.
//!
//! Disk `vda` holds an EROFS image with a file `hello`, disk `vdb` an empty ext4.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};

use crate::Report;

pub(crate) fn run(report: &mut Report) {
    let line = command_line();
    let promised = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("selftest.have="))
        .unwrap_or_default();
    for device in promised.split(',').filter(|device| !device.is_empty()) {
        report.check(&format!("device {device}"), check(device));
    }
}

/// The kernel's command line; empty if it cannot be read.
pub(crate) fn command_line() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

fn check(device: &str) -> Result<()> {
    match device {
        "blk" => file_systems(),
        "net" => there("/sys/class/net/eth0"),
        "console" => there("/dev/hvc0"),
        "rng" => random(),
        "balloon" => bound("virtio_balloon"),
        "mem" => bound("virtio_mem"),
        "pmem" => there("/dev/pmem0"),
        "vsock" => bound("vmw_vsock_virtio_transport"),
        "smp" => several_processors(),
        "acpi" => there("/sys/firmware/acpi/tables/DSDT"),
        "noacpi" => ensure_absent("/sys/firmware/acpi"),
        _ => bail!("nobody knows how to check it"),
    }
}

fn there(path: &str) -> Result<()> {
    ensure!(Path::new(path).exists(), "{path} is not there");
    Ok(())
}

fn ensure_absent(path: &str) -> Result<()> {
    ensure!(!Path::new(path).exists(), "{path} is there");
    Ok(())
}

/// A driver of the virtio bus has a device.
fn bound(driver: &str) -> Result<()> {
    let folder = format!("/sys/bus/virtio/drivers/{driver}");
    let entries = fs::read_dir(&folder).with_context(|| folder.clone())?;
    let devices = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"));
    ensure!(devices.count() > 0, "no device in {folder}");
    Ok(())
}

fn random() -> Result<()> {
    let current = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    ensure!(current.starts_with("virtio_rng"), "the source is {current}");
    Ok(())
}

fn several_processors() -> Result<()> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
    ensure!(online.trim() == "0-1", "online: {}", online.trim());
    Ok(())
}

/// What a container's root is: an overlay of an EROFS image and a directory of an ext4.
fn file_systems() -> Result<()> {
    for directory in ["/run/lower", "/run/scratch", "/run/root"] {
        fs::create_dir_all(directory)?;
    }
    let no_data = None::<&str>;
    mount(
        Some("/dev/vda"),
        "/run/lower",
        Some("erofs"),
        MsFlags::MS_RDONLY,
        no_data,
    )
    .context("mount erofs")?;
    mount(
        Some("/dev/vdb"),
        "/run/scratch",
        Some("ext4"),
        MsFlags::empty(),
        no_data,
    )
    .context("mount ext4")?;
    fs::create_dir("/run/scratch/upper")?;
    fs::create_dir("/run/scratch/work")?;
    let layers = "lowerdir=/run/lower,upperdir=/run/scratch/upper,workdir=/run/scratch/work";
    mount(
        Some("overlay"),
        "/run/root",
        Some("overlay"),
        MsFlags::empty(),
        Some(layers),
    )
    .context("mount overlay")?;
    let hello = fs::read("/run/root/hello").context("read through the overlay")?;
    ensure!(
        hello.starts_with(b"hello"),
        "the image's file has other content"
    );
    fs::write("/run/root/hello", "changed").context("write through the overlay")?;
    ensure!(
        fs::read("/run/scratch/upper/hello")? == b"changed",
        "the change is not in the upper directory"
    );
    ensure!(
        fs::read("/run/lower/hello")? == hello,
        "the change went through to the image"
    );
    Ok(())
}
