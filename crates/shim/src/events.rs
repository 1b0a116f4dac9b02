// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A sandbox's events as containerd knows them: topic, message and envelope. Pure.
//!
//! containerd docs/runtime-v2.md, "Events"; the `Any` carries the message's bare name.

use std::time::SystemTime;

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::topics;
use containerd_shim_protos::types::mount;
use ids::{ContainerId, Namespace};
use sandbox::{Exit, RootfsMount, TaskEvent};
use serde::Serialize;

/// The envelope of `event`, which happened at `now`.
///
/// # Errors
/// If the message cannot be encoded, which none of these can.
pub(crate) fn envelope(
    namespace: &Namespace,
    event: &TaskEvent,
    now: SystemTime,
) -> Result<Envelope, protobuf::Error> {
    let (topic, event) = message(event)?;
    let mut envelope = Envelope::new();
    envelope.timestamp = MessageField::some(Timestamp::from(now));
    envelope.namespace = namespace.to_string();
    envelope.topic = topic.to_owned();
    envelope.event = MessageField::some(event);
    Ok(envelope)
}

/// The container that `event` is about.
pub(crate) fn container(event: &TaskEvent) -> &ContainerId {
    match event {
        TaskEvent::Created { request, .. } => &request.container,
        TaskEvent::Exited { process, .. } => &process.container,
        TaskEvent::Started { container, .. }
        | TaskEvent::ExecAdded { container, .. }
        | TaskEvent::ExecStarted { container, .. }
        | TaskEvent::OutOfMemory { container }
        | TaskEvent::Paused { container }
        | TaskEvent::Resumed { container }
        | TaskEvent::Deleted { container, .. } => container,
    }
}

/// An event for the operator: a JSON object on one line, with containerd's topic and names.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: &'a str,
    topic: &'static str,
    container_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exec_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<u32>,
}

/// `event`, which happened at `timestamp`, for the operator.
///
/// # Errors
/// If it cannot be encoded, which none of these can.
pub(crate) fn line(event: &TaskEvent, timestamp: &str) -> serde_json::Result<String> {
    let (topic, exec, pid, exit) = match event {
        TaskEvent::Created { pid, .. } => (topics::TASK_CREATE_EVENT_TOPIC, None, Some(pid), None),
        TaskEvent::Started { pid, .. } => (topics::TASK_START_EVENT_TOPIC, None, Some(pid), None),
        TaskEvent::ExecAdded { exec, .. } => {
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, Some(exec), None, None)
        }
        TaskEvent::ExecStarted { exec, pid, .. } => (
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Some(exec),
            Some(pid),
            None,
        ),
        TaskEvent::OutOfMemory { .. } => (topics::TASK_OOM_EVENT_TOPIC, None, None, None),
        TaskEvent::Paused { .. } => (topics::TASK_PAUSED_EVENT_TOPIC, None, None, None),
        TaskEvent::Resumed { .. } => (topics::TASK_RESUMED_EVENT_TOPIC, None, None, None),
        TaskEvent::Exited { process, pid, exit } => (
            topics::TASK_EXIT_EVENT_TOPIC,
            process.exec.as_ref(),
            Some(pid),
            Some(exit),
        ),
        TaskEvent::Deleted { pid, exit, .. } => {
            (topics::TASK_DELETE_EVENT_TOPIC, None, Some(pid), Some(exit))
        }
    };
    serde_json::to_string(&Line {
        timestamp,
        topic,
        container_id: container(event).as_str(),
        exec_id: exec.map(|exec| exec.as_str()),
        pid: pid.map(|pid| pid.get()),
        exit_status: exit.map(|exit| exit.status),
    })
}

