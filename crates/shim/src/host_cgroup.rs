// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The cgroup on the host that holds a pod's shim and VMM: the one that the spec of the pod's first container names.
//!
//! kubelet sets the pod's limits on its parent, so everything that the pod costs the host counts against the pod. `start`
//! joins before it makes the shim, which inherits the place, as the VMM does. Where systemd manages cgroups
//! (`slice:prefix:name`), the scope is made as a plain directory in the slice, with the processes in a cgroup below it; systemd
//! itself is not asked (`docs/decisions/0013-systemd-slices.md`).
//!
//! A cgroup that was made here carries an extended attribute, and only such ones are ever removed: neither kubelet's pod
//! cgroup nor one that was there before. Teardown may be repeated.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use ids::Bytes;
use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::error::ShimError;
use crate::state_dir::StateDir;

/// The cgroup in a scope of systemd's naming that has the processes. A child that hands its controllers on is what keeps
/// systemd from taking them away from the slice's children, of which it knows none (cgroup v2, "Top-down Constraint":
/// a controller cannot be disabled while a child has it enabled).
const IN_SCOPE: &str = "coffer";

/// Marks a cgroup that Coffer has made. `trusted.` attributes work in both cgroup versions and are root's alone.
const MARK: &str = "trusted.coffer";

/// How long teardown waits for killed processes to leave their cgroups.
const EMPTY_LIMIT: Duration = Duration::from_millis(500);

/// How often it looks.
const EMPTY_POLL: Duration = Duration::from_millis(5);

/// cgroup v1 has no word for "no limit" but a number as large as it can count, less than a page.
const NO_LIMIT_V1: u64 = 0x7fff_ffff_ffff_0000;

/// How often a cgroup is made anew when a parent that Coffer has made is removed meanwhile, with the last other pod in it.
const MAKE_TRIES: u32 = 100;

/// Why a pod could not be put into its cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// A path that is none.
    #[error("linux.cgroupsPath {0:?} is neither a path without \"..\" nor \"slice:prefix:name\"")]
    Path(String),
    /// No cgroup file system.
    #[error("no cgroup file system is mounted: mount cgroup2 at /sys/fs/cgroup")]
    NoHierarchy,
    /// A system call failed.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_path_buf();
    move |source| CgroupError::Io {
        operation,
        path,
        source,
    }
}

/// Where a `linux.cgroupsPath` is below each hierarchy's root.
fn relative_path(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let invalid = || CgroupError::Path(cgroups_path.to_owned());
    let path = match cgroups_path.split(':').collect::<Vec<_>>().as_slice() {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => systemd_path(slice, prefix, name).ok_or_else(invalid)?,
        _ => return Err(invalid()),
    };
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if plain && path.components().next().is_some() {
        Ok(path)
    } else {
        Err(invalid())
    }
}

/// `a-b.slice:cri-containerd:id` is `a.slice/a-b.slice/cri-containerd-id.scope` (systemd.slice(5)), and [`IN_SCOPE`] in it.
fn systemd_path(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    if [slice, prefix, name].iter().any(|part| part.contains('/')) {
        return None;
    }
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if stem != "-" {
        for (at, _) in stem.match_indices('-') {
            path.push(format!(
                "{}.slice",
                stem.get(..at).filter(|parent| !parent.is_empty())?
            ));
        }
        path.push(slice);
    }
    path.push(if prefix.is_empty() {
        format!("{name}.scope")
    } else {
        format!("{prefix}-{name}.scope")
    });
    path.push(IN_SCOPE);
    Some(path)
}

/// A mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    mount: PathBuf,
    cpuset_v1: bool,
}

/// The hierarchies with controllers, from `/proc/self/mountinfo` (proc(5)). On a hybrid node the unified one has none.
pub(crate) fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut v1: Vec<(String, Hierarchy)> = Vec::new();
    let mut v2 = None;
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount) = before.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        let mut after = after.split(' ');
        let (fs_type, options) = (after.next().unwrap_or(""), after.nth(1).unwrap_or(""));
        match fs_type {
            "cgroup2" if v2.is_none() => {
                v2 = Some(Hierarchy {
                    mount,
                    cpuset_v1: false,
                })
            }
            "cgroup" => {
                let controllers = options
                    .split_once(',')
                    .map_or("", |(_, controllers)| controllers);
                let named = controllers
                    .split(',')
                    .any(|option| option.starts_with("name="));
                if !controllers.is_empty()
                    && !named
                    && !v1.iter().any(|(known, _)| known == controllers)
                {
                    let cpuset_v1 = controllers
                        .split(',')
                        .any(|controller| controller == "cpuset");
                    v1.push((controllers.to_owned(), Hierarchy { mount, cpuset_v1 }));
                }
            }
            _ => {}
        }
    }
    if v1.is_empty() {
        v2.into_iter().collect()
    } else {
        v1.into_iter().map(|(_, found)| found).collect()
    }
}

