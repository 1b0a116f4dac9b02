// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Whatever is killed, containerd learns the truth, `delete` works, and nothing is left.

use e2e::{
    BUSYBOX, Container, ContainerdDown, Node, RUNTIME, children_named, eventually, kill_9, named,
    parent_of, process_exists, run, running, spawn,
};
use std::io::{BufRead, BufReader};
use std::sync::{Arc, Mutex};

fn only(pids: &[i32]) -> i32 {
    assert_eq!(pids.len(), 1, "{pids:?}");
    pids[0]
}

/// The VMM and the shim of the only container of the node.
fn vmm_and_shim() -> (i32, i32) {
    let vmm = only(&named("coffer-vmm"));
    (vmm, parent_of(vmm).unwrap())
}

#[test]
fn killed_vmm_is_exit_137_once() {
    let node = Node::new("killed_vmm_is_exit_137_once");
    let container = Container::start("vmm-killed", &["sleep", "infinity"]);
    let mut events = spawn("ctr", &["events"]);
    let seen = Arc::new(Mutex::new(String::new()));
    let (stdout, writer) = (events.stdout.take().unwrap(), Arc::clone(&seen));
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            writer.lock().unwrap().push_str(&(line + "\n"));
        }
    });
    let mut attempt = 0;
    eventually("the events are heard", || {
        attempt += 1;
        run(
            "ctr",
            &[
                "namespaces",
                "label",
                "default",
                &format!("heard={attempt}"),
            ],
        );
        seen.lock().unwrap().contains("/namespaces/").then_some(())
    });
    let (vmm, _) = vmm_and_shim();
    kill_9(vmm);
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137, "{}", node.log());
    eventually("the delete is told", || {
        seen.lock().unwrap().contains("/tasks/delete").then_some(())
    });
    events.kill().unwrap();
    events.wait().unwrap();
    reader.join().unwrap();
    let text = seen.lock().unwrap().clone();
    assert_eq!(text.matches("/tasks/exit").count(), 1, "{text}");
    assert!(text.contains("137"), "{text}");
}

#[test]
fn killed_shim_takes_its_vm_along() {
    let _node = Node::new("killed_shim_takes_its_vm_along");
    let container = Container::start("shim-killed", &["sleep", "infinity"]);
    let (vmm, shim) = vmm_and_shim();
    kill_9(shim);
    eventually("the VMM goes with its shim", || {
        (!process_exists(vmm)).then_some(())
    });
    container.wait_stopped();
}

#[test]
fn killed_process_of_the_container_is_its_own_exit() {
    let _node = Node::new("killed_process_of_the_container_is_its_own_exit");
    let container = Container::start(
        "process-killed",
        &["sh", "-c", "sleep 1000 & wait $!; exit $?"],
    );
    // What it kills ends the container, and with it the exec, mostly before that has an exit code of its own.
    container.exec(
        "kill",
        &["sh", "-c", "until kill -9 $(pidof sleep); do :; done"],
    );
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
}

#[test]
fn shim_survives_containerds_restart() {
    let node = Node::new("shim_survives_containerds_restart");
    let container = Container::start("containerd-killed", &["sleep", "infinity"]);
    drop(ContainerdDown::kill());
    assert_eq!(
        container.status().as_deref(),
        Some("RUNNING"),
        "{}",
        node.log()
    );
    assert_eq!(container.exec("after", &["sh", "-c", "exit 8"]).code, 8);
    container.kill("SIGKILL").success();
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
    drop(container);
    drop(node);
}

#[test]
fn exit_while_containerd_is_down_is_told_afterwards() {
    let _node = Node::new("exit_while_containerd_is_down_is_told_afterwards");
    let container = Container::start("exit-while-down", &["sleep", "infinity"]);
    let (vmm, _) = vmm_and_shim();
    let down = ContainerdDown::kill();
    kill_9(vmm);
    drop(down);
    container.wait_stopped();
    assert_eq!(container.delete_task(), 137);
}

/// Kills a process of a container that is just being made, at each of several moments of its making. `victims` finds it.
fn kill_in_the_middle(test: &str, victims: impl Fn() -> Vec<i32>) {
    let node = Node::new(test);
    for moment in 0..6_u32 {
        let id = format!("{test}-{moment}").replace('_', "-");
        let arguments = [
            "run",
            "--detach",
            "--runtime",
            RUNTIME,
            BUSYBOX,
            &id,
            "sleep",
            "infinity",
        ];
        let mut ctr = spawn("ctr", &arguments);
        let pid = eventually("the victim starts", || {
            // Or the container is up already, on a fast machine.
            victims()
                .first()
                .copied()
                .or_else(|| ctr.try_wait().unwrap().map(|_| 0))
        });
        // Later and later: the moments of the making are many, and this meets some of them.
        std::thread::sleep(std::time::Duration::from_millis(u64::from(moment) * 150));
        if pid != 0 && process_exists(pid) {
            kill_9(pid);
        }
        let output = ctr.wait_with_output().unwrap();
        if !output.status.success() {
            assert!(!output.stderr.is_empty(), "a failed create must say why");
        }
        run("ctr", &["task", "kill", "--signal", "SIGKILL", &id]);
        run("ctr", &["task", "delete", "--force", &id]);
        run("ctr", &["container", "delete", &id]);
        let listed = run("ctr", &["container", "ls", "-q"]).stdout;
        assert!(!listed.contains(&id), "{listed}\n{}", node.log());
    }
}

#[test]
fn vmm_killed_while_a_container_is_made() {
    kill_in_the_middle("vmm_killed_while_a_container_is_made", || {
        named("coffer-vmm")
    });
}

#[test]
fn shim_killed_while_a_container_is_made() {
    kill_in_the_middle("shim_killed_while_a_container_is_made", || {
        running("containerd-shim-coffer-v2", "serve")
    });
}

#[test]
fn start_killed_while_a_container_is_made() {
    kill_in_the_middle("start_killed_while_a_container_is_made", || {
        running("containerd-shim-coffer-v2", "start")
    });
}

#[test]
fn containerd_killed_while_a_container_is_made() {
    let _node = Node::new("containerd_killed_while_a_container_is_made");
    for moment in 0..4_u64 {
        let id = format!("create-interrupted-{moment}");
        let arguments = [
            "run",
            "--detach",
            "--runtime",
            RUNTIME,
            BUSYBOX,
            &id,
            "sleep",
            "infinity",
        ];
        let mut ctr = spawn("ctr", &arguments);
        eventually("a VMM starts", || {
            (!named("coffer-vmm").is_empty() || ctr.try_wait().unwrap().is_some()).then_some(())
        });
        std::thread::sleep(std::time::Duration::from_millis(moment * 200));
        let down = ContainerdDown::kill();
        ctr.wait().unwrap();
        drop(down);
        run("ctr", &["task", "kill", "--signal", "SIGKILL", &id]);
        run("ctr", &["task", "delete", "--force", &id]);
        run("ctr", &["container", "delete", &id]);
    }
}

#[test]
fn vmm_is_a_child_of_its_shim_and_alone() {
    let _node = Node::new("vmm_is_a_child_of_its_shim_and_alone");
    let _container = Container::start("family", &["sleep", "infinity"]);
    let (vmm, shim) = vmm_and_shim();
    assert_eq!(children_named(shim, "coffer-vmm"), [vmm]);
}
