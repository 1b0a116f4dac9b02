// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The rules, one by one.

use super::world::{FAILED, World, at, exec, exit, init};
use crate::{Answer, Denied, DeniedCode, Effect, Event, Exit, Input, Pid, Status};

fn created() -> World {
    let mut world = World::default();
    world.create(&init()).unwrap();
    world.finish_all();
    world
}

fn running() -> World {
    let mut world = created();
    world.start(&init()).unwrap();
    world.finish_all();
    world
}

fn with_exec() -> World {
    let mut world = running();
    world.add_exec(&exec()).unwrap();
    world.start(&exec()).unwrap();
    world
}

fn status(world: &World) -> Option<Status> {
    world.table.view(&init()).map(|view| view.status)
}

fn code<T: std::fmt::Debug>(result: Result<T, Denied>) -> DeniedCode {
    result.unwrap_err().code()
}

#[test]
fn task_goes_from_create_to_delete() {
    let mut world = running();
    assert_eq!(status(&world), Some(Status::Running));
    let wait = world.wait(&init()).unwrap();
    assert!(world.open_tickets.contains(&wait));
    world.ends(&init(), 77);
    assert!(world.open_tickets.is_empty());
    assert_eq!(status(&world), Some(Status::Stopped));
    world.delete(&init()).unwrap();
    world.finish_all();
    assert_eq!(world.exits, [(init(), 77)]);
    world.wind_up();
}

#[test]
fn second_create_is_denied_and_allowed_after_delete() {
    let mut world = created();
    assert_eq!(code(world.create(&init())), DeniedCode::AlreadyExists);
    world.delete(&init()).unwrap();
    world.ends(&init(), 137);
    world.finish_all();
    world.create(&init()).unwrap();
    world.wind_up();
}

#[test]
fn unknown_process_is_not_found() {
    let mut world = running();
    for result in [
        world.start(&exec()),
        world.wait(&exec()),
        world.kill(&exec(), 9),
        world.delete(&exec()),
    ] {
        assert_eq!(code(result), DeniedCode::NotFound);
    }
}

#[test]
fn second_start_is_denied() {
    let mut world = running();
    assert_eq!(code(world.start(&init())), DeniedCode::FailedPrecondition);
    world.ends(&init(), 0);
    assert_eq!(code(world.start(&init())), DeniedCode::FailedPrecondition);
}

#[test]
fn delete_of_running_process_is_denied() {
    let mut world = with_exec();
    assert_eq!(code(world.delete(&exec())), DeniedCode::FailedPrecondition);
    assert_eq!(code(world.delete(&init())), DeniedCode::FailedPrecondition);
}

#[test]
fn kill_after_exit_is_not_found() {
    let mut world = running();
    world.ends(&init(), 0);
    assert_eq!(code(world.kill(&init(), 9)), DeniedCode::NotFound);
}

#[test]
fn kill_of_a_number_that_is_no_signal_is_denied() {
    let mut world = running();
    assert_eq!(code(world.kill(&init(), 65)), DeniedCode::InvalidArgument);
    world.kill(&init(), 64).unwrap();
}

#[test]
fn signal_zero_asks_only_whether_the_process_lives() {
    let mut world = with_exec();
    world.kill(&init(), 0).unwrap();
    world.kill(&exec(), 0).unwrap();
    assert_eq!(world.signals, []);
    assert_eq!(world.open_tickets.len(), 1, "the exec's start");
    world.finish_all();
    world.ends(&init(), 0);
    assert_eq!(code(world.kill(&init(), 0)), DeniedCode::NotFound);
}

#[test]
fn exec_needs_a_running_init() {
    let mut world = created();
    world.add_exec(&exec()).unwrap();
    assert_eq!(code(world.start(&exec())), DeniedCode::FailedPrecondition);
    assert_eq!(
        code(world.kill(&exec(), 9)),
        DeniedCode::FailedPrecondition,
        "it was not started"
    );
    world.ends(&init(), 1);
    assert_eq!(code(world.start(&exec())), DeniedCode::FailedPrecondition);
    assert_eq!(code(world.add_exec(&exec())), DeniedCode::AlreadyExists);
}

#[test]
fn exit_before_start_reply_is_told_after_the_start() {
    let mut world = created();
    world.start(&init()).unwrap();
    world.ends(&init(), 5);
    assert_eq!(world.exits, []);
    assert_eq!(status(&world), Some(Status::Created));
    world.finish_all();
    assert_eq!(world.exits, [(init(), 5)]);
    assert_eq!(status(&world), Some(Status::Stopped));
}

#[test]
fn exit_before_create_reply_is_told_after_the_creation() {
    let mut world = World::default();
    world.create(&init()).unwrap();
    world.ends(&init(), 6);
    world.finish_all();
    assert_eq!(world.exits, [(init(), 6)]);
}

