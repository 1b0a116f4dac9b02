// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The life of a container by `ctr`: exit codes, execs, signals, and what an image and a spec ask for.

use std::thread;

use e2e::{BUSYBOX, Container, Node, RUNTIME, eventually, run};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

#[test]
fn exit_codes_reach_ctr() {
    let _node = Node::new("exit_codes_reach_ctr");
    for code in [0, 1, 77] {
        let output = Container::run(&format!("exit-{code}"), &sh(&format!("exit {code}")));
        assert_eq!(output.code, code, "{output:?}");
    }
}

#[test]
fn death_by_signal_is_128_plus_the_signal() {
    let _node = Node::new("death_by_signal_is_128_plus_the_signal");
    let container = Container::start("signal", &["sleep", "infinity"]);
    // An exec is not PID 1, so a signal's default action applies.
    assert_eq!(container.exec("term", &sh("kill -TERM $$")).code, 128 + 15);
    assert_eq!(container.exec("segv", &sh("kill -SEGV $$")).code, 128 + 11);
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 128 + 9);
}

#[test]
fn signal_that_init_handles_gives_its_own_exit_code() {
    let _node = Node::new("signal_that_init_handles_gives_its_own_exit_code");
    let container = Container::start(
        "handler",
        &sh("trap 'exit 5' TERM; touch /ready; while :; do sleep 0.1; done"),
    );
    let mut attempt = 0;
    eventually("the handler is in place", || {
        attempt += 1;
        let look = container.exec(&format!("look-{attempt}"), &["test", "-e", "/ready"]);
        (look.code == 0).then_some(())
    });
    container.kill("SIGTERM").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 5);
}

#[test]
fn the_guest_runs_a_kernel_of_its_own() {
    let _node = Node::new("the_guest_runs_a_kernel_of_its_own");
    let guest = Container::run("kernel", &["uname", "-r"]).success().stdout;
    let host = run("uname", &["-r"]).success().stdout;
    assert_ne!(guest.trim(), host.trim());
}

#[test]
fn command_that_is_not_there_is_named() {
    let _node = Node::new("command_that_is_not_there_is_named");
    let output = Container::run("nosuch", &["no-such-command"]);
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("no-such-command"), "{output:?}");
}

#[test]
fn user_directory_and_environment_are_the_images() {
    let _node = Node::new("user_directory_and_environment_are_the_images");
    let image = "coffer.test/busybox-user:latest";
    // The limit is ctr's own.
    let script = sh("id -u; id -g; id -G; pwd; echo $COLOUR; ulimit -Hn");
    let output = Container::run_image("user", image, &[], &script).success();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[..2], ["1000", "1000"]);
    assert_eq!(lines[3..], ["/home/app", "green", "1024"]);
}

#[test]
fn layers_are_merged_and_whiteouts_hide() {
    let _node = Node::new("layers_are_merged_and_whiteouts_hide");
    let image = "coffer.test/busybox-layers:latest";
    let script = sh("cat /etc/layer; ls /bin/nslookup; cat /etc/passwd | head -1");
    let output = Container::run_image("layers", image, &[], &script);
    assert_eq!(output.stdout, "upper\nroot:x:0:0:root:/root:/bin/sh\n");
    assert!(output.stderr.contains("No such file"), "{output:?}");
}

#[test]
fn read_only_rootfs_cannot_be_written() {
    let _node = Node::new("read_only_rootfs_cannot_be_written");
    let script = sh("echo x > /file || echo refused; touch /tmp/x || echo refused");
    let output = Container::run_image("read-only", BUSYBOX, &["--read-only"], &script);
    assert_eq!(output.stdout, "refused\nrefused\n");
    assert!(
        output.stderr.contains("Read-only file system"),
        "{output:?}"
    );
}

#[test]
fn writable_layer_is_the_containers_alone() {
    let _node = Node::new("writable_layer_is_the_containers_alone");
    for id in ["writer-1", "writer-2"] {
        let output = Container::run(
            id,
            &sh("ls /mine; echo x > /mine && rm /etc/group && cat /mine"),
        )
        .success();
        assert_eq!(output.stdout, "x\n");
        assert!(output.stderr.contains("No such file"), "{output:?}");
    }
}

#[test]
fn exec_has_output_exit_code_and_the_containers_files() {
    let _node = Node::new("exec_has_output_exit_code_and_the_containers_files");
    let container = Container::start("exec", &sh("echo made > /made; sleep infinity"));
    let output = container.exec(
        "one",
        &sh("while ! cat /made; do :; done 2>/dev/null; echo oops >&2; exit 9"),
    );
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.trim()),
        (9, "made\n", "oops")
    );
    // The same exec id again, once the first is deleted.
    assert_eq!(container.exec("one", &sh("exit 4")).code, 4);
}