fn message(event: &TaskEvent) -> Result<(&'static str, Any), protobuf::Error> {
    match event {
        TaskEvent::Created { request, pid } => {
            let mut message = task::TaskCreate::new();
            message.container_id = request.container.to_string();
            message.bundle = request.bundle.display().to_string();
            message.rootfs = request.rootfs.iter().map(rootfs_mount).collect();
            let mut io = task::TaskIO::new();
            request.stdio.stdin.clone_into(&mut io.stdin);
            request.stdio.stdout.clone_into(&mut io.stdout);
            request.stdio.stderr.clone_into(&mut io.stderr);
            io.terminal = request.stdio.terminal;
            message.io = MessageField::some(io);
            message.pid = pid.get();
            any(topics::TASK_CREATE_EVENT_TOPIC, &message)
        }
        TaskEvent::Started { container, pid } => {
            let mut message = task::TaskStart::new();
            message.container_id = container.to_string();
            message.pid = pid.get();
            any(topics::TASK_START_EVENT_TOPIC, &message)
        }
        TaskEvent::ExecAdded { container, exec } => {
            let mut message = task::TaskExecAdded::new();
            message.container_id = container.to_string();
            message.exec_id = exec.to_string();
            any(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &message)
        }
        TaskEvent::ExecStarted {
            container,
            exec,
            pid,
        } => {
            let mut message = task::TaskExecStarted::new();
            message.container_id = container.to_string();
            message.exec_id = exec.to_string();
            message.pid = pid.get();
            any(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &message)
        }
        TaskEvent::OutOfMemory { container } => {
            let mut message = task::TaskOOM::new();
            message.container_id = container.to_string();
            any(topics::TASK_OOM_EVENT_TOPIC, &message)
        }
        TaskEvent::Paused { container } => {
            let mut message = task::TaskPaused::new();
            message.container_id = container.to_string();
            any(topics::TASK_PAUSED_EVENT_TOPIC, &message)
        }
        TaskEvent::Resumed { container } => {
            let mut message = task::TaskResumed::new();
            message.container_id = container.to_string();
            any(topics::TASK_RESUMED_EVENT_TOPIC, &message)
        }
        TaskEvent::Exited { process, pid, exit } => {
            let mut message = task::TaskExit::new();
            message.container_id = process.container.to_string();
            message.id = process
                .exec
                .as_ref()
                .map_or_else(|| process.container.to_string(), ToString::to_string);
            message.pid = pid.get();
            message.exit_status = exit.status;
            message.exited_at = exited_at(exit);
            any(topics::TASK_EXIT_EVENT_TOPIC, &message)
        }
        TaskEvent::Deleted {
            container,
            pid,
            exit,
        } => deleted(container, pid.get(), exit),
    }
}

fn deleted(
    container: &ContainerId,
    pid: u32,
    exit: &Exit,
) -> Result<(&'static str, Any), protobuf::Error> {
    let mut message = task::TaskDelete::new();
    message.container_id = container.to_string();
    message.pid = pid;
    message.exit_status = exit.status;
    message.exited_at = exited_at(exit);
    any(topics::TASK_DELETE_EVENT_TOPIC, &message)
}

/// When a process ended, as a message field.
pub(crate) fn exited_at(exit: &Exit) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(exit.at))
}

fn rootfs_mount(mount: &RootfsMount) -> mount::Mount {
    let mut message = mount::Mount::new();
    mount.fs_type.clone_into(&mut message.type_);
    mount.source.clone_into(&mut message.source);
    mount.target.clone_into(&mut message.target);
    mount.options.clone_into(&mut message.options);
    message
}

