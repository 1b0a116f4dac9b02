// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's cgroup: the spec's resources as values for cgroup v2's files, and the cgroup's life.
//!
//! The specification speaks cgroup v1; the conversions are runc's. What cgroup v2 cannot do is refused.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ids::ContainerId;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::cpuset::{self, Vcpus};
use crate::Error;
use crate::error::Context as _;

/// Where cgroup v2 is mounted.
pub(super) const MOUNT: &str = "/sys/fs/cgroup";

/// The parent of all containers' cgroups.
pub(super) const PARENT: &str = "/sys/fs/cgroup/coffer";

/// How long processes that have been killed may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// `cpu.max` without a period in the spec, in µs (the kernel's default).
const DEFAULT_PERIOD_US: u64 = 100_000;

/// The file of a cgroup's weight among those that use the same disk.
const IO_WEIGHT: &str = "io.weight";

/// A value to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: String,
    pub(super) value: String,
    /// The field of the spec, for errors.
    pub(super) field: String,
    /// A file that is not there means that the limit holds anyway.
    pub(super) optional: bool,
}

/// The directory of a container's cgroup.
pub(super) fn directory(container: &ContainerId) -> PathBuf {
    Path::new(PARENT).join(container.as_str())
}

/// Makes the container's cgroup and applies `resources`, except devices.
///
/// # Errors
/// [`Error::Resource`] for what cannot be applied.
pub(super) fn make(
    container: &ContainerId,
    resources: Option<&LinuxResources>,
) -> Result<(), Error> {
    let vcpus = Vcpus::now();
    let settings = resources.map(|resources| settings(resources, &vcpus));
    let settings = settings.transpose()?.unwrap_or_default();
    let directory = directory(container);
    fs::create_dir(&directory).step(|| format!("making the cgroup {}", directory.display()))?;
    settings
        .iter()
        .try_for_each(|setting| apply(&directory, setting))
}

pub(super) fn apply(directory: &Path, setting: &Setting) -> Result<(), Error> {
    let path = directory.join(&setting.file);
    let ready = if setting.file == IO_WEIGHT {
        let switch = Path::new(MOUNT).join("io.cost.qos");
        weigh_disks(Path::new("/sys/block"), &switch)
    } else {
        Ok(())
    };
    match ready.and_then(|()| write(&path, &setting.value)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && setting.optional => Ok(()),
        Err(error) => Err(Error::resource(
            setting.field.clone(),
            format!("writing {:?} to {}: {error}", setting.value, setting.file),
        )),
        Ok(()) => Ok(()),
    }
}

/// One write to a file that exists: `fs::write` would ask the kernel to make it.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    io::Write::write_all(&mut file, value.as_bytes())
}

/// Has the guest's disks heed weights, which they do not by themselves (cgroup-v2.rst, "io.cost.qos"): only a guest with a
/// weight pays for them. A container's disks are there before its cgroup.
fn weigh_disks(disks: &Path, switch: &Path) -> io::Result<()> {
    for disk in fs::read_dir(disks)? {
        let disk = disk?.path();
        // Other devices do not queue requests.
        if disk.join("mq").exists() {
            let number = fs::read_to_string(disk.join("dev"))?;
            write(switch, &format!("{} enable=1", number.trim()))?;
        }
    }
    Ok(())
}

/// The pids in the container's cgroup and those below it.
///
/// # Errors
/// [`Error::Step`].
pub(super) fn processes(container: &ContainerId) -> Result<Vec<u32>, Error> {
    let mut pids = Vec::new();
    for directory in below(&directory(container)) {
        let path = directory.join("cgroup.procs");
        match fs::read_to_string(&path) {
            // Pid 0 is a process that this pid namespace cannot see.
            Ok(text) => pids.extend(
                text.lines()
                    .filter_map(|line| line.parse::<u32>().ok())
                    .filter(|pid| *pid != 0),
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A threaded cgroup of the container's own making.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error).step(|| format!("reading {}", path.display())),
        }
    }
    Ok(pids)
}

/// Kills everything in the container's cgroup.
///
/// # Errors
/// [`Error::Step`]; a cgroup that is not there is none.
pub(super) fn kill(container: &ContainerId) -> Result<(), Error> {
    let path = directory(container).join("cgroup.kill");
    match write(&path, "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.step(|| format!("ending all processes of {container}")),
    }
}

/// Kills what is left and removes the cgroup with those below it.
///
/// # Errors
/// [`Error::Step`]; a cgroup that is not there is none.
pub(super) fn remove(container: &ContainerId) -> Result<(), Error> {
    let directory = directory(container);
    if !directory.exists() {
        return Ok(());
    }
    kill(container)?;
    wait_for(&directory, "populated 0", END_LIMIT)
        .step(|| format!("waiting for the processes of {container} to end"))?;
    for one in below(&directory) {
        match fs::remove_dir(&one) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.step(|| format!("removing the cgroup {}", one.display()))?,
        }
    }
    Ok(())
}

