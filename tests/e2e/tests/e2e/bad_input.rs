// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Bad input gets a clear error, and the node is clean afterwards.

use std::fs;

use e2e::{Container, Node, Output, RUNTIME, run};

/// Fails to run a container, under another config for Coffer, and gives what the user is told.
fn refused(node: &Node, id: &str, config: &str) -> String {
    let _config = node.change_config(config);
    refused_with(id, &[], &["true"])
}

fn refused_with(id: &str, options: &[&str], command: &[&str]) -> String {
    let output = Container::run_image(id, e2e::BUSYBOX, options, command);
    assert_ne!(output.code, 0, "{output:?}");
    output.stderr
}

fn assert_says(error: &str, wanted: &[&str]) {
    for text in wanted {
        assert!(error.contains(text), "{text:?} is not in: {error}");
    }
}

#[test]
fn missing_kernel_is_named() {
    let node = Node::new("missing_kernel_is_named");
    let error = refused(&node, "no-kernel", "[guest]\nkernel = \"/nowhere/vmlinux\"");
    assert_says(&error, &["/nowhere/vmlinux", "guest.kernel"]);
}

#[test]
fn corrupt_kernel_is_named() {
    let node = Node::new("corrupt_kernel_is_named");
    fs::write("/tmp/corrupt-kernel", "this is no kernel\n".repeat(1000)).unwrap();
    let error = refused(
        &node,
        "bad-kernel",
        "[guest]\nkernel = \"/tmp/corrupt-kernel\"",
    );
    fs::remove_file("/tmp/corrupt-kernel").unwrap();
    assert_says(&error, &["kernel", "ELF"]);
}

#[test]
fn missing_initramfs_is_named() {
    let node = Node::new("missing_initramfs_is_named");
    let error = refused(
        &node,
        "no-initramfs",
        "[guest]\ninitramfs = \"/nowhere/initramfs\"",
    );
    assert_says(&error, &["/nowhere/initramfs", "guest.initramfs"]);
}

#[test]
fn corrupt_initramfs_panics_the_guest_and_its_console_is_in_the_error() {
    let node = Node::new("corrupt_initramfs_panics_the_guest_and_its_console_is_in_the_error");
    fs::write("/tmp/corrupt-initramfs", "this is no archive").unwrap();
    let error = refused(
        &node,
        "bad-initramfs",
        "[guest]\ninitramfs = \"/tmp/corrupt-initramfs\"",
    );
    fs::remove_file("/tmp/corrupt-initramfs").unwrap();
    assert_says(&error, &["Kernel panic"]);
}

#[test]
fn unknown_config_key_names_the_nearest_one() {
    let node = Node::new("unknown_config_key_names_the_nearest_one");
    let error = refused(
        &node,
        "bad-config",
        "[guest]\nkernal = \"/x\"\ndefault_vcpus = 0",
    );
    assert_says(
        &error,
        &[
            "guest.kernal",
            "did you mean guest.kernel?",
            "guest.default_vcpus",
        ],
    );
}

#[test]
fn config_that_is_no_toml_is_refused() {
    let node = Node::new("config_that_is_no_toml_is_refused");
    let error = refused(&node, "no-toml", "[guest");
    assert_says(&error, &["/etc/coffer/config.toml", "TOML"]);
}

#[test]
fn missing_vmm_is_named() {
    let node = Node::new("missing_vmm_is_named");
    let error = refused(&node, "no-vmm", "[vmm]\npath = \"/nowhere/coffer-vmm\"");
    assert_says(&error, &["/nowhere/coffer-vmm", "installed"]);
}

#[test]
fn missing_kvm_says_what_to_run() {
    let _node = Node::new("missing_kvm_says_what_to_run");
    fs::rename("/dev/kvm", "/dev/kvm-away").unwrap();
    let output = Container::run("no-kvm", &["true"]);
    fs::rename("/dev/kvm-away", "/dev/kvm").unwrap();
    assert_ne!(output.code, 0);
    assert_says(&output.stderr, &["/dev/kvm", "cofferctl check"]);
}

#[test]
fn kvm_that_is_none_is_told_apart() {
    let _node = Node::new("kvm_that_is_none_is_told_apart");
    fs::rename("/dev/kvm", "/dev/kvm-away").unwrap();
    fs::copy("/dev/null", "/dev/kvm")
        .or_else(|_| fs::write("/dev/kvm", "").map(|()| 0))
        .unwrap();
    let output = Container::run("false-kvm", &["true"]);
    fs::remove_file("/dev/kvm").unwrap();
    fs::rename("/dev/kvm-away", "/dev/kvm").unwrap();
    assert_ne!(output.code, 0);
    assert_says(&output.stderr, &["KVM"]);
}