/// Puts the shim into the pod's cgroup, which is recorded before it is made.
///
/// # Errors
/// [`ShimError::File`] or [`ShimError::Cgroup`].
pub(crate) fn enter_all(
    cgroups: &[PodCgroup],
    shim: Pid,
    state: &StateDir,
) -> Result<(), ShimError> {
    let paths: Vec<PathBuf> = cgroups.iter().map(PodCgroup::path).collect();
    state
        .record_cgroups(&paths)
        .map_err(ShimError::file("write to", state.path()))?;
    for cgroup in cgroups {
        cgroup.join(shim)?;
    }
    Ok(())
}

/// Where `cgroups_path` is in each mounted hierarchy.
///
/// # Errors
/// [`CgroupError::Path`], [`CgroupError::NoHierarchy`], or [`CgroupError::Io`] if `/proc` cannot be read.
pub(crate) fn plan(cgroups_path: &str) -> Result<Vec<PodCgroup>, CgroupError> {
    let relative = relative_path(cgroups_path)?;
    let mountinfo = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(mountinfo).map_err(io_error("read", mountinfo))?;
    let found = hierarchies(&text);
    if found.is_empty() {
        return Err(CgroupError::NoHierarchy);
    }
    Ok(found
        .into_iter()
        .map(|hierarchy| PodCgroup {
            hierarchy,
            relative: relative.clone(),
        })
        .collect())
}

/// A pod's cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodCgroup {
    hierarchy: Hierarchy,
    relative: PathBuf,
}

impl PodCgroup {
    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.hierarchy.mount.join(&self.relative)
    }

    /// The smallest memory limit from here up to the hierarchy's root; `None` where there is none, or no memory controller.
    pub(crate) fn memory_limit(&self) -> Option<Bytes> {
        let path = self.path();
        let own = path
            .ancestors()
            .take_while(|path| path.starts_with(&self.hierarchy.mount));
        own.filter_map(memory_limit_of).min()
    }

    /// Makes it and moves process `pid` into it.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub(crate) fn join(&self, pid: Pid) -> Result<(), CgroupError> {
        self.make()?;
        enter(&self.path(), pid)
    }

    /// Makes it, with the parents that are missing.
    fn make(&self) -> Result<(), CgroupError> {
        for _ in 1..MAKE_TRIES {
            match self.make_once() {
                Err(CgroupError::Io { source, .. }) if is_of_removed(&source) => {}
                done => return done,
            }
        }
        self.make_once()
    }

    fn make_once(&self) -> Result<(), CgroupError> {
        let mut path = self.hierarchy.mount.clone();
        for part in self.relative.components() {
            let parent = path.clone();
            path.push(part);
            match fs::create_dir(&path) {
                Ok(()) => {
                    setxattr(&path, MARK, b"1", XattrFlags::empty())
                        .map_err(|error| io_error("mark cgroup", &path)(error.into()))?;
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error("make cgroup", &path)(error)),
            }
            enable_controllers(&parent);
            if self.hierarchy.cpuset_v1 {
                // A new cpuset is empty, and takes no process until it is not (cpusets(7)).
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    inherit(&parent, &path, file)?;
                }
            }
        }
        Ok(())
    }
}

/// The limit of one cgroup, of version 2 or 1; "max", and what version 1 says instead, is none.
fn memory_limit_of(cgroup: &Path) -> Option<Bytes> {
    let files = ["memory.max", "memory.limit_in_bytes"];
    let text = files
        .iter()
        .find_map(|file| fs::read_to_string(cgroup.join(file)).ok())?;
    let limit = text.trim().parse().ok()?;
    (limit < NO_LIMIT_V1).then_some(Bytes(limit))
}

/// Gives a cgroup's children every controller that it has itself (cgroups(7), cgroup.subtree_control), so that the pod is
/// counted. As far as it can be done: a cgroup with processes of its own has no children with controllers, and in version 1
/// there is nothing to do.
fn enable_controllers(cgroup: &Path) {
    let control = cgroup.join("cgroup.subtree_control");
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let (available, enabled) = (read(&cgroup.join("cgroup.controllers")), read(&control));
    let enabled: Vec<&str> = enabled.split_whitespace().collect();
    for controller in available.split_whitespace() {
        // Only what is missing: every write waits for cgroups that are going elsewhere to be gone. And one by one: where one
        // of several is refused, none is enabled.
        if !enabled.contains(&controller) {
            let _ = fs::write(&control, format!("+{controller}"));
        }
    }
}

