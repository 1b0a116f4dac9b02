// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's cgroup while the container is there: frozen, with other limits, measured.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use agent_proto::{api, stats};
use ids::ContainerId;
use oci_spec::runtime::LinuxResources;

use super::Linux;
use super::cgroup::{self, Setting};
use super::cpuset::Vcpus;
use crate::Error;
use crate::error::Context as _;
use crate::system::Cgroups;

/// How long processes may take to freeze: one in uninterruptible sleep freezes when that ends. Below the host's deadline
/// for a call, so that the host hears why.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

impl Cgroups for Linux {
    fn freeze(&self, container: &ContainerId) -> Result<(), Error> {
        freeze(&cgroup::directory(container), FREEZE_LIMIT)
            .step(|| format!("freezing the processes of {container}"))
    }

    fn thaw(&self, container: &ContainerId) -> Result<(), Error> {
        thaw(&cgroup::directory(container))
            .step(|| format!("letting the processes of {container} go on"))
    }

    fn update(&self, container: &ContainerId, resources: &LinuxResources) -> Result<(), Error> {
        update(&cgroup::directory(container), resources)
    }

    fn stats(&self, container: &ContainerId) -> Result<api::ContainerStats, Error> {
        read_stats(&cgroup::directory(container))
    }
}

/// cgroup-v2.rst, "cgroup.freeze": "frozen" in `cgroup.events` follows once all processes have stopped.
fn freeze(directory: &Path, limit: Duration) -> io::Result<()> {
    cgroup::write(&directory.join("cgroup.freeze"), "1")?;
    let frozen = cgroup::wait_for(directory, "frozen 1", limit);
    if frozen.is_err()
        && let Err(error) = thaw(directory)
    {
        crate::log::warn(&format!("undoing a freeze: {error}"));
    }
    frozen
}

fn thaw(directory: &Path) -> io::Result<()> {
    cgroup::write(&directory.join("cgroup.freeze"), "0")
}

