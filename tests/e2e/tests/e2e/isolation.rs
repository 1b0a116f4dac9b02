// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What an attacker finds who has broken out of the guest into the VMM: a process with nothing to steal.

use std::fs;

use e2e::{Container, Node, named};

#[test]
fn vmm_has_no_privileges_no_files_and_no_network() {
    let _node = Node::new("vmm_has_no_privileges_no_files_and_no_network");
    let _container = Container::start("jailed", &["sleep", "infinity"]);
    let vmm = named("coffer-vmm")[0];
    let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    assert!(!field("Uid").starts_with("0\t"), "{}", field("Uid"));

    let root: Vec<_> = fs::read_dir(format!("/proc/{vmm}/root/"))
        .unwrap()
        .collect();
    assert!(root.is_empty(), "{root:?}");
    let links = fs::read_to_string(format!("/proc/{vmm}/net/dev")).unwrap();
    let links: Vec<&str> = links
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    assert!(links.iter().all(|name| *name == "lo"), "{links:?}");
}

#[test]
fn no_file_of_the_host_is_open_for_writing_but_the_pods_own() {
    let _node = Node::new("no_file_of_the_host_is_open_for_writing_but_the_pods_own");
    let _container = Container::start("descriptors", &["sleep", "infinity"]);
    let vmm = named("coffer-vmm")[0];
    for entry in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap().display().to_string();
        let number = entry.file_name().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{vmm}/fdinfo/{number}")).unwrap();
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap()
            .trim()
            .to_owned();
        let writable = i64::from_str_radix(&flags, 8).unwrap() & 0o3 != 0;
        let of_the_host = target.starts_with('/')
            && !target.starts_with("/dev/")
            && !target.contains("(deleted)");
        assert!(
            !(writable && of_the_host && !target.contains("console")),
            "{number} -> {target}"
        );
    }
}