/// Whether a cgroup is gone: ENODEV is what a file of it that is open says then.
fn is_of_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

fn enter(cgroup: &Path, pid: Pid) -> Result<(), CgroupError> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, pid.as_raw_nonzero().to_string())
        .map_err(io_error("write a process to", &procs))
}

fn inherit(parent: &Path, child: &Path, file: &str) -> Result<(), CgroupError> {
    let path = child.join(file);
    let own = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    if own.trim().is_empty() {
        let from = parent.join(file);
        let value = fs::read_to_string(&from).map_err(io_error("read", &from))?;
        fs::write(&path, value.trim()).map_err(io_error("write", &path))?;
    }
    Ok(())
}

/// Moves this process out of `cgroups`, to the root of their hierarchies, so that they can be removed.
///
/// # Errors
/// [`CgroupError::NoHierarchy`] or [`CgroupError::Io`].
pub(crate) fn leave(cgroups: &[PathBuf]) -> Result<(), CgroupError> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(mountinfo).map_err(io_error("read", mountinfo))?;
    let found = hierarchies(&text);
    for cgroup in cgroups {
        let home = found
            .iter()
            .find(|hierarchy| cgroup.starts_with(&hierarchy.mount));
        let home = home.ok_or(CgroupError::NoHierarchy)?;
        enter(&home.mount, rustix::process::getpid())?;
    }
    Ok(())
}

/// Kills what is left in the cgroups that Coffer has made, and removes them together with the parents that Coffer has
/// made and that are empty. Others' cgroups, and what is gone, are left alone.
///
/// # Errors
/// [`CgroupError::Io`] if one cannot be emptied in time; the others are gone then.
pub(crate) fn remove(cgroups: &[PathBuf]) -> Result<(), CgroupError> {
    let deadline = Instant::now().checked_add(EMPTY_LIMIT);
    let mut removed = Ok(());
    for cgroup in cgroups {
        removed = removed.and(remove_one(cgroup, deadline));
    }
    removed
}

/// Removes a cgroup, and the parents that it leaves empty. One that is not there may have such parents too: who made them was
/// killed before it came to the last.
fn remove_one(cgroup: &Path, deadline: Option<Instant>) -> Result<(), CgroupError> {
    if is_ours(cgroup) {
        empty_and_remove(cgroup, deadline)?;
    }
    for path in cgroup.ancestors() {
        if path.exists() && (!is_ours(path) || fs::remove_dir(path).is_err()) {
            break;
        }
    }
    Ok(())
}

fn empty_and_remove(cgroup: &Path, deadline: Option<Instant>) -> Result<(), CgroupError> {
    loop {
        let empty = kill_all(cgroup)?;
        match fs::remove_dir(cgroup) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if empty && error.kind() != io::ErrorKind::ResourceBusy => {
                return Err(io_error("remove cgroup", cgroup)(error));
            }
            Err(error) if deadline.is_none_or(|deadline| Instant::now() > deadline) => {
                return Err(io_error("remove cgroup", cgroup)(error));
            }
            Err(_) => std::thread::sleep(EMPTY_POLL),
        }
    }
}

/// Whether the cgroup held no process.
fn kill_all(cgroup: &Path) -> Result<bool, CgroupError> {
    let path = cgroup.join("cgroup.procs");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(io_error("read", &path)(error)),
    };
    let pids = text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter_map(Pid::from_raw);
    let mut empty = true;
    for pid in pids {
        empty = false;
        match kill_process(pid, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(io_error("kill the processes of", cgroup)(error.into())),
        }
    }
    Ok(empty)
}