/// Waits for a line of `cgroup.events`, which wakes poll(2) when it changes (cgroup-v2.rst, "populated" and "frozen").
///
/// # Errors
/// [`io::ErrorKind::TimedOut`], or those of reading the file.
pub(super) fn wait_for(directory: &Path, wanted: &str, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now().checked_add(limit);
    let mut file = fs::File::open(directory.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        io::Seek::rewind(&mut file)?;
        io::Read::read_to_string(&mut file, &mut text)?;
        if text.lines().any(|line| line == wanted) {
            return Ok(());
        }
        let left = deadline.and_then(|deadline| deadline.checked_duration_since(Instant::now()));
        let left = left
            .and_then(|left| Timespec::try_from(left).ok())
            .ok_or(io::ErrorKind::TimedOut)?;
        poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&left))?;
    }
}

/// The directory and those below it, deepest first.
fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(one) = open.pop() {
        let children = fs::read_dir(&one).into_iter().flatten().flatten();
        open.extend(
            children
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        found.push(one);
    }
    found.reverse();
    found
}

/// How often the OOM killer has struck in the container; 0 if that is not known.
pub(super) fn oom_kills(container: &ContainerId) -> u64 {
    fs::read_to_string(directory(container).join("memory.events"))
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
        })
        .unwrap_or(0)
}

/// Turns on all controllers for the children of `directory`.
///
/// # Errors
/// [`Error::Step`].
pub(super) fn enable_controllers(directory: &Path) -> Result<(), Error> {
    let step = || {
        format!(
            "turning on the cgroup controllers in {}",
            directory.display()
        )
    };
    let all = fs::read_to_string(directory.join("cgroup.controllers")).step(step)?;
    let wanted: Vec<String> = all
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    write(&directory.join("cgroup.subtree_control"), &wanted.join(" ")).step(step)
}

fn setting(file: &str, value: impl ToString, field: &str) -> Setting {
    Setting {
        file: file.to_owned(),
        value: value.to_string(),
        field: field.to_owned(),
        optional: false,
    }
}

fn refuse(condition: bool, field: &str, problem: &str) -> Result<(), Error> {
    if condition {
        Err(Error::resource(field, problem))
    } else {
        Ok(())
    }
}

/// A limit where -1 is none.
fn limit(value: i64, field: &str) -> Result<String, Error> {
    match value {
        -1 => Ok("max".to_owned()),
        0.. => Ok(value.to_string()),
        _ => Err(Error::resource(field, format!("{value} is no limit"))),
    }
}

