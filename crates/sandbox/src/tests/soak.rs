// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pods on several threads, with everything at once and faults at random: whatever happens, every call is answered, events
//! keep their grammar, and nothing is left.

use std::collections::BTreeMap;
use std::sync::Arc;

use driver_fake::{Boot, Script};
use hypervisor::VmExit;
use tokio::time::timeout;

use super::pod::{Known, LONG, Pod, exec, init};

/// Marsaglia's xorshift: the runs are the same each time, as far as the threads are.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

const CONTAINERS: [&str; 3] = ["a", "b", "c"];

/// One client that asks for this and that.
async fn client(pod: Arc<Pod>, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..60 {
        let id = CONTAINERS[usize::try_from(random.below(3)).unwrap()];
        let probe = exec(id, if random.below(2) == 0 { "x" } else { "y" });
        let args: &[&str] = match random.below(3) {
            0 => &["exit", "1"],
            1 => &["sleep"],
            _ => &["oom"],
        };
        // Most of these are refused, and all are answered.
        match random.below(12) {
            0..=2 => drop(pod.sandbox.create(Pod::task(id)).await),
            3 | 4 => drop(pod.start(&init(id)).await),
            5 | 6 => drop(pod.exec(&probe, args).await),
            7 => drop(pod.kill(&init(id), 9).await),
            8 => drop(pod.kill(&probe, 15).await),
            9 => drop(pod.delete(&init(id)).await),
            10 => drop(pod.delete(&probe).await),
            _ => {
                drop(pod.sandbox.state(init(id)).await);
                drop(pod.sandbox.pids(id.parse().unwrap()).await);
                drop(pod.sandbox.dump().await);
            }
        }
    }
}

/// The order of events within each container, and one exit for each start.
fn check(events: &[String]) {
    let mut live: BTreeMap<&str, bool> = BTreeMap::new();
    for event in events {
        let mut words = event.split(' ');
        let (verb, name) = (words.next().unwrap(), words.next().unwrap());
        let container = name.split('/').next().unwrap();
        match verb {
            "created" => assert_eq!(live.insert(name, true), None, "{events:?}"),
            "deleted" => {
                assert_eq!(live.remove(name), Some(false), "{events:?}");
                live.retain(|other, _| !other.starts_with(&format!("{name}/")));
            }
            "started" if name.contains('/') => {
                assert_eq!(live.get(container), Some(&true), "{events:?}");
                assert_ne!(live.insert(name, true), Some(true), "{events:?}");
            }
            "exited" => {
                assert_eq!(live.insert(name, false), Some(true), "{events:?}");
                if !name.contains('/') {
                    let execs = format!("{name}/");
                    let left = live
                        .iter()
                        .any(|(other, live)| *live && other.starts_with(&execs));
                    assert!(!left, "an exec outlives its init: {events:?}");
                }
            }
            _ => assert_eq!(live.get(container), Some(&true), "{event}: {events:?}"),
        }
    }
    assert!(
        live.values().all(|live| !live),
        "somebody lives: {events:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_at_once_with_faults_leaves_nothing() {
    let mut exits = 0;
    for round in 1..=60 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(round));
        let boot = match random.below(10) {
            0 => Boot::Panic("Kernel panic\n".to_owned()),
            _ => Boot::Ready,
        };
        let script = Script::new().boot(boot);
        if random.below(2) == 0 {
            script.exit_before_start_reply();
        }
        match random.below(6) {
            0 => script.die_at("CreateContainer"),
            1 => script.die_at("StartExec"),
            2 => script.refuse("StartContainer", ttrpc::Code::INTERNAL, "no"),
            3 => script.refuse("AttachDisk", ttrpc::Code::INTERNAL, "no"),
            _ => {}
        }
        let pod = Arc::new(Pod::new(&script));
        for id in CONTAINERS {
            let program = match random.below(3) {
                0 => vec!["exit", "2"],
                1 => vec!["oom"],
                _ => vec!["sleep"],
            };
            pod.know(id, Known::Guest(program, vec!["layer"]));
        }
        if random.below(4) != 0 {
            // Keeps the VM while its members come and go.
            drop(pod.create_as("pod", Known::Sandbox).await);
        }
        let clients: Vec<_> = (0..4)
            .map(|number| tokio::spawn(client(Arc::clone(&pod), random.0 ^ (number + 1))))
            .collect();
        if random.below(3) == 0 {
            // The clients may have emptied the pod, and so ended it, before it came that far.
            drop(timeout(LONG, script.called("Launch")).await);
            for vm in pod.driver.vms() {
                vm.die(VmExit::Signal(9));
            }
        }
        if random.below(3) == 0 {
            pod.sandbox.terminate().await;
        }
        for client in clients {
            client.await.unwrap();
        }
        pod.sandbox.terminate().await;
        pod.sandbox.ended().await;
        let events = pod.events();
        check(&events);
        exits += events.iter().filter(|e| e.starts_with("exited")).count();
        pod.plans_are_undone().await;
    }
    assert!(exits > 60, "only {exits} processes came that far");
}
