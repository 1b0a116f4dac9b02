// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Explores every order in which one container with one exec can be asked for, worked on, and die.

use std::collections::HashSet;

use super::world::{World, exec, init};
use crate::Input;

/// What can happen once each, at any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Create,
    Start,
    WaitInit,
    AddExec,
    StartExec,
    KillExec,
    KillInit,
    ExecEnds,
    InitEnds,
    OutOfMemory,
    Pause,
    Resume,
    DeleteInit,
    VmGone,
}

const ACTS: [Act; 14] = [
    Act::Create,
    Act::Start,
    Act::WaitInit,
    Act::AddExec,
    Act::StartExec,
    Act::KillExec,
    Act::KillInit,
    Act::ExecEnds,
    Act::InitEnds,
    Act::OutOfMemory,
    Act::Pause,
    Act::Resume,
    Act::DeleteInit,
    Act::VmGone,
];

/// Does `act`, and says whether anything came of it.
fn act(world: &mut World, act: Act) -> bool {
    match act {
        Act::Create => world.create(&init()).is_ok(),
        Act::Start => world.start(&init()).is_ok(),
        Act::WaitInit => world.wait(&init()).is_ok(),
        Act::AddExec => world.add_exec(&exec()).is_ok(),
        Act::StartExec => world.start(&exec()).is_ok(),
        Act::KillExec => world.kill(&exec(), 15).is_ok(),
        Act::KillInit => world.kill(&init(), 15).is_ok(),
        Act::ExecEnds => {
            world.ends(&exec(), 1);
            true
        }
        Act::InitEnds => {
            world.ends(&init(), 2);
            true
        }
        Act::OutOfMemory => {
            let oom = Input::OutOfMemory(init().container);
            world.feed(oom).unwrap();
            true
        }
        Act::Pause => world.pause(&init()).is_ok(),
        Act::Resume => world.resume(&init()).is_ok(),
        Act::DeleteInit => world.delete(&init()).is_ok(),
        Act::VmGone => {
            world.feed(Input::VmGone).unwrap();
            true
        }
    }
}

fn explore(world: &World, left: &[Act], seen: &mut HashSet<String>) {
    if !seen.insert(format!("{left:?} {world:?}")) {
        return;
    }
    world.clone().wind_up();
    for (at, chosen) in left.iter().enumerate() {
        let mut next = world.clone();
        if act(&mut next, *chosen) {
            let mut left = left.to_vec();
            left.remove(at);
            explore(&next, &left, seen);
        }
    }
    for index in 0..world.work.len() {
        for succeeds in [true, false] {
            let mut next = world.clone();
            next.finish(index, succeeds);
            explore(&next, left, seen);
        }
    }
}

#[test]
fn every_order_keeps_the_grammar_and_answers_everybody() {
    for role_is_sandbox in [false, true] {
        let world = World::with_role(role_is_sandbox);
        let mut seen = HashSet::new();
        explore(&world, &ACTS, &mut seen);
        assert!(seen.len() > 1000, "only {} states", seen.len());
    }
}