#[test]
fn guest_that_never_says_ready_meets_its_deadline() {
    let node = Node::new("guest_that_never_says_ready_meets_its_deadline");
    // The kernel waits for a root device that never comes, and nothing ever dials the host.
    let config = "[guest]\nready_timeout_s = 5\n\
                  kernel_arguments = [\"rdinit=/nowhere\", \"root=/dev/never\", \"rootwait\"]";
    let error = refused(&node, "never-ready", config);
    assert_says(&error, &["not ready within 5"]);
}

#[test]
fn guest_kernel_that_panics_leaves_its_last_words_in_the_error() {
    let node = Node::new("guest_kernel_that_panics_leaves_its_last_words_in_the_error");
    let error = refused(
        &node,
        "panics",
        "[guest]\nkernel_arguments = [\"rdinit=/nowhere\"]",
    );
    assert_says(&error, &["Kernel panic"]);
}

#[test]
fn bundle_that_is_no_json_is_refused() {
    let _node = Node::new("bundle_that_is_no_json_is_refused");
    fs::write("/tmp/bad-config.json", "{ this is not JSON").unwrap();
    // ctr reads the spec itself, so the shim is asked directly, as containerd would.
    let bundle = "/tmp/bad-bundle";
    fs::create_dir_all(bundle).unwrap();
    fs::rename("/tmp/bad-config.json", format!("{bundle}/config.json")).unwrap();
    let command = format!(
        "cd {bundle} && containerd-shim-coffer-v2 -namespace default -address /run/containerd/containerd.sock \
         -publish-binary /usr/bin/containerd -id bad-bundle start"
    );
    let output: Output = run("sh", &["-c", &command]);
    fs::remove_dir_all(bundle).unwrap();
    assert_ne!(output.code, 0, "{output:?}");
    assert_says(&(output.stdout + &output.stderr), &["config.json", "OCI"]);
}

#[test]
fn resource_that_cannot_be_applied_is_refused_by_name() {
    let _node = Node::new("resource_that_cannot_be_applied_is_refused_by_name");
    let error = refused_with("host-network", &["--net-host"], &["true"]);
    assert_says(&error, &["network namespace", "hostNetwork"]);
    let error = refused_with("host-device", &["--device", "/dev/kvm"], &["true"]);
    assert_says(&error, &["linux.devices", "/dev/kvm"]);
    let error = refused_with(
        "host-folder",
        &[
            "--mount",
            "type=bind,src=/root,dst=/data,options=rbind:rw:rshared",
        ],
        &["true"],
    );
    assert_says(&error, &["mounts[/data]", "HostToContainer"]);
}

#[test]
fn memory_limit_the_vm_cannot_have_is_refused() {
    let node = Node::new("memory_limit_the_vm_cannot_have_is_refused");
    let _config = node.change_config("[guest]\nmax_memory_mib = 512");
    let error = refused_with("too-large", &["--memory-limit", "10737418240"], &["true"]);
    assert_says(&error, &["guest.max_memory_mib"]);
}

#[test]
fn full_disk_while_an_image_is_built_is_told_and_leaves_nothing() {
    let node = Node::new("full_disk_while_an_image_is_built_is_told_and_leaves_nothing");
    let cache = "/tmp/small-cache";
    fs::create_dir_all(cache).unwrap();
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=1200k", "tmpfs", cache],
    )
    .success();
    let config = format!("[storage]\ncache_dir = \"{cache}\"");
    let error = refused(&node, "full-disk", &config);
    let images = fs::read_dir(format!("{cache}/images"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "erofs"))
        .count();
    // The shim of the failed container may still be on its way out.
    e2e::eventually("the cache is let go of", || {
        (run("umount", &[cache]).code == 0).then_some(())
    });
    fs::remove_dir(cache).unwrap();
    assert_eq!(images, 0);
    assert_says(&error, &["no space left", cache, "storage.cache_dir"]);
}

#[test]
fn rootfs_that_is_not_there_is_named() {
    let _node = Node::new("rootfs_that_is_not_there_is_named");
    let arguments = [
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        "--rootfs",
        "/nowhere/rootfs",
        "no-rootfs",
        "true",
    ];
    let output = run("ctr", &arguments);
    assert_ne!(output.code, 0);
    assert_says(&output.stderr, &["/nowhere/rootfs"]);
}
