// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What must be installed: Coffer's own files, the programs it runs, and containerd.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use pod_spec::RuntimeConfig;
use rustix::fs::{CWD, Mode, OFlags};

use super::{Outcome, chain};

const SHIM: &str = "containerd-shim-coffer-v2";
const RUNTIME_TYPE: &str = "io.containerd.coffer.v2";

/// The first e2fsprogs whose mkfs.ext4 can be told that a disk is all zeros (`assume_storage_prezeroed`).
const LEAST_E2FSPROGS: [u32; 3] = [1, 46, 5];

/// The least free space in which an image can be built, in MiB.
const LEAST_FREE_MIB: u64 = 1024;

/// The config, or the defaults if it cannot be used, and what is to be said of it.
pub(super) fn config(path: &Path) -> (RuntimeConfig, Outcome) {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound
                && path == Path::new(RuntimeConfig::DEFAULT_PATH) =>
        {
            return (defaults(), Outcome::ok("none: defaults"));
        }
        Err(error) => {
            let problem = format!("{} cannot be read: {error}", path.display());
            return (
                defaults(),
                Outcome::failure(problem, "name an existing file with --config"),
            );
        }
    };
    match RuntimeConfig::parse(&text) {
        Ok(config) => (config, Outcome::ok(path.display().to_string())),
        Err(error) => {
            let problem = format!("{}: {}", path.display(), chain(&error));
            (
                defaults(),
                Outcome::failure(
                    problem,
                    "correct the file; the checks below use the defaults",
                ),
            )
        }
    }
}

fn defaults() -> RuntimeConfig {
    RuntimeConfig::default()
}

pub(super) fn kernel(path: &Path) -> Outcome {
    magic(
        path,
        b"\x7fELF",
        "an ELF kernel",
        "install Coffer's guest kernel, or set guest.kernel",
    )
}

pub(super) fn initramfs(path: &Path) -> Outcome {
    magic(
        path,
        b"070701",
        "an uncompressed cpio archive",
        "install Coffer's initramfs, or set guest.initramfs",
    )
}

fn magic(path: &Path, magic: &[u8], what: &str, remedy: &str) -> Outcome {
    let read = || -> std::io::Result<(Vec<u8>, u64)> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut head = Vec::new();
        file.take(u64::try_from(magic.len()).unwrap_or(0))
            .read_to_end(&mut head)?;
        Ok((head, len))
    };
    match read() {
        Err(error) => Outcome::failure(
            format!("{} cannot be read: {error}", path.display()),
            remedy,
        ),
        Ok((head, _)) if head != magic => {
            Outcome::failure(format!("{} is not {what}", path.display()), remedy)
        }
        Ok((_, len)) => Outcome::ok(format!("{} ({:.1} MiB)", path.display(), mib(len))),
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

pub(super) fn program(path: &Path, remedy: &str) -> Outcome {
    match fs::metadata(path) {
        Err(error) => Outcome::failure(
            format!("{} cannot be found: {error}", path.display()),
            remedy,
        ),
        Ok(metadata) if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 => {
            Outcome::failure(format!("{} cannot be executed", path.display()), remedy)
        }
        Ok(_) => Outcome::ok(path.display().to_string()),
    }
}

/// A mkfs.ext4 that knows the options by which scratch disks are made.
pub(super) fn mkfs_ext4(path: &Path) -> Outcome {
    let remedy = "install e2fsprogs, 1.46.5 or later, or set storage.mkfs_ext4";
    let found = program(path, remedy);
    if found.is_failure() {
        return found;
    }
    // It prints its version to the standard error.
    let text = match Command::new(path).arg("-V").output() {
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => {
            return Outcome::failure(format!("{} does not run: {error}", path.display()), remedy);
        }
    };
    match e2fsprogs_version(&text) {
        Some((version, numbers)) if numbers >= LEAST_E2FSPROGS => {
            Outcome::ok(format!("{} {version}", path.display()))
        }
        Some((version, _)) => {
            Outcome::failure(format!("{} is version {version}", path.display()), remedy)
        }
        None => Outcome::warning(format!("{} tells no version", path.display()), remedy),
    }
}

/// "1.47.0" in "mke2fs 1.47.0 (5-Feb-2023)", and its numbers.
fn e2fsprogs_version(text: &str) -> Option<(&str, [u32; 3])> {
    let version = text
        .split_whitespace()
        .skip_while(|word| *word != "mke2fs")
        .nth(1)?;
    let mut numbers = [0; 3];
    for (number, part) in numbers.iter_mut().zip(version.split('.')) {
        let digits = part
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(part.len());
        *number = part.get(..digits)?.parse().ok()?;
    }
    Some((version, numbers))
}

/// The cache must take unnamed files, on the nearest directory that there is already.
pub(super) fn cache(path: &Path) -> Outcome {
    let remedy = "set storage.cache_dir to a directory on ext4, xfs or btrfs with free space";
    let Some(directory) = path.ancestors().find(|directory| directory.is_dir()) else {
        return Outcome::failure(
            format!("{} has no parent directory", path.display()),
            remedy,
        );
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Err(error) = rustix::fs::openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
        let problem = format!(
            "{} cannot hold unnamed files (O_TMPFILE): {error}",
            directory.display()
        );
        return Outcome::failure(problem, remedy);
    }
    match rustix::fs::statvfs(directory) {
        Err(error) => Outcome::warning(
            format!("{}: free space is not known: {error}", directory.display()),
            remedy,
        ),
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
            if free < LEAST_FREE_MIB {
                let problem = format!(
                    "{} has {free} MiB free, images need {LEAST_FREE_MIB}",
                    directory.display()
                );
                return Outcome::warning(problem, remedy);
            }
            Outcome::ok(format!("{} ({free} MiB free)", path.display()))
        }
    }
}