/// The files of cgroup v2 and their values, in the order of writing, for a guest with these vCPUs.
///
/// # Errors
/// [`Error::Resource`] for what cgroup v2 cannot do.
pub(super) fn settings(resources: &LinuxResources, vcpus: &Vcpus) -> Result<Vec<Setting>, Error> {
    let mut all = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, vcpus, &mut all)?;
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut all)?;
    }
    if let Some(pids) = resources.pids() {
        let value = if pids.limit() > 0 {
            pids.limit().to_string()
        } else {
            "max".to_owned()
        };
        all.push(setting("pids.max", value, "pids.limit"));
    }
    if let Some(block_io) = resources.block_io() {
        block_io_settings(block_io, &mut all)?;
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page.page_size();
        let valid = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
        refuse(
            !valid,
            "hugepageLimits",
            &format!("{size:?} is no page size"),
        )?;
        all.push(Setting {
            // Where the guest has no pages of this size, none can be used.
            optional: page.limit() == 0,
            ..setting(
                &format!("hugetlb.{size}.max"),
                limit(page.limit(), "hugepageLimits")?,
                "hugepageLimits",
            )
        });
    }
    if let Some(network) = resources.network() {
        let priorities = network
            .priorities()
            .as_ref()
            .is_some_and(|list| !list.is_empty());
        refuse(
            network.class_id().is_some_and(|class| class != 0) || priorities,
            "network",
            "cgroup v2 has no network controller",
        )?;
    }
    refuse(
        resources.rdma().as_ref().is_some_and(|map| !map.is_empty()),
        "rdma",
        "there is no RDMA device in a microVM",
    )?;
    for (file, value) in resources.unified().iter().flatten() {
        let valid = file.contains('.')
            && file
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
            && !file.starts_with("cgroup.")
            && !file.starts_with('.');
        refuse(
            !valid,
            "unified",
            &format!("{file:?} is no controller's file"),
        )?;
        all.push(setting(file, value, &format!("unified[{file}]")));
    }
    Ok(all)
}

fn cpu_settings(cpu: &LinuxCpu, vcpus: &Vcpus, all: &mut Vec<Setting>) -> Result<(), Error> {
    refuse(
        cpu.realtime_runtime().is_some_and(|value| value != 0)
            || cpu.realtime_period().is_some_and(|value| value != 0),
        "cpu.realtimeRuntime",
        "cgroup v2 has no realtime limits",
    )?;
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        // 2..=262144 to 1..=10000 (runc, ConvertCPUSharesToCgroupV2Value).
        let above = shares.clamp(2, 262_144).saturating_sub(2);
        let weight = above
            .saturating_mul(9999)
            .checked_div(262_142)
            .unwrap_or(0)
            .saturating_add(1);
        all.push(setting("cpu.weight", weight, "cpu.shares"));
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = cpu
            .quota()
            .filter(|quota| *quota > 0)
            .map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        let period = cpu
            .period()
            .filter(|period| *period != 0)
            .unwrap_or(DEFAULT_PERIOD_US);
        all.push(setting("cpu.max", format!("{quota} {period}"), "cpu.quota"));
    }
    if let Some(burst) = cpu.burst() {
        all.push(setting("cpu.max.burst", burst, "cpu.burst"));
    }
    if let Some(idle) = cpu.idle() {
        all.push(setting("cpu.idle", idle, "cpu.idle"));
    }
    if let Some(list) = cpu.cpus().as_ref().filter(|list| !list.is_empty()) {
        let value = cpuset::for_guest(list, vcpus)
            .map_err(|problem| Error::resource("cpu.cpus", problem))?;
        all.push(setting("cpuset.cpus", value, "cpu.cpus"));
    }
    // `cpu.mems` names memory nodes of the host; the guest has one, on which everything is.
    Ok(())
}

fn memory_settings(memory: &LinuxMemory, all: &mut Vec<Setting>) -> Result<(), Error> {
    refuse(
        memory.swappiness().is_some(),
        "memory.swappiness",
        "cgroup v2 has no swappiness of a cgroup's own",
    )?;
    refuse(
        memory.disable_oom_killer() == Some(true),
        "memory.disableOOMKiller",
        "cgroup v2 always has an OOM killer",
    )?;
    let kernel = [memory.kernel(), memory.kernel_tcp()];
    refuse(
        kernel.into_iter().flatten().any(|value| value > 0),
        "memory.kernel",
        "cgroup v2 counts kernel memory in memory.limit",
    )?;
    let size = memory.limit().filter(|limit| *limit != 0);
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        all.push(setting(
            "memory.low",
            limit(reservation, "memory.reservation")?,
            "memory.reservation",
        ));
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // The specification counts memory and swap together, cgroup v2 swap alone.
        let value = match (swap, size) {
            (-1, _) => "max".to_owned(),
            (_, Some(size)) if size >= 0 && swap >= size => swap.saturating_sub(size).to_string(),
            (_, None | Some(-1)) => {
                return Err(Error::resource(
                    "memory.swap",
                    "is set without memory.limit",
                ));
            }
            (_, Some(size)) => {
                return Err(Error::resource(
                    "memory.swap",
                    format!("{swap} is less than memory.limit {size}"),
                ));
            }
        };
        // A kernel without swap has no such file, and swaps nothing.
        all.push(Setting {
            optional: true,
            ..setting("memory.swap.max", value, "memory.swap")
        });
    }
    if let Some(size) = size {
        all.push(setting(
            "memory.max",
            limit(size, "memory.limit")?,
            "memory.limit",
        ));
    }
    Ok(())
}