#[test]
fn init_exit_ends_its_execs_first() {
    let mut world = with_exec();
    world.finish_all();
    world.ends(&init(), 0);
    assert_eq!(world.exits, [(exec(), 137), (init(), 0)]);
    world.ends(&exec(), 3);
    assert_eq!(world.exits.len(), 2, "told once");
}

#[test]
fn init_exit_waits_for_an_exec_that_is_being_started() {
    let mut world = with_exec();
    world.ends(&exec(), 3);
    world.ends(&init(), 0);
    assert_eq!(world.exits, []);
    world.finish_all();
    assert_eq!(world.exits, [(exec(), 3), (init(), 0)]);
}

#[test]
fn init_exit_is_told_when_the_exec_start_fails() {
    let mut world = with_exec();
    world.ends(&init(), 0);
    world.finish(0, false);
    assert_eq!(world.exits, [(init(), 0)]);
}

#[test]
fn failed_exec_start_stops_it_without_an_event() {
    let mut world = with_exec();
    let wait = world.wait(&exec()).unwrap();
    world.finish(0, false);
    assert!(!world.open_tickets.contains(&wait));
    let view = world.table.view(&exec()).unwrap();
    assert_eq!(view.status, Status::Stopped);
    assert_eq!(view.exit.unwrap().status, Exit::NEVER_STARTED);
    assert_eq!(world.exits, []);
    world.delete(&exec()).unwrap();
}

#[test]
fn failed_init_start_is_answered_once_init_is_dead() {
    let mut world = created();
    let start = world.start(&init()).unwrap();
    world.finish(0, false);
    assert_eq!(world.signals, [(init(), 9)]);
    assert!(world.open_tickets.contains(&start));
    let view = world.table.view(&init()).unwrap();
    let effects = world
        .feed(Input::Exited {
            process: init(),
            generation: view.generation,
            exit: exit(1),
        })
        .unwrap();
    let failed = Effect::Answer(start, Answer::Failed(FAILED));
    assert_eq!(effects.last(), Some(&failed));
    assert_eq!(status(&world), Some(Status::Stopped));
}

#[test]
fn kill_during_creation_aborts_it() {
    let mut world = World::default();
    let create = world.create(&init()).unwrap();
    let kill = world.kill(&init(), 9).unwrap();
    assert!(!world.open_tickets.contains(&kill), "answered at once");
    world.finish(0, false);
    assert!(!world.open_tickets.contains(&create));
    assert_eq!(status(&world), None);
}

#[test]
fn kill_that_comes_too_late_to_abort_a_creation_kills() {
    let mut world = World::default();
    world.create(&init()).unwrap();
    world.delete(&init()).unwrap();
    world.finish(0, true);
    assert_eq!(world.signals, [(init(), 9)]);
    world.ends(&init(), 137);
    world.finish_all();
    assert_eq!(status(&world), None);
    assert!(world.open_tickets.is_empty());
}

#[test]
fn delete_of_created_task_kills_it_first() {
    let mut world = created();
    let delete = world.delete(&init()).unwrap();
    assert_eq!(world.signals, [(init(), 9)]);
    assert_eq!(code(world.start(&init())), DeniedCode::Aborted);
    world.ends(&init(), 137);
    assert!(world.open_tickets.contains(&delete), "removal is under way");
    world.finish_all();
    assert!(world.open_tickets.is_empty());
}

#[test]
fn repeated_delete_gets_the_same_answer() {
    let mut world = running();
    world.ends(&init(), 4);
    world.delete(&init()).unwrap();
    world.delete(&init()).unwrap();
    world.finish_all();
    let again = world.ticket();
    let effects = world.feed(Input::Delete(init(), again)).unwrap();
    let deleted = Answer::Deleted(Pid::of_host_process(7), exit(4));
    assert_eq!(effects, [Effect::Answer(again, deleted)]);
}

#[test]
fn tombstones_are_few() {
    let mut world = running();
    for number in 0..=crate::MAX_TOMBSTONES {
        let mut id = exec();
        id.exec = Some(format!("e{number}").parse().unwrap());
        world.add_exec(&id).unwrap();
        world.delete(&id).unwrap();
        world.finish_all();
    }
    assert_eq!(world.table.tombstones.len(), crate::MAX_TOMBSTONES);
}

#[test]
fn second_exec_of_a_name_is_not_the_first() {
    let mut world = with_exec();
    world.finish_all();
    let first = world.table.view(&exec()).unwrap().generation;
    world.ends(&exec(), 0);
    world.delete(&exec()).unwrap();
    world.finish_all();
    world.add_exec(&exec()).unwrap();
    world.start(&exec()).unwrap();
    world.finish_all();
    let effects = world.feed(Input::Exited {
        process: exec(),
        generation: first,
        exit: exit(9),
    });
    assert_eq!(effects, Ok(Vec::new()));
    assert_eq!(world.exits, [(exec(), 0)]);
}