/// containerd finds a shim by name on its PATH, which is taken to be ours.
pub(super) fn shim(path: Option<OsString>) -> Outcome {
    let directories = path.unwrap_or_default();
    let found = std::env::split_paths(&directories)
        .map(|directory| directory.join(SHIM))
        .find(|path| path.is_file());
    match found {
        Some(path) => Outcome::ok(path.display().to_string()),
        None => Outcome::failure(
            format!("{SHIM} is not on PATH"),
            "link it into /usr/local/bin, or set runtime_path in containerd's config",
        ),
    }
}

pub(super) fn containerd(directory: &Path) -> Outcome {
    let mut files = vec![directory.join("config.toml")];
    if let Ok(entries) = fs::read_dir(directory.join("conf.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let names_us = |file: &std::path::PathBuf| {
        fs::read_to_string(file).is_ok_and(|text| text.contains(RUNTIME_TYPE))
    };
    match files.iter().find(|file| names_us(file)) {
        Some(file) => Outcome::ok(format!("{} names {RUNTIME_TYPE}", file.display())),
        None => Outcome::warning(
            format!(
                "no config under {} names {RUNTIME_TYPE}: only ctr --runtime can use it",
                directory.display()
            ),
            "add a runtime with runtime_type = \"io.containerd.coffer.v2\" to containerd's CRI config",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_config_fails_with_every_mistake() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, "[guest]\nkernal = \"/x\"").unwrap();
        let (_, Outcome::Failure { problem, .. }) = config(&path) else {
            panic!("passed")
        };
        assert!(
            problem.contains("unknown key guest.kernal: did you mean guest.kernel?"),
            "{problem}"
        );
    }

    #[test]
    fn missing_config_fails_unless_it_is_the_default_one() {
        assert!(config(Path::new("/nowhere/config.toml")).1.is_failure());
    }

    #[test]
    fn corrupt_kernel_and_initramfs_are_told_from_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "\x7fELF and more").unwrap();
        assert!(matches!(kernel(&path), Outcome::Ok { .. }));
        assert!(initramfs(&path).is_failure());
        fs::write(&path, "").unwrap();
        assert!(kernel(&path).is_failure());
        fs::write(&path, "07070100").unwrap();
        assert!(matches!(initramfs(&path), Outcome::Ok { .. }));
    }

    #[test]
    fn file_that_cannot_be_executed_is_no_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        fs::write(&path, "").unwrap();
        assert!(program(&path, "install it").is_failure());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(!program(&path, "install it").is_failure());
        assert!(program(dir.path(), "install it").is_failure());
    }

    #[test]
    fn mkfs_ext4_that_is_too_old_is_told_from_one_that_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mkfs.ext4");
        let of_version = |version: &str| {
            fs::write(
                &path,
                format!("#!/bin/sh\necho 'mke2fs {version} (5-Feb-2023)' >&2\n"),
            )
            .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            mkfs_ext4(&path)
        };
        for good in ["1.46.5", "1.47.0", "1.47", "2.0", "1.48-rc1"] {
            assert!(matches!(of_version(good), Outcome::Ok { .. }), "{good}");
        }
        for old in ["1.46.4", "1.45.6"] {
            assert!(of_version(old).is_failure(), "{old}");
        }
        assert!(matches!(of_version("next"), Outcome::Warning { .. }));
    }

    #[test]
    fn cache_is_checked_where_its_directory_will_be() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!cache(&dir.path().join("a/b")).is_failure());
        assert!(cache(Path::new("/proc/coffer")).is_failure());
    }

    #[test]
    fn containerd_config_is_searched_in_drop_ins_too() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(containerd(dir.path()), Outcome::Warning { .. }));
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        fs::write(
            dir.path().join("conf.d/coffer.toml"),
            "runtime_type = \"io.containerd.coffer.v2\"",
        )
        .unwrap();
        assert!(matches!(containerd(dir.path()), Outcome::Ok { .. }));
    }
}