fn block_io_settings(block_io: &LinuxBlockIo, all: &mut Vec<Setting>) -> Result<(), Error> {
    refuse(
        block_io.leaf_weight().is_some_and(|weight| weight != 0),
        "blockIO.leafWeight",
        "cgroup v2 has no leaf weights",
    )?;
    refuse(
        block_io
            .weight_device()
            .as_ref()
            .is_some_and(|list| !list.is_empty()),
        "blockIO.weightDevice",
        "the node's disks are not the guest's",
    )?;
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        // 10..=1000 to 1..=10000 (runc, ConvertBlkIOToIOWeightValue).
        let above = u64::from(weight.clamp(10, 1000)).saturating_sub(10);
        let weight = above
            .saturating_mul(9999)
            .checked_div(990)
            .unwrap_or(0)
            .saturating_add(1);
        all.push(setting(IO_WEIGHT, weight, "blockIO.weight"));
    }
    for (list, key, field) in [
        (
            block_io.throttle_read_bps_device(),
            "rbps",
            "blockIO.throttleReadBpsDevice",
        ),
        (
            block_io.throttle_write_bps_device(),
            "wbps",
            "blockIO.throttleWriteBpsDevice",
        ),
        (
            block_io.throttle_read_iops_device(),
            "riops",
            "blockIO.throttleReadIOPSDevice",
        ),
        (
            block_io.throttle_write_iops_device(),
            "wiops",
            "blockIO.throttleWriteIOPSDevice",
        ),
    ] {
        for device in list.iter().flatten() {
            all.push(setting("io.max", throttle(device, key), field));
        }
    }
    Ok(())
}

