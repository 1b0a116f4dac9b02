// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the host's kernel and machine must offer.

use std::fs;
use std::path::Path;

use pod_spec::Guest;

use super::{Outcome, chain};

/// The oldest kernel that has everything: unnamed files on overlayfs hosts, pidfds, `openat2`, close_range.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

pub(super) fn kvm(device: &Path) -> Outcome {
    match kvm_probe::probe(device) {
        Ok(report) => Outcome::ok(format!(
            "runs guests (probed in {} ms, at most {} vCPUs)",
            report.elapsed.as_millis(),
            report.max_vcpus
        )),
        // A probe error says what to do after its first colon.
        Err(error) => match chain(&error).split_once(": ") {
            Some((problem, remedy)) => Outcome::failure(problem, remedy),
            None => Outcome::failure(error.to_string(), "see the kernel log"),
        },
    }
}

pub(super) fn user() -> Outcome {
    if nix::unistd::geteuid().is_root() {
        Outcome::ok("root")
    } else {
        Outcome::failure("not root", "run as root, as containerd does")
    }
}

pub(super) fn kernel_version() -> Outcome {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    match parse_version(&release) {
        Some(version) if version >= OLDEST_KERNEL => Outcome::ok(release),
        _ => Outcome::failure(
            format!("Linux {release}"),
            format!("use Linux {}.{} or later", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        ),
    }
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn cgroups(own: &Path) -> Outcome {
    let Ok(text) = fs::read_to_string(own) else {
        return Outcome::failure(
            "the kernel has no cgroups",
            "boot a kernel with CONFIG_CGROUPS",
        );
    };
    let v1: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split(':').nth(1))
        .collect();
    let has_v1 = |name: &str| {
        v1.iter()
            .any(|controllers| controllers.split(',').any(|one| one == name))
    };
    if has_v1("memory") && has_v1("cpu") {
        return Outcome::ok("version 1");
    }
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers)
            if ["cpu", "memory", "pids"]
                .iter()
                .all(|one| controllers.contains(one)) =>
        {
            Outcome::ok("version 2")
        }
        _ => Outcome::failure(
            "no memory and cpu controllers at /sys/fs/cgroup",
            "mount cgroup2 at /sys/fs/cgroup and enable cpu, memory and pids",
        ),
    }
}

pub(super) fn file_system(name: &'static str) -> Outcome {
    let known = |text: String| {
        text.lines()
            .any(|line| line.split_whitespace().last() == Some(name))
    };
    if fs::read_to_string("/proc/filesystems").is_ok_and(known) {
        Outcome::ok("there")
    } else {
        Outcome::failure(
            format!("the kernel has no {name}"),
            format!("load the module (modprobe {name})"),
        )
    }
}

pub(super) fn tun(device: &Path) -> Outcome {
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Outcome::ok("there"),
        Err(error) => Outcome::warning(
            format!(
                "{} cannot be opened ({error}): pods with a network do not start",
                device.display()
            ),
            "load the module (modprobe tun)",
        ),
    }
}

pub(super) fn memory(meminfo: &Path, guest: &Guest) -> Outcome {
    let text = fs::read_to_string(meminfo).unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .map(|kib| kib / 1024);
    match available {
        None => Outcome::warning("the free memory is not known", "check /proc/meminfo"),
        Some(mib) if mib < u64::from(guest.default_memory.0) => Outcome::warning(
            format!(
                "{mib} MiB are free, a pod without limits may take {}",
                guest.default_memory
            ),
            "free memory, or lower guest.default_memory_mib",
        ),
        Some(mib) => Outcome::ok(format!("{mib} MiB are free")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        pod_spec::RuntimeConfig::parse("").unwrap().guest
    }

    #[test]
    fn missing_kvm_fails_with_the_module_to_load() {
        let Outcome::Failure { problem, remedy } = kvm(Path::new("/nowhere/kvm")) else {
            panic!("passed")
        };
        assert_eq!(problem, "/nowhere/kvm does not exist");
        assert!(remedy.starts_with("load the module"), "{remedy}");
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse_version("6.12.107+deb12-amd64"), Some((6, 12)));
        assert!(parse_version("5.4.0").unwrap() < OLDEST_KERNEL);
        assert!(parse_version("5.10").unwrap() >= OLDEST_KERNEL);
        assert_eq!(parse_version("next"), None);
    }

    #[test]
    fn little_memory_is_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let meminfo = dir.path().join("meminfo");
        fs::write(&meminfo, "MemTotal: 1 kB\nMemAvailable:     102400 kB\n").unwrap();
        assert!(matches!(
            memory(&meminfo, &guest()),
            Outcome::Warning { .. }
        ));
        fs::write(&meminfo, "MemAvailable: 2048000 kB\n").unwrap();
        assert_eq!(memory(&meminfo, &guest()), Outcome::ok("2000 MiB are free"));
    }

    #[test]
    fn missing_tun_is_a_warning() {
        assert!(matches!(
            tun(Path::new("/nowhere/tun")),
            Outcome::Warning { .. }
        ));
    }
}