fn any<M: Message>(
    topic: &'static str,
    message: &M,
) -> Result<(&'static str, Any), protobuf::Error> {
    let name = M::NAME;
    let mut any = Any::new();
    any.type_url = format!("containerd.events.{name}");
    any.value = message.write_to_bytes()?;
    Ok((topic, any))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::Duration;

    use sandbox::{CreateTask, Pid, ProcessId, StdioPaths};

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5)
    }

    fn exit() -> Exit {
        Exit {
            status: 137,
            at: now(),
        }
    }

    fn enveloped<M: Message>(event: &TaskEvent) -> (String, M) {
        let envelope = envelope(&"k8s.io".parse().unwrap(), event, now()).unwrap();
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(
            (envelope.timestamp.seconds, envelope.timestamp.nanos),
            (1_700_000_000, 5)
        );
        assert_eq!(
            envelope.event.type_url,
            format!("containerd.events.{}", M::NAME)
        );
        (
            envelope.topic.clone(),
            M::parse_from_bytes(&envelope.event.value).unwrap(),
        )
    }

    #[test]
    fn create_carries_bundle_rootfs_and_streams() {
        let request = CreateTask {
            container: "c1".parse().unwrap(),
            bundle: PathBuf::from("/b/c1"),
            rootfs: vec![RootfsMount {
                fs_type: "overlay".to_owned(),
                source: "overlay".to_owned(),
                target: String::new(),
                options: vec!["lowerdir=/l".to_owned()],
            }],
            stdio: StdioPaths {
                terminal: true,
                stdin: "/i".to_owned(),
                stdout: "/o".to_owned(),
                stderr: String::new(),
            },
            shell: None,
        };
        let event = TaskEvent::Created {
            request: Arc::new(request),
            pid: Pid::of_host_process(7),
        };
        let (topic, message): (_, task::TaskCreate) = enveloped(&event);
        assert_eq!(topic, "/tasks/create");
        assert_eq!(
            (
                message.container_id.as_str(),
                message.bundle.as_str(),
                message.pid
            ),
            ("c1", "/b/c1", 7)
        );
        assert_eq!(message.rootfs[0].type_, "overlay");
        assert_eq!(message.rootfs[0].options, ["lowerdir=/l"]);
        assert_eq!(
            (
                message.io.stdin.as_str(),
                message.io.stdout.as_str(),
                message.io.terminal
            ),
            ("/i", "/o", true)
        );
    }

    #[test]
    fn exit_of_init_is_named_after_the_container_and_of_an_exec_after_it() {
        let container: ContainerId = "c1".parse().unwrap();
        for (process, id) in [
            (ProcessId::init(container.clone()), "c1"),
            (
                ProcessId::exec(container.clone(), "e1".parse().unwrap()),
                "e1",
            ),
        ] {
            let event = TaskEvent::Exited {
                process,
                pid: Pid::of_host_process(8),
                exit: exit(),
            };
            let (topic, message): (_, task::TaskExit) = enveloped(&event);
            assert_eq!(topic, "/tasks/exit");
            assert_eq!(
                (message.container_id.as_str(), message.id.as_str()),
                ("c1", id)
            );
            assert_eq!(
                (message.pid, message.exit_status, message.exited_at.seconds),
                (8, 137, 1_700_000_000)
            );
        }
    }

    #[test]
    fn other_events_carry_ids_and_numbers() {
        let container: ContainerId = "c1".parse().unwrap();
        let exec: ids::ExecId = "e1".parse().unwrap();
        let pid = Pid::of_host_process(9);
        let (topic, started): (_, task::TaskStart) = enveloped(&TaskEvent::Started {
            container: container.clone(),
            pid,
        });
        assert_eq!(
            (topic.as_str(), started.container_id.as_str(), started.pid),
            ("/tasks/start", "c1", 9)
        );
        let (topic, added): (_, task::TaskExecAdded) = enveloped(&TaskEvent::ExecAdded {
            container: container.clone(),
            exec: exec.clone(),
        });
        assert_eq!(
            (topic.as_str(), added.exec_id.as_str()),
            ("/tasks/exec-added", "e1")
        );
        let (topic, started): (_, task::TaskExecStarted) = enveloped(&TaskEvent::ExecStarted {
            container: container.clone(),
            exec,
            pid,
        });
        assert_eq!(
            (topic.as_str(), started.exec_id.as_str(), started.pid),
            ("/tasks/exec-started", "e1", 9)
        );
        let (topic, oom): (_, task::TaskOOM) = enveloped(&TaskEvent::OutOfMemory {
            container: container.clone(),
        });
        assert_eq!(
            (topic.as_str(), oom.container_id.as_str()),
            ("/tasks/oom", "c1")
        );
        let (topic, paused): (_, task::TaskPaused) = enveloped(&TaskEvent::Paused {
            container: container.clone(),
        });
        assert_eq!(
            (topic.as_str(), paused.container_id.as_str()),
            ("/tasks/paused", "c1")
        );
        let (topic, resumed): (_, task::TaskResumed) = enveloped(&TaskEvent::Resumed {
            container: container.clone(),
        });
        assert_eq!(
            (topic.as_str(), resumed.container_id.as_str()),
            ("/tasks/resumed", "c1")
        );
        let (topic, deleted): (_, task::TaskDelete) = enveloped(&TaskEvent::Deleted {
            container,
            pid,
            exit: exit(),
        });
        assert_eq!(topic, "/tasks/delete");
        assert_eq!(
            (
                deleted.container_id.as_str(),
                deleted.pid,
                deleted.exit_status
            ),
            ("c1", 9, 137)
        );
        assert_eq!((deleted.id.as_str(), deleted.exited_at.nanos), ("", 5));
    }
}
