// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What is on a node that pods could leave behind: taken before a test and after it, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::{command, processes};

/// Where Coffer and containerd keep what belongs to a pod. `/run/containerd/fifo` is `ctr`'s own: it forgets the pipes of a
/// task that was lost.
const STATE_DIRECTORIES: [&str; 6] = [
    "/run/coffer",
    "/run/containerd/s",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/var/lib/coffer",
];

/// Everything that a pod could leave behind, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit(BTreeSet<String>);

impl Audit {
    /// The node as it is now.
    pub fn take() -> Self {
        let mut lines = BTreeSet::new();
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        for (id, process) in processes::all() {
            // containerd itself comes back under another id when a test restarts it.
            if process.parent != own && process.name != "containerd" {
                lines.insert(format!("process {id} {}", process.name));
            }
        }
        for mount in fs::read_to_string("/proc/self/mountinfo")
            .unwrap_or_default()
            .lines()
        {
            // The fields from the mount point on: ids change when something else is mounted.
            lines.insert(format!(
                "mount {}",
                mount.splitn(5, ' ').last().unwrap_or(mount)
            ));
        }
        for socket in fs::read_to_string("/proc/net/unix")
            .unwrap_or_default()
            .lines()
        {
            if let Some((_, path)) = socket.split_once(" /") {
                lines.insert(format!("socket /{path}"));
            }
        }
        for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            if let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) {
                lines.insert(format!(
                    "loop device {} of {file}",
                    device.file_name().display()
                ));
            }
        }
        for link in fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
        {
            lines.insert(format!("network interface {}", link.file_name().display()));
        }
        for namespace in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = namespace.file_name().to_string_lossy().into_owned();
            for line in inside(&name) {
                lines.insert(format!("network namespace {name}: {line}"));
            }
        }
        for directory in STATE_DIRECTORIES {
            walk(Path::new(directory), &mut |path| {
                lines.insert(format!("file {}", path.display()));
            });
        }
        walk(Path::new("/sys/fs/cgroup"), &mut |path| {
            if path.is_dir() {
                lines.insert(format!("cgroup {}", path.display()));
            }
        });
        Self(lines)
    }

    /// What is here and was not in `before`. What a node keeps on purpose is not left behind: cached images, the
    /// templates of disks, and the folders that hold them.
    pub fn left_since(&self, before: &Self) -> Vec<String> {
        self.0
            .difference(&before.0)
            .filter(|line| !is_kept(line))
            .cloned()
            .collect()
    }
}

fn is_kept(line: &str) -> bool {
    // The CNI plugin's bridge, made for the first pod of a node, and the kernel's folder of a containerd namespace.
    if [
        "network interface cni0",
        "cgroup /sys/fs/cgroup/default",
        "cgroup /sys/fs/cgroup/k8s.io",
    ]
    .contains(&line)
    {
        return true;
    }
    let kept_files = [
        "file /var/lib/coffer/images",
        "file /var/lib/coffer/scratch-",
        "file /var/lib/coffer/volume-",
    ];
    // Folders that the first pod makes and all later ones use.
    let folders = STATE_DIRECTORIES.map(|directory| format!("file {directory}"));
    let namespaces = ["/default", "/k8s.io"].map(|namespace| {
        ["/run/coffer", STATE_DIRECTORIES[2], STATE_DIRECTORIES[4]]
            .map(|directory| format!("file {directory}{namespace}"))
    });
    kept_files.iter().any(|kept| line.starts_with(kept))
        || folders.iter().any(|folder| folder == line)
        || namespaces.iter().flatten().any(|folder| folder == line)
        || line == "file /run/containerd/io.containerd.grpc.v1.cri/sandboxes"
        || line == "file /run/containerd/io.containerd.grpc.v1.cri/containers"
}

/// The interfaces and the queueing disciplines of a named network namespace: taps and their joints are there.
fn inside(namespace: &str) -> Vec<String> {
    let links = command::run("ip", &["-n", namespace, "-brief", "link", "show"]).stdout;
    let names = links
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let qdiscs = command::run("tc", &["-n", namespace, "qdisc", "show"]).stdout;
    // Those of the interfaces themselves come and go with them.
    let filters = qdiscs
        .lines()
        .filter(|line| line.contains("ingress") || line.contains("clsact"));
    names.chain(filters).map(str::to_owned).collect()
}

fn walk(path: &Path, visit: &mut impl FnMut(&Path)) {
    let Ok(metadata) = path.symlink_metadata() else {
        return;
    };
    visit(path);
    if metadata.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            walk(&entry.path(), visit);
        }
    }
}