#[test]
fn kill_of_an_exec_that_is_being_started_waits_for_it() {
    let mut world = with_exec();
    let kill = world.kill(&exec(), 15).unwrap();
    assert!(world.open_tickets.contains(&kill) && world.signals.is_empty());
    world.finish_all();
    assert_eq!(world.signals, [(exec(), 15)]);
    assert!(!world.open_tickets.contains(&kill));
}

#[test]
fn vm_death_is_137_once_for_everything_that_lives() {
    let mut world = with_exec();
    world.finish_all();
    world.feed(Input::VmGone).unwrap();
    world.feed(Input::VmGone).unwrap();
    assert_eq!(world.exits, [(exec(), 137), (init(), 137)]);
    world.ends(&init(), 0);
    assert_eq!(world.exits.len(), 2);
    assert_eq!(code(world.create(&init())), DeniedCode::AlreadyExists);
    world.delete(&init()).unwrap();
    world.finish_all();
    assert_eq!(code(world.create(&init())), DeniedCode::Unavailable);
}

#[test]
fn vm_death_during_start_answers_and_reports_the_exit() {
    let mut world = created();
    let start = world.start(&init()).unwrap();
    let effects = world.feed(Input::VmGone).unwrap();
    assert!(effects.contains(&Effect::Answer(
        start,
        Answer::Denied(Denied::VmGone(init()))
    )));
    assert_eq!(world.exits, [(init(), 137)]);
    world.finish(0, true);
    assert_eq!(world.exits.len(), 1);
}

#[test]
fn creation_that_outlives_the_vm_ends_at_once() {
    let mut world = World::default();
    world.create(&init()).unwrap();
    world.feed(Input::VmGone).unwrap();
    world.finish(0, true);
    assert_eq!(world.exits, [(init(), 137)]);
}

#[test]
fn oom_is_told_once_and_before_the_exit() {
    let mut world = created();
    world.start(&init()).unwrap();
    let oom = || Input::OutOfMemory(init().container);
    assert_eq!(world.feed(oom()), Ok(Vec::new()), "held until the start");
    world.ends(&init(), 137);
    let view = world.table.view(&init()).unwrap();
    let effects = world
        .feed(Input::Started {
            process: init(),
            generation: view.generation,
            result: Ok(None),
        })
        .unwrap();
    let events: Vec<_> = effects
        .into_iter()
        .filter(|effect| matches!(effect, Effect::Publish(_)))
        .collect();
    let (container, pid) = (init().container, Pid::of_host_process(7));
    assert_eq!(
        events,
        [
            Effect::Publish(Event::Started(container.clone(), pid)),
            Effect::Publish(Event::OutOfMemory(container)),
            Effect::Publish(Event::Exited(init(), pid, exit(137))),
        ]
    );
    assert_eq!(world.feed(oom()), Ok(Vec::new()));
}

#[test]
fn wait_is_answered_at_delete_of_a_process_that_never_ran() {
    let mut world = running();
    world.add_exec(&exec()).unwrap();
    let wait = world.wait(&exec()).unwrap();
    let ticket = world.ticket();
    let effects = world.feed(Input::Delete(exec(), ticket)).unwrap();
    let never = Exit {
        status: Exit::NEVER_STARTED,
        at: at(9),
    };
    assert!(effects.contains(&Effect::Answer(wait, Answer::Exit(never))));
    world.finish_all();
    assert_eq!(world.exits, []);
}

#[test]
fn sandbox_container_ends_by_a_signal_and_takes_the_vm_along() {
    let mut world = World::with_role(true);
    world.create(&init()).unwrap();
    world.finish_all();
    world.start(&init()).unwrap();
    world.finish_all();
    world.kill(&init(), 17).unwrap();
    world.kill(&init(), 0).unwrap();
    assert_eq!(world.exits, [], "SIGCHLD ends nothing");
    world.kill(&init(), 15).unwrap();
    assert_eq!(world.exits, [(init(), 143)]);
    assert!(world.vm_ended);
}

#[test]
fn kill_of_a_sandbox_container_that_is_being_started_answers_the_start() {
    let mut world = World::with_role(true);
    world.create(&init()).unwrap();
    world.finish_all();
    let start = world.start(&init()).unwrap();
    world.kill(&init(), 9).unwrap();
    assert!(!world.open_tickets.contains(&start));
    assert_eq!(world.exits, [(init(), 137)]);
    world.finish_all();
    world.wind_up();
}

#[test]
fn denials_read_as_sentences() {
    assert_eq!(
        Denied::Finished(exec()).to_string(),
        "exec e of container c: process already finished"
    );
    assert_eq!(
        Denied::StillRuns(init()).to_string(),
        "container c still runs: stop it first"
    );
}