/// Writes all settings or none: everything is checked that can be before the first, and a failure sets back what went
/// before it.
fn update(directory: &Path, resources: &LinuxResources) -> Result<(), Error> {
    let vcpus = Vcpus::now();
    let settings = cgroup::settings(resources, &vcpus)?;
    check_usage(directory, resources)?;
    let before = settings
        .iter()
        .map(|setting| Ok((setting, previous(directory, setting, &vcpus)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    for (setting, value) in &before {
        check_huge_pages(setting, value.as_deref())?;
    }
    for (done, setting) in settings.iter().enumerate() {
        if let Err(error) = cgroup::apply(directory, setting) {
            for (setting, value) in before.iter().take(done).rev() {
                set_back(directory, setting, value.as_deref());
            }
            return Err(error);
        }
    }
    Ok(())
}

/// `memory.checkBeforeUpdate` asks that a limit below the usage be refused; without it, the kernel reclaims and kills.
fn check_usage(directory: &Path, resources: &LinuxResources) -> Result<(), Error> {
    let memory = resources.memory().as_ref();
    let checked = memory.filter(|memory| memory.check_before_update() == Some(true));
    let limit = checked
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit != 0);
    let usage = fs::read_to_string(directory.join("memory.current"))
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match (limit, usage) {
        (Some(limit), Some(usage)) if usage > limit => Err(Error::resource(
            "memory.limit",
            format!("{limit} is less than the {usage} bytes in use"),
        )),
        _ => Ok(()),
    }
}

/// Huge pages are reserved for a container when it is made: its limit can only fall.
fn check_huge_pages(setting: &Setting, previous: Option<&str>) -> Result<(), Error> {
    let bytes = |text: &str| match text.trim() {
        "max" => Some(u64::MAX),
        number => number.parse::<u64>().ok(),
    };
    match (bytes(&setting.value), previous.and_then(bytes)) {
        (Some(wanted), Some(limit)) if setting.file.starts_with("hugetlb.") && wanted > limit => {
            Err(Error::resource(
                setting.field.clone(),
                format!(
                    "{wanted} bytes are more than the {limit} that are reserved: make the container anew"
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// What to write to undo a setting; `None` for a file that keeps no value.
fn previous(directory: &Path, setting: &Setting, vcpus: &Vcpus) -> Result<Option<String>, Error> {
    let text = match fs::read_to_string(directory.join(&setting.file)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !setting.optional => {
            return Err(Error::resource(
                setting.field.clone(),
                format!("the guest has no {}", setting.file),
            ));
        }
        Err(_) => return Ok(None),
    };
    let line = match (setting.file.as_str(), setting.value.split_once(' ')) {
        ("io.max", Some((device, _))) => text
            .lines()
            .find(|line| line.split(' ').next() == Some(device))
            .map_or_else(
                || format!("{device} rbps=max wbps=max riops=max wiops=max"),
                str::to_owned,
            ),
        ("cpuset.cpus", _) if text.trim().is_empty() => vcpus.all.clone(),
        _ => text.lines().next().unwrap_or_default().to_owned(),
    };
    // An empty list is written as an empty line: no bytes at all would be no write.
    Ok(Some(line + "\n"))
}

fn set_back(directory: &Path, setting: &Setting, value: Option<&str>) {
    if let Some(value) = value
        && let Err(error) = cgroup::write(&directory.join(&setting.file), value)
    {
        crate::log::warn(&format!("setting {} back: {error}", setting.file));
    }
}

fn read_stats(directory: &Path) -> Result<api::ContainerStats, Error> {
    let entries = fs::read_dir(directory).step(|| format!("reading {}", directory.display()))?;
    let files: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    Ok(stats::parse(
        |file| fs::read_to_string(directory.join(file)).ok(),
        files.iter().map(String::as_str),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn resources(json: serde_json::Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    fn read(folder: &tempfile::TempDir, name: &str) -> String {
        fs::read_to_string(folder.path().join(name)).unwrap()
    }

    #[test]
    fn limits_are_written_and_devices_left_alone() {
        let folder = folder(&[("cpu.weight", "100\n"), ("memory.max", "max\n")]);
        let json = serde_json::json!({
            "devices": [{"allow": false, "access": "rwm"}],
            "cpu": {"shares": 2},
            "memory": {"limit": 4096}
        });
        update(folder.path(), &resources(json)).unwrap();
        // A real file keeps what a shorter write does not cover; the kernel's do not.
        assert_eq!(read(&folder, "cpu.weight").as_bytes().first(), Some(&b'1'));
        assert_eq!(read(&folder, "memory.max"), "4096");
    }

    #[test]
    fn file_that_is_not_there_is_refused_before_anything_is_written() {
        let folder = folder(&[("memory.max", "max\n")]);
        let json = serde_json::json!({"memory": {"limit": 4096}, "unified": {"no.such": "1"}});
        let error = update(folder.path(), &resources(json)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.resources.unified[no.such] cannot be applied in the guest: the guest has no no.such"
        );
        assert_eq!(read(&folder, "memory.max"), "max\n");
    }

    #[test]
    fn failed_write_sets_back_what_went_before_it() {
        let folder = folder(&[("cpu.weight", "100\n"), ("memory.max", "max\n")]);
        // A directory can be read by nobody and written by nobody.
        fs::create_dir(folder.path().join("pids.max")).unwrap();
        let json = serde_json::json!({
            "cpu": {"shares": 262_144}, "memory": {"limit": 12}, "pids": {"limit": 5}
        });
        let error = update(folder.path(), &resources(json)).unwrap_err();
        assert!(
            error.to_string().starts_with("linux.resources.pids.limit"),
            "{error}"
        );
        assert!(read(&folder, "memory.max").starts_with("max\n"));
        assert!(read(&folder, "cpu.weight").starts_with("100\n"));
    }

    #[test]
    fn limit_below_the_usage_is_refused_where_that_is_asked() {
        let folder = folder(&[("memory.max", "max\n"), ("memory.current", "5000\n")]);
        let json =
            |check| serde_json::json!({"memory": {"limit": 4096, "checkBeforeUpdate": check}});
        let error = update(folder.path(), &resources(json(true))).unwrap_err();
        assert!(error.to_string().contains("5000 bytes in use"), "{error}");
        update(folder.path(), &resources(json(false))).unwrap();
        assert_eq!(read(&folder, "memory.max"), "4096");
    }

    #[test]
    fn limit_for_huge_pages_cannot_grow() {
        let folder = folder(&[("hugetlb.2MB.max", "4194304\n"), ("memory.max", "max\n")]);
        let json = |pages: u64| {
            let limits = serde_json::json!([{"pageSize": "2MB", "limit": pages << 21}]);
            serde_json::json!({"memory": {"limit": 4096}, "hugepageLimits": limits})
        };
        let error = update(folder.path(), &resources(json(3))).unwrap_err();
        assert!(
            error.to_string().contains("make the container anew"),
            "{error}"
        );
        assert_eq!(read(&folder, "memory.max"), "max\n");
        update(folder.path(), &resources(json(2))).unwrap();
        update(folder.path(), &resources(json(1))).unwrap();
        assert!(read(&folder, "hugetlb.2MB.max").starts_with("2097152"));
    }

    #[test]
    fn throttled_device_has_a_line_of_its_own() {
        let folder = folder(&[("io.max", "8:0 rbps=max wbps=5 riops=max wiops=max\n")]);
        let of = |value: &str| {
            let setting = Setting {
                file: "io.max".to_owned(),
                value: value.to_owned(),
                field: "unified[io.max]".to_owned(),
                optional: false,
            };
            previous(folder.path(), &setting, &Vcpus::now())
                .unwrap()
                .unwrap()
        };
        assert_eq!(
            of("8:0 rbps=1"),
            "8:0 rbps=max wbps=5 riops=max wiops=max\n"
        );
        assert_eq!(
            of("8:1 rbps=1"),
            "8:1 rbps=max wbps=max riops=max wiops=max\n"
        );
    }

    #[test]
    fn stats_of_no_cgroup_are_an_error() {
        let folder = folder(&[("pids.current", "3\n"), ("hugetlb.2MB.current", "1\n")]);
        let stats = read_stats(folder.path()).unwrap();
        assert_eq!((stats.pids.current, stats.hugetlb.len()), (3, 1));
        read_stats(&folder.path().join("none")).unwrap_err();
    }

    /// A cgroup of the test's own in whatever hierarchy of version 2 is mounted; no controller is needed.
    struct RealCgroup(std::path::PathBuf);

    impl RealCgroup {
        fn new(name: &str) -> Self {
            let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let mount = mountinfo
                .lines()
                .find_map(|line| {
                    let (mount, _) = line.split_once(" - cgroup2 ")?;
                    mount.split(' ').nth(4)
                })
                .expect("cgroup2 is mounted");
            let directory = Path::new(mount).join(format!("coffer-{name}-{}", std::process::id()));
            fs::create_dir(&directory).unwrap();
            Self(directory)
        }

        fn sleeper(&self) -> std::process::Child {
            let child = std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap();
            cgroup::write(&self.0.join("cgroup.procs"), &child.id().to_string()).unwrap();
            child
        }

        fn is_frozen(&self) -> bool {
            let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap();
            events.lines().any(|line| line == "frozen 1")
        }
    }

    impl Drop for RealCgroup {
        fn drop(&mut self) {
            fs::remove_dir(&self.0).unwrap();
        }
    }

    #[test]
    fn process_freezes_and_goes_on() {
        let cgroup = RealCgroup::new("thaw");
        let mut child = cgroup.sleeper();
        freeze(&cgroup.0, FREEZE_LIMIT).unwrap();
        assert!(cgroup.is_frozen());
        thaw(&cgroup.0).unwrap();
        thaw(&cgroup.0).unwrap();
        cgroup::wait_for(&cgroup.0, "frozen 0", FREEZE_LIMIT).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn frozen_process_is_killed_without_being_thawed() {
        let cgroup = RealCgroup::new("kill");
        let mut child = cgroup.sleeper();
        freeze(&cgroup.0, FREEZE_LIMIT).unwrap();
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        cgroup::wait_for(&cgroup.0, "populated 0", FREEZE_LIMIT).unwrap();
    }

    #[test]
    fn freeze_that_takes_too_long_is_undone() {
        let cgroup = RealCgroup::new("late");
        let mut child = cgroup.sleeper();
        // No time at all: either it is frozen by the first look, or the freeze is undone.
        match freeze(&cgroup.0, Duration::ZERO) {
            Ok(()) => assert!(cgroup.is_frozen()),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                cgroup::wait_for(&cgroup.0, "frozen 0", FREEZE_LIMIT).unwrap();
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        cgroup::wait_for(&cgroup.0, "populated 0", FREEZE_LIMIT).unwrap();
    }
}
