// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers made, used and killed again and again, while at random moments shim, VMM or containerd are killed: nothing
//! is left, and containerd knows it.

use std::thread;
use std::time::Duration;

use e2e::{BUSYBOX, ContainerdDown, Node, RUNTIME, Random, count, eventually, named, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SHIM: &str = "containerd-shim-coffer-v2";
const VICTIMS: [&str; 3] = [SHIM, "coffer-vmm", "containerd"];

/// What a cycle is at when something is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Making,
    Exec,
    Kill,
}

/// What is killed, when, and how long after the beginning of that.
#[derive(Debug, Clone, Copy)]
struct Fault {
    victim: &'static str,
    moment: Moment,
    after: Duration,
}

impl Fault {
    fn random(random: &mut Random) -> Self {
        let pick = |random: &mut Random| usize::try_from(random.below(3)).unwrap();
        let moment = [Moment::Making, Moment::Exec, Moment::Kill][pick(random)];
        // A container is made in some seconds in the emulator, the rest takes parts of one.
        let longest = if moment == Moment::Making { 5000 } else { 800 };
        Self {
            victim: VICTIMS[pick(random)],
            moment,
            after: Duration::from_millis(random.below(longest)),
        }
    }

    fn strike(self) {
        thread::sleep(self.after);
        if self.victim == "containerd" {
            drop(ContainerdDown::kill());
        } else if let Some(pid) = named(self.victim).first() {
            let _gone_already = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
    }
}

/// Runs `ctr` while the fault strikes, if this is its moment; whether it succeeded.
fn ctr(arguments: &[&str], now: Moment, fault: Option<Fault>) -> i32 {
    thread::scope(|scope| {
        let running = scope.spawn(|| run("ctr", arguments));
        if let Some(fault) = fault.filter(|fault| fault.moment == now) {
            fault.strike();
        }
        let output = running.join().unwrap();
        assert!(
            fault.is_some() || output.code == 0 || now == Moment::Exec,
            "{output:?}"
        );
        output.code
    })
}

fn cycle(id: &str, fault: Option<Fault>) {
    let make = [
        "run",
        "--detach",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        id,
        "sleep",
        "infinity",
    ];
    ctr(&make, Moment::Making, fault);
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "exec",
        id,
        "sh",
        "-c",
        "exit 7",
    ];
    let code = ctr(&exec, Moment::Exec, fault);
    assert!(fault.is_some() || code == 7, "exec: {code}");
    assert_ne!(code, 0, "an exec that was cut off is no success");
    ctr(&["task", "kill", "-s", "SIGKILL", id], Moment::Kill, fault);
    eventually(&format!("{id} can be deleted"), || {
        run("ctr", &["task", "delete", "--force", id]);
        let tasks = run("ctr", &["task", "ls", "-q"]).stdout;
        (!tasks.lines().any(|line| line == id)).then_some(())
    });
    run("ctr", &["container", "delete", id]);
    let known = run("ctr", &["container", "ls", "-q"]).success().stdout;
    assert_eq!(known, "", "containerd knows of no container");
    eventually("neither shim nor VM is left", || {
        [SHIM, "coffer-vmm"]
            .iter()
            .all(|name| named(name).is_empty())
            .then_some(())
    });
}

#[test]
fn create_exec_kill_cycles_with_random_faults_leave_nothing() {
    let node = Node::new("create_exec_kill_cycles_with_random_faults_leave_nothing");
    let mut random = Random::seeded();
    let cycles = count(9, 300);
    // A short run has its share of faults too.
    let every = if cycles < 30 { 3 } else { 10 };
    let mut faults = 0;
    for number in 0..cycles {
        let fault = (number % every == every - 1).then(|| Fault::random(&mut random));
        if let Some(fault) = fault {
            println!("cycle {number}: {fault:?}");
            faults += 1;
        }
        cycle(&format!("cycle-{number}"), fault);
    }
    println!("{cycles} cycles, {faults} faults");
    drop(node);
}
