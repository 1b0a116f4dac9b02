// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Random inputs, the guest's lies included, never break the grammar and leave no ticket open.

use ids::Generation;
use proptest::prelude::*;

use super::world::{World, exit};
use crate::{Input, ProcessId};

#[derive(Debug, Clone)]
enum Step {
    Create(ProcessId),
    AddExec(ProcessId),
    Start(ProcessId),
    Wait(ProcessId),
    Kill(ProcessId, u32),
    Delete(ProcessId),
    Pause(ProcessId),
    Resume(ProcessId),
    Finish(prop::sample::Index, bool),
    Exited(ProcessId, u64),
    Ends(ProcessId),
    OutOfMemory(ProcessId),
    VmGone,
}

fn container() -> impl Strategy<Value = ProcessId> {
    prop_oneof![Just("a"), Just("b")].prop_map(|id| ProcessId::init(id.parse().unwrap()))
}

fn exec() -> impl Strategy<Value = ProcessId> {
    (container(), prop_oneof![Just("x"), Just("y")])
        .prop_map(|(init, exec)| ProcessId::exec(init.container, exec.parse().unwrap()))
}

fn process() -> impl Strategy<Value = ProcessId> {
    prop_oneof![container(), exec()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        60 => container().prop_map(Step::Create),
        60 => exec().prop_map(Step::AddExec),
        100 => process().prop_map(Step::Start),
        20 => process().prop_map(Step::Wait),
        40 => (process(), prop_oneof![Just(0), Just(9), Just(15), Just(17), Just(65)])
            .prop_map(|(id, signal)| Step::Kill(id, signal)),
        60 => process().prop_map(Step::Delete),
        60 => container().prop_map(Step::Pause),
        40 => container().prop_map(Step::Resume),
        180 => (any::<prop::sample::Index>(), prop::bool::weighted(0.85))
            .prop_map(|(index, succeeds)| Step::Finish(index, succeeds)),
        20 => (process(), 0..30u64).prop_map(|(id, generation)| Step::Exited(id, generation)),
        60 => process().prop_map(Step::Ends),
        20 => container().prop_map(Step::OutOfMemory),
        1 => Just(Step::VmGone),
    ]
}

fn run(world: &mut World, step: Step) {
    match step {
        Step::Create(id) => drop(world.create(&id)),
        Step::AddExec(id) => drop(world.add_exec(&id)),
        Step::Start(id) => drop(world.start(&id)),
        Step::Wait(id) => drop(world.wait(&id)),
        Step::Kill(id, signal) => drop(world.kill(&id, signal)),
        Step::Delete(id) => drop(world.delete(&id)),
        Step::Pause(id) => drop(world.pause(&id)),
        Step::Resume(id) => drop(world.resume(&id)),
        Step::Finish(index, succeeds) => {
            if !world.work.is_empty() {
                world.finish(index.index(world.work.len()), succeeds);
            }
        }
        Step::Exited(process, generation) => {
            let lie = Input::Exited {
                process,
                generation: Generation(generation),
                exit: exit(3),
            };
            world.feed(lie).unwrap();
        }
        Step::Ends(id) => world.ends(&id, 4),
        Step::OutOfMemory(id) => drop(world.feed(Input::OutOfMemory(id.container))),
        Step::VmGone => drop(world.feed(Input::VmGone)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_inputs_keep_the_grammar(
        steps in prop::collection::vec(step(), 1..80),
        role_is_sandbox in prop::bool::weighted(0.2),
    ) {
        let mut world = World::with_role(role_is_sandbox);
        for step in steps {
            run(&mut world, step);
        }
        world.wind_up();
    }
}
