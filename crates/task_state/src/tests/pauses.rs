// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The rules of pausing, one by one.

use super::world::{FAILED, World, exec, init};
use crate::{Answer, Denied, DeniedCode, Effect, Event, Input, Status};

fn running() -> World {
    let mut world = World::default();
    world.create(&init()).unwrap();
    world.finish_all();
    world.start(&init()).unwrap();
    world.finish_all();
    world
}

fn paused() -> World {
    let mut world = running();
    world.pause(&init()).unwrap();
    world.finish_all();
    world
}

fn status(world: &World, id: &crate::ProcessId) -> Status {
    world.table.view(id).unwrap().status
}

fn refused<T: std::fmt::Debug>(result: Result<T, Denied>) -> (DeniedCode, String) {
    let denied = result.unwrap_err();
    (denied.code(), denied.to_string())
}

#[test]
fn paused_task_shows_it_and_goes_on_when_resumed() {
    let mut world = running();
    let pause = world.pause(&init()).unwrap();
    assert_eq!(status(&world, &init()), Status::Pausing);
    assert!(world.open_tickets.contains(&pause), "not frozen yet");
    world.finish_all();
    assert_eq!(status(&world, &init()), Status::Paused);
    let resume = world.resume(&init()).unwrap();
    assert_eq!(status(&world, &init()), Status::Paused);
    assert!(world.open_tickets.contains(&resume));
    world.finish_all();
    assert_eq!(status(&world, &init()), Status::Running);
    assert!(world.open_tickets.is_empty());
    world.wind_up();
}

#[test]
fn pause_and_resume_need_the_other_state() {
    let failed = DeniedCode::FailedPrecondition;
    let mut world = paused();
    let (code, text) = refused(world.pause(&init()));
    assert_eq!(
        (code, text.as_str()),
        (failed, "container c is paused: resume it first")
    );
    world.resume(&init()).unwrap();
    assert_eq!(refused(world.resume(&init())).0, failed, "it is on the way");
    assert_eq!(refused(world.pause(&init())).0, failed, "not resumed yet");
    world.finish_all();
    let (code, text) = refused(world.resume(&init()));
    assert_eq!((code, text.as_str()), (failed, "container c is not paused"));
}

#[test]
fn what_does_not_run_is_not_paused() {
    let mut world = World::default();
    assert_eq!(refused(world.pause(&init())).0, DeniedCode::NotFound);
    assert_eq!(refused(world.resume(&init())).0, DeniedCode::NotFound);
    world.create(&init()).unwrap();
    for _ in 0..2 {
        assert_eq!(
            refused(world.pause(&init())).0,
            DeniedCode::FailedPrecondition
        );
        world.finish_all();
    }
    world.start(&init()).unwrap();
    world.finish_all();
    world.ends(&init(), 0);
    assert_eq!(
        refused(world.pause(&init())).0,
        DeniedCode::FailedPrecondition
    );
}

#[test]
fn sandbox_container_is_not_paused() {
    let mut world = World::with_role(true);
    world.create(&init()).unwrap();
    world.finish_all();
    world.start(&init()).unwrap();
    world.finish_all();
    let (code, text) = refused(world.pause(&init()));
    assert_eq!(code, DeniedCode::FailedPrecondition);
    assert!(text.contains("is the pod's sandbox"), "{text}");
}

#[test]
fn paused_container_takes_no_exec() {
    let mut world = running();
    world.add_exec(&exec()).unwrap();
    world.pause(&init()).unwrap();
    for _ in 0..2 {
        let (code, text) = refused(world.start(&exec()));
        assert_eq!(code, DeniedCode::FailedPrecondition);
        assert_eq!(text, "container c is paused: resume it first");
        world.finish_all();
    }
    world.delete(&exec()).unwrap();
    world.finish_all();
    assert_eq!(
        refused(world.add_exec(&exec())).0,
        DeniedCode::FailedPrecondition
    );
    world.resume(&init()).unwrap();
    world.finish_all();
    world.add_exec(&exec()).unwrap();
    world.start(&exec()).unwrap();
    world.wind_up();
}

#[test]
fn pause_waits_for_an_exec_that_is_being_started() {
    for starts in [true, false] {
        let mut world = running();
        world.add_exec(&exec()).unwrap();
        world.start(&exec()).unwrap();
        world.pause(&init()).unwrap();
        assert_eq!(world.work.len(), 1, "the guest is not asked yet");
        world.finish(0, starts);
        assert_eq!(world.work.len(), 1, "now it is");
        world.finish_all();
        assert_eq!(status(&world, &init()), Status::Paused);
        let expected = if starts {
            Status::Paused
        } else {
            Status::Stopped
        };
        assert_eq!(status(&world, &exec()), expected);
        world.wind_up();
    }
}

#[test]
fn failed_pause_leaves_it_running_and_failed_resume_paused() {
    let mut world = running();
    let ticket = world.pause(&init()).unwrap();
    let generation = world.table.view(&init()).unwrap().generation;
    let container = init().container;
    let effects = world
        .feed(Input::Paused {
            container: container.clone(),
            generation,
            result: Err(FAILED),
        })
        .unwrap();
    assert_eq!(effects, [Effect::Answer(ticket, Answer::Failed(FAILED))]);
    assert_eq!(status(&world, &init()), Status::Running);
    world.work.clear();
    world.pause(&init()).unwrap();
    world.finish_all();
    let ticket = world.resume(&init()).unwrap();
    let effects = world
        .feed(Input::Resumed {
            container,
            generation,
            result: Err(FAILED),
        })
        .unwrap();
    assert_eq!(effects, [Effect::Answer(ticket, Answer::Failed(FAILED))]);
    assert_eq!(status(&world, &init()), Status::Paused);
    world.wind_up();
}

#[test]
fn paused_event_goes_before_the_answer() {
    let mut world = running();
    let ticket = world.pause(&init()).unwrap();
    world.work.clear();
    let container = init().container;
    let effects = world
        .feed(Input::Paused {
            generation: world.table.view(&init()).unwrap().generation,
            container: container.clone(),
            result: Ok(()),
        })
        .unwrap();
    assert_eq!(
        effects,
        [
            Effect::Publish(Event::Paused(container)),
            Effect::Answer(ticket, Answer::Done)
        ]
    );
}

#[test]
fn paused_container_is_killed_like_one_that_runs() {
    let mut world = paused();
    assert_eq!(
        refused(world.delete(&init())).0,
        DeniedCode::FailedPrecondition
    );
    world.kill(&init(), 9).unwrap();
    assert_eq!(world.signals, [(init(), 9)]);
    world.ends(&init(), 137);
    assert_eq!(status(&world, &init()), Status::Stopped);
    assert_eq!(world.exits, [(init(), 137)]);
    world.wind_up();
}

#[test]
fn end_on_the_way_answers_the_pause() {
    let mut world = running();
    let pause = world.pause(&init()).unwrap();
    world.ends(&init(), 1);
    assert!(!world.open_tickets.contains(&pause));
    world.finish_all();
    assert_eq!(status(&world, &init()), Status::Stopped);
    let mut world = paused();
    world.resume(&init()).unwrap();
    world.feed(Input::VmGone).unwrap();
    assert!(world.open_tickets.is_empty());
    assert_eq!(world.exits, [(init(), 137)]);
    world.wind_up();
}