#[test]
fn exec_of_a_command_that_is_not_there_is_named_and_harmless() {
    let _node = Node::new("exec_of_a_command_that_is_not_there_is_named_and_harmless");
    let container = Container::start("exec-nosuch", &["sleep", "infinity"]);
    let output = container.exec("bad", &["no-such-command"]);
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("no-such-command"), "{output:?}");
    assert_eq!(container.exec("good", &sh("exit 3")).code, 3);
}

#[test]
fn task_list_and_processes_are_shown() {
    let _node = Node::new("task_list_and_processes_are_shown");
    let container = Container::start("listed", &["sleep", "infinity"]);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    let listed = run("ctr", &["task", "ps", "listed"]).success().stdout;
    assert_eq!(listed.lines().count(), 2, "a heading and init: {listed}");
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.status().as_deref(), Some("STOPPED"));
}

#[test]
fn pids_name_no_unrelated_process_of_the_host() {
    let _node = Node::new("pids_name_no_unrelated_process_of_the_host");
    let container = Container::start("pids", &["sleep", "infinity"]);
    let listed = run("ctr", &["task", "ps", container.id()]).success().stdout;
    for pid in listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
    {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        assert!(
            name.is_empty() || name.starts_with("coffer") || name.starts_with("containerd-shim"),
            "{pid} {name}"
        );
    }
}

#[test]
fn kill_of_an_ended_task_is_not_found() {
    let _node = Node::new("kill_of_an_ended_task_is_not_found");
    let container = Container::start("ended", &["true"]);
    container.wait_stopped();
    let output = container.kill("SIGKILL");
    assert_ne!(output.code, 0);
    assert!(
        output.stderr.contains("not found") || output.stderr.contains("already finished"),
        "{output:?}"
    );
}

#[test]
fn container_starts_again_under_its_old_id() {
    let _node = Node::new("container_starts_again_under_its_old_id");
    for _ in 0..2 {
        assert_eq!(
            Container::run("again", &["echo", "here"]).success().stdout,
            "here\n"
        );
    }
}

#[test]
fn twenty_containers_run_in_parallel() {
    let _node = Node::new("twenty_containers_run_in_parallel");
    let threads: Vec<_> = (0..20)
        .map(|number| {
            thread::spawn(move || {
                let id = format!("parallel-{number}");
                (
                    number,
                    Container::run(&id, &sh(&format!("echo {number}; exit {number}"))),
                )
            })
        })
        .collect();
    for thread in threads {
        let (number, output) = thread.join().unwrap();
        assert_eq!(
            (output.code, output.stdout.trim()),
            (number, number.to_string().as_str()),
            "{output:?}"
        );
    }
}

#[test]
fn every_container_without_a_pod_has_a_vm_of_its_own() {
    let _node = Node::new("every_container_without_a_pod_has_a_vm_of_its_own");
    let before = e2e::named("coffer-vmm").len();
    let first = Container::start("vm-1", &["sleep", "infinity"]);
    let second = Container::start("vm-2", &["sleep", "infinity"]);
    assert_eq!(e2e::named("coffer-vmm").len(), before + 2);
    let boot_id = |container: &Container| {
        container
            .exec("boot", &["cat", "/proc/sys/kernel/random/boot_id"])
            .success()
            .stdout
    };
    assert_ne!(boot_id(&first), boot_id(&second));
}

#[test]
fn native_snapshotter_gives_the_same_container() {
    let _node = Node::new("native_snapshotter_gives_the_same_container");
    let image = "coffer.test/busybox-layers:latest";
    let options = ["--snapshotter", "native"];
    let unpack = run(
        "ctr",
        &["images", "mount", "--snapshotter", "native", image, "/mnt"],
    );
    if unpack.code == 0 {
        run("ctr", &["images", "unmount", "--rm", "/mnt"]);
    }
    let output = Container::run_image("native", image, &options, &["cat", "/etc/layer"]).success();
    assert_eq!(output.stdout, "upper\n");
}

#[test]
fn plain_directory_serves_as_rootfs() {
    let _node = Node::new("plain_directory_serves_as_rootfs");
    let (root, image) = ("/tmp/plain-rootfs", "/tmp/plain-image");
    std::fs::create_dir_all(image).unwrap();
    run("ctr", &["images", "mount", BUSYBOX, image]).success();
    run("cp", &["-a", "/tmp/plain-image/.", root]).success();
    run("ctr", &["images", "unmount", "--rm", image]).success();
    let arguments = [
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        "--rootfs",
        root,
        "plain",
        "/bin/cat",
        "/etc/passwd",
    ];
    let output = run("ctr", &arguments).success();
    run("rm", &["-rf", root, image]).success();
    assert!(output.stdout.starts_with("root:x:0:0"), "{output:?}");
}
