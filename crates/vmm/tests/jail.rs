// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a VMM whose guest runs is allowed, read from /proc. Needs root and `/dev/kvm`.

mod common;

use std::fs;
use std::path::Path;

use common::{Vmm, config, files, pvh_kernel};
use vmm::ExitCode;
use vmm::control::{Answer, RefusalKind};

/// Runs for ever.
const SPIN: &[u8] = &[0xeb, 0xfe];

fn jailed() -> Vmm {
    let (vmm, result) = Vmm::start(&config(), &files(&pvh_kernel(SPIN)));
    assert_eq!(result, Ok(Answer::Done));
    vmm
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or("missing", |(_, value)| value.trim())
}

#[test]
fn every_thread_is_unprivileged_and_filtered() {
    let vmm = jailed();
    let tasks = format!("/proc/{}/task", vmm.child.id());
    let mut names = Vec::new();
    for task in fs::read_dir(tasks).unwrap() {
        let path = task.unwrap().path();
        let status = fs::read_to_string(path.join("status")).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(field(&status, "Uid"), "64999\t64999\t64999\t64999");
        assert_eq!(field(&status, "Gid"), "64998\t64998\t64998\t64998");
        assert_eq!(field(&status, "Groups"), "");
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2", "2 is a filter");
        names.push(field(&status, "Name").to_owned());
    }
    // The kernel's own (6.12 and later): KVM's worker that recovers huge pages, inside the process that made the VM.
    names.retain(|name| !name.starts_with("kvm-nx-lpage"));
    names.sort();
    assert_eq!(names, ["coffer-vmm", "disk", "io", "vcpu0"]);
}

#[test]
fn root_is_empty_and_nothing_of_the_host_is_mounted() {
    let vmm = jailed();
    let proc = format!("/proc/{}", vmm.child.id());
    assert_eq!(fs::read_dir(format!("{proc}/root")).unwrap().count(), 0);
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro"), "{mounts}");
    for namespace in ["mnt", "ipc", "uts"] {
        let theirs = fs::read_link(format!("{proc}/ns/{namespace}")).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        assert_ne!(theirs, ours);
    }
}

#[test]
fn descriptors_are_those_of_the_vm_and_no_file_of_the_hosts_system() {
    let vmm = jailed();
    let folder = format!("/proc/{}/fd", vmm.child.id());
    // The VMM's standard output and error are this test's own, wherever they go.
    let own = ["1", "2"].map(|number| fs::read_link(format!("/proc/self/fd/{number}")).unwrap());
    for entry in fs::read_dir(folder).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        let name = target.to_string_lossy().into_owned();
        let anonymous = ["anon_inode:", "socket:", "pipe:"];
        let known = anonymous.iter().any(|prefix| name.starts_with(prefix))
            || own.contains(&target)
            || name.contains("/dev/") // KVM
            || name.ends_with("(deleted)"); // kernel and initramfs of the test
        assert!(known, "{name}");
    }
}

#[test]
fn descriptors_inherited_by_mistake_are_closed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let leaked = nix::unistd::dup(&file).unwrap(); // without close-on-exec
    let vmm = jailed();
    let folder = format!("/proc/{}/fd", vmm.child.id());
    let names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(!names.iter().any(|name| name == Path::new(file.path())));
    drop(leaked);
}

#[test]
fn root_is_refused_as_the_vmms_user() {
    let mut config = config();
    config.jail.as_mut().unwrap().uid = 0;
    let (mut vmm, result) = Vmm::start(&config, &files(&pvh_kernel(SPIN)));
    assert_eq!(result.unwrap_err().kind, RefusalKind::Config);
    assert_eq!(vmm.end().0, ExitCode::Config as u8);
}