fn throttle(device: &LinuxThrottleDevice, key: &str) -> String {
    let rate = if device.rate() == 0 {
        "max".to_owned()
    } else {
        device.rate().to_string()
    };
    format!("{}:{} {key}={rate}", device.major(), device.minor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: serde_json::Value) -> Result<Vec<(String, String)>, String> {
        let vcpus = Vcpus {
            online: 2,
            all: "0-3".to_owned(),
        };
        settings(&serde_json::from_value(json).unwrap(), &vcpus)
            .map(|all| all.into_iter().map(|one| (one.file, one.value)).collect())
            .map_err(|error| error.to_string())
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn kubernetes_usual_limits_are_converted() {
        let all = of(serde_json::json!({
            "cpu": {"shares": 512, "quota": 50000, "period": 100000},
            "memory": {"limit": 134217728, "swap": 134217728},
            "pids": {"limit": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
        }))
        .unwrap();
        assert_eq!(
            all,
            [
                pair("cpu.weight", "20"),
                pair("cpu.max", "50000 100000"),
                pair("memory.swap.max", "0"),
                pair("memory.max", "134217728"),
                pair("pids.max", "100"),
                pair("hugetlb.2MB.max", "0"),
            ]
        );
    }

    #[test]
    fn ends_of_the_shares_map_to_the_ends_of_the_weights() {
        for (shares, weight) in [
            (1, "1"),
            (2, "1"),
            (1024, "39"),
            (262_144, "10000"),
            (u64::MAX, "10000"),
        ] {
            let all = of(serde_json::json!({"cpu": {"shares": shares}})).unwrap();
            assert_eq!(all, [pair("cpu.weight", weight)]);
        }
    }

    #[test]
    fn ends_of_the_weights_map_to_the_ends_of_cgroup_v2s() {
        for (weight, io) in [
            (1, "1"),
            (10, "1"),
            (500, "4950"),
            (1000, "10000"),
            (u16::MAX, "10000"),
        ] {
            let all = of(serde_json::json!({"blockIO": {"weight": weight}})).unwrap();
            assert_eq!(all, [pair("io.weight", io)]);
        }
    }

    #[test]
    fn disks_that_queue_requests_are_weighed() {
        let folder = tempfile::tempdir().unwrap();
        let (disks, switch) = (folder.path().join("block"), folder.path().join("switch"));
        for (name, number) in [("vda", "254:16\n"), ("ram0", "1:0\n")] {
            fs::create_dir_all(disks.join(name)).unwrap();
            fs::write(disks.join(name).join("dev"), number).unwrap();
        }
        fs::create_dir(disks.join("vda/mq")).unwrap();
        fs::write(&switch, "").unwrap();
        weigh_disks(&disks, &switch).unwrap();
        assert_eq!(fs::read_to_string(switch).unwrap(), "254:16 enable=1");
    }

    #[test]
    fn processors_of_the_node_become_vcpus_and_its_memory_nodes_are_left_out() {
        let all = of(serde_json::json!({"cpu": {"cpus": "5", "mems": "1"}})).unwrap();
        assert_eq!(all, [pair("cpuset.cpus", "1")]);
        let all = of(serde_json::json!({"cpu": {"cpus": "", "mems": ""}})).unwrap();
        assert_eq!(all, []);
    }

    #[test]
    fn no_limit_is_max() {
        let all = of(serde_json::json!({
            "cpu": {"quota": -1}, "memory": {"limit": -1, "swap": -1}, "pids": {"limit": -1}
        }))
        .unwrap();
        assert_eq!(
            all,
            [
                pair("cpu.max", "max 100000"),
                pair("memory.swap.max", "max"),
                pair("memory.max", "max"),
                pair("pids.max", "max"),
            ]
        );
    }

    #[test]
    fn what_cgroup_v2_cannot_do_is_refused_by_name() {
        for (json, field) in [
            (
                serde_json::json!({"cpu": {"realtimeRuntime": 1}}),
                "cpu.realtimeRuntime",
            ),
            (serde_json::json!({"cpu": {"cpus": "x"}}), "cpu.cpus"),
            (
                serde_json::json!({"memory": {"swappiness": 10}}),
                "memory.swappiness",
            ),
            (
                serde_json::json!({"memory": {"disableOOMKiller": true}}),
                "memory.disableOOMKiller",
            ),
            (
                serde_json::json!({"memory": {"kernel": 1}}),
                "memory.kernel",
            ),
            (serde_json::json!({"memory": {"swap": 5}}), "memory.swap"),
            (
                serde_json::json!({"memory": {"limit": 9, "swap": 5}}),
                "memory.swap",
            ),
            (serde_json::json!({"memory": {"limit": -2}}), "memory.limit"),
            (
                serde_json::json!({"blockIO": {"leafWeight": 10}}),
                "blockIO.leafWeight",
            ),
            (serde_json::json!({"network": {"classID": 1}}), "network"),
            (
                serde_json::json!({"rdma": {"mlx5": {"hcaHandles": 1}}}),
                "rdma",
            ),
            (serde_json::json!({"unified": {"../x": "1"}}), "unified"),
            (
                serde_json::json!({"unified": {"cgroup.procs": "1"}}),
                "unified",
            ),
            (
                serde_json::json!({"hugepageLimits": [{"pageSize": "../", "limit": 0}]}),
                "hugepageLimits",
            ),
        ] {
            let error = of(json.clone()).unwrap_err();
            assert!(
                error.starts_with(&format!("linux.resources.{field}")),
                "{json}: {error}"
            );
        }
    }

    #[test]
    fn missing_file_is_an_error_unless_the_limit_holds_anyway() {
        let folder = tempfile::tempdir().unwrap();
        let mut one = setting("memory.swap.max", "0", "memory.swap");
        assert!(
            apply(folder.path(), &one)
                .unwrap_err()
                .to_string()
                .contains("memory.swap")
        );
        one.optional = true;
        apply(folder.path(), &one).unwrap();
        fs::write(folder.path().join("memory.swap.max"), "").unwrap();
        apply(folder.path(), &one).unwrap();
        assert_eq!(
            fs::read_to_string(folder.path().join("memory.swap.max")).unwrap(),
            "0"
        );
    }
}