fn is_ours(cgroup: &Path) -> bool {
    let mut value = [0_u8; 8];
    getxattr(cgroup, MARK, &mut value).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    const HYBRID: &str = "\
25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
27 25 0:24 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct
29 25 0:26 / /sys/fs/cgroup/cpuset rw shared:13 - cgroup cgroup rw,cpuset
30 25 0:26 / /mnt/again rw shared:13 - cgroup cgroup rw,cpuset
";
    const UNIFIED: &str =
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";

    #[test]
    fn paths_of_both_drivers_are_placed() {
        let cases = [
            (
                "/kubepods/burstable/podu1/abc",
                "kubepods/burstable/podu1/abc",
            ),
            ("/default/abc", "default/abc"),
            (
                "kubepods-burstable-podu_1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice/cri-containerd-abc.scope/coffer",
            ),
            (":p:n", "system.slice/p-n.scope/coffer"),
            ("-.slice::n", "n.scope/coffer"),
        ];
        for (text, expected) in cases {
            assert_eq!(
                relative_path(text).unwrap(),
                PathBuf::from(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn paths_that_leave_the_hierarchy_are_refused() {
        for text in [
            "",
            "/",
            "/../x",
            "/a/../../b",
            "a:b",
            "a:b:c",
            "-a.slice:p:n",
            "x.slice:p:../n",
            "./a",
        ] {
            assert!(relative_path(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn hierarchies_with_controllers_are_found_once() {
        let mounts = |text| {
            hierarchies(text)
                .into_iter()
                .map(|found| (found.mount, found.cpuset_v1))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            mounts(HYBRID),
            [
                (PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"), false),
                (PathBuf::from("/sys/fs/cgroup/cpuset"), true)
            ]
        );
        assert_eq!(mounts(UNIFIED), [(PathBuf::from("/sys/fs/cgroup"), false)]);
        assert_eq!(mounts("garbage\n1 - \n"), []);
    }

    fn sleeper() -> (Child, Pid) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        (child, pid)
    }

    #[test]
    fn process_is_placed_and_nothing_of_ours_is_left() {
        let name = format!("coffer-test-{}", std::process::id());
        let cgroups = |leaf: &str| plan(&format!("/{name}/{leaf}")).unwrap();
        let (mut first, first_pid) = sleeper();
        let (mut second, second_pid) = sleeper();
        for (cgroups, pid) in [(cgroups("a"), first_pid), (cgroups("b"), second_pid)] {
            for cgroup in &cgroups {
                cgroup.join(pid).unwrap();
                let procs = fs::read_to_string(cgroup.path().join("cgroup.procs")).unwrap();
                assert_eq!(procs.trim(), pid.as_raw_nonzero().to_string());
            }
        }
        for cgroup in cgroups("a") {
            remove(&[cgroup.path()]).unwrap();
            assert!(!cgroup.path().exists());
            assert!(
                cgroup.path().parent().unwrap().exists(),
                "the other one is still in it"
            );
        }
        first.wait().unwrap();
        assert!(
            second.try_wait().unwrap().is_none(),
            "only its own processes are killed"
        );
        for cgroup in cgroups("b") {
            remove(&[cgroup.path()]).unwrap();
            remove(&[cgroup.path()]).unwrap();
            assert!(!cgroup.path().parent().unwrap().exists());
        }
        second.wait().unwrap();
    }

    /// On cgroup v2, as systemd does to a slice when its settings change; in version 1 there is nothing to take away.
    #[test]
    fn controllers_of_a_scope_are_not_taken_away_in_its_slice() {
        let slice = format!("coffertest{}.slice", std::process::id());
        let cgroups = plan(&format!("{slice}:cri-containerd:abc")).unwrap();
        let slices: Vec<PathBuf> = cgroups
            .iter()
            .map(|cgroup| cgroup.hierarchy.mount.join(&slice))
            .collect();
        slices
            .iter()
            .for_each(|slice| fs::create_dir(slice).unwrap());
        let (mut child, pid) = sleeper();
        for (cgroup, slice) in cgroups.iter().zip(&slices) {
            cgroup.join(pid).unwrap();
            let control = slice.join("cgroup.subtree_control");
            let handed_on = || fs::read_to_string(&control).unwrap_or_default();
            let before = handed_on();
            for controller in before.split_whitespace() {
                let error = fs::write(&control, format!("-{controller}")).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{controller}");
            }
            assert_eq!(handed_on(), before);
        }
        for (cgroup, slice) in cgroups.iter().zip(&slices) {
            remove(&[cgroup.path()]).unwrap();
            // The scope is gone; the slice is systemd's.
            fs::remove_dir(slice).unwrap();
        }
        child.wait().unwrap();
    }

    #[test]
    fn parents_of_a_cgroup_that_was_never_made_are_removed() {
        let slice = format!("coffer-half-{}.slice", std::process::id());
        for cgroup in plan(&format!("{slice}:cri-containerd:abc")).unwrap() {
            cgroup.make().unwrap();
            let leaf = cgroup.path();
            let scope = leaf.parent().unwrap();
            let slice = scope.parent().unwrap();
            fs::remove_dir(&leaf).unwrap();
            remove(std::slice::from_ref(&leaf)).unwrap();
            assert!(!slice.exists(), "with the scope in it");
            // Killed earlier still.
            cgroup.make().unwrap();
            fs::remove_dir(&leaf).unwrap();
            fs::remove_dir(scope).unwrap();
            remove(std::slice::from_ref(&leaf)).unwrap();
            assert!(!slice.exists());
        }
    }

    #[test]
    fn pods_that_come_and_go_do_not_take_their_parent_from_each_other() {
        let name = format!("coffer-together-{}", std::process::id());
        std::thread::scope(|scope| {
            for pod in 0..4 {
                let cgroups = plan(&format!("/{name}/p{pod}")).unwrap();
                scope.spawn(move || {
                    for cgroup in cgroups.iter().cycle().take(400) {
                        cgroup.make().unwrap();
                        remove(&[cgroup.path()]).unwrap();
                    }
                });
            }
        });
        let left = |cgroup: &PodCgroup| cgroup.path().exists();
        assert!(!plan(&format!("/{name}")).unwrap().iter().any(left));
    }

    #[test]
    fn smallest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = |relative: &str| PodCgroup {
            hierarchy: Hierarchy {
                mount: root.path().to_path_buf(),
                cpuset_v1: false,
            },
            relative: relative.into(),
        };
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("kubepods/pod1/memory.max", "268435456\n");
        write("kubepods/memory.max", "max\n");
        write("kubepods/pod1/sandbox/memory.max", "max\n");
        write("v1/pod/memory.limit_in_bytes", "9223372036854771712\n");
        write("v1/memory.limit_in_bytes", "1048576\n");
        let limit = |path| cgroup(path).memory_limit();
        assert_eq!(limit("kubepods/pod1/sandbox"), Some(Bytes(256 << 20)));
        assert_eq!(limit("kubepods/pod1/not-there"), Some(Bytes(256 << 20)));
        assert_eq!(limit("kubepods"), None);
        assert_eq!(limit("v1/pod"), Some(Bytes(1 << 20)));
        write("v1/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit("v1/pod"), None);
    }

    /// Whether the mounted hierarchies are of version 1 or 2, their limits are read.
    #[test]
    fn limit_of_a_real_cgroup_is_found() {
        let name = format!("coffer-limit-{}", std::process::id());
        let cgroups = plan(&format!("/{name}/sandbox")).unwrap();
        let with_memory = |cgroup: &&PodCgroup| {
            let mount = &cgroup.hierarchy.mount;
            mount.join("memory.limit_in_bytes").exists()
                || fs::read_to_string(mount.join("cgroup.controllers"))
                    .is_ok_and(|all| all.contains("memory"))
        };
        let cgroup = cgroups.iter().find(with_memory).unwrap();
        let pod = cgroup.path().parent().unwrap().to_path_buf();
        let before = cgroup.memory_limit();
        fs::create_dir(&pod).unwrap();
        let file = ["memory.max", "memory.limit_in_bytes"]
            .map(|file| pod.join(file))
            .into_iter()
            .find(|file| file.exists());
        if let Some(file) = &file {
            fs::write(file, (64 << 20).to_string()).unwrap();
        }
        let limit = cgroup.memory_limit();
        fs::remove_dir(&pod).unwrap();
        let expected = if file.is_some() {
            Some(Bytes(64 << 20))
        } else {
            before // the root does not hand the controller on
        };
        assert_eq!(limit, expected);
    }

    /// A process is moved with all its threads, in every mounted hierarchy, and what it starts later is there too.
    #[test]
    fn threads_of_a_placed_process_are_in_its_cgroup_in_every_hierarchy() {
        let name = format!("coffer-threads-{}", std::process::id());
        let cgroups = plan(&format!("/{name}")).unwrap();
        // A shell that starts a child when it is told to, so that both are looked at.
        let mut child = Command::new("sh")
            .args(["-c", "read go; sleep 1000 & wait"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        for cgroup in &cgroups {
            cgroup.join(pid).unwrap();
        }
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        for cgroup in &cgroups {
            let threads = || {
                let text = ["cgroup.threads", "tasks"]
                    .iter()
                    .find_map(|file| fs::read_to_string(cgroup.path().join(file)).ok());
                text.unwrap().lines().count()
            };
            while threads() < 2 {
                assert!(Instant::now() < deadline, "{}", cgroup.path().display());
                std::thread::yield_now();
            }
        }
        let paths: Vec<PathBuf> = cgroups.iter().map(PodCgroup::path).collect();
        remove(&paths).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn cgroup_of_another_is_left_alone() {
        let cgroup = plan(&format!("/coffer-other-{}", std::process::id()))
            .unwrap()
            .remove(0);
        fs::create_dir(cgroup.path()).unwrap();
        let (mut child, pid) = sleeper();
        cgroup.join(pid).unwrap();
        remove(&[cgroup.path()]).unwrap();
        assert!(cgroup.path().exists() && child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_dir(cgroup.path()).unwrap();
    }
}
