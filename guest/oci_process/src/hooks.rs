// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The hooks of a spec. Only `startContainer` hooks name programs that exist here, in the container; the programs of all
//! others are on the node, so a spec that still has them is refused.

use std::ffi::CString;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::Error;

/// Refuses hooks whose programs are on the node.
///
/// # Errors
/// [`Error::Unsupported`].
pub(crate) fn check(hooks: &Hooks) -> Result<(), Error> {
    let prestart = hooks.prestart();
    for (name, list) in [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(Error::Unsupported {
                field: format!("hooks.{name}"),
                hint: "the hook's program is on the node, not in the guest; only startContainer hooks run inside a microVM",
            });
        }
    }
    Ok(())
}

/// Runs the `startContainer` hooks one after the other, with the container's state on their standard input.
///
/// # Errors
/// [`Error::Hook`] for the first that fails; the container's program is then not run.
pub(crate) fn run_start_container(
    spec: &Spec,
    id: &str,
    environment: &[CString],
) -> Result<(), Error> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.start_container().as_deref());
    // Inside its pid namespace the process is 1 (or what it is there).
    let state = serde_json::json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": spec.annotations(),
    })
    .to_string();
    hooks
        .unwrap_or_default()
        .iter()
        .try_for_each(|hook| run(hook, &state, environment))
}

fn run(hook: &Hook, state: &str, environment: &[CString]) -> Result<(), Error> {
    let failed = |problem: String| Error::Hook {
        name: "startContainer",
        path: hook.path().display().to_string(),
        problem,
    };
    let mut command = Command::new(hook.path());
    let arguments = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    let inherited = environment.iter().map(|entry| entry.as_bytes());
    let own = hook.env().iter().flatten().map(|entry| entry.as_bytes());
    let entries: Vec<&[u8]> = match hook.env() {
        Some(_) => own.collect(),
        None => inherited.collect(),
    };
    for entry in entries {
        let mut parts = entry.splitn(2, |byte| *byte == b'=');
        if let (Some(key), Some(value)) = (parts.next(), parts.next()) {
            command.env(
                std::ffi::OsStr::from_bytes(key),
                std::ffi::OsStr::from_bytes(value),
            );
        }
    }
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    if let Some(mut input) = child.stdin.take() {
        // A hook may well not read its input.
        let _ = input.write_all(state.as_bytes());
    }
    let seconds = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    if !ends_within(&child, seconds.map(Duration::from_secs)) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed(format!(
            "has not ended after {} s",
            seconds.unwrap_or(0)
        )));
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    if status.success() {
        Ok(())
    } else {
        Err(failed(format!("ended with {status}")))
    }
}

fn ends_within(child: &Child, limit: Option<Duration>) -> bool {
    let Some(limit) = limit else {
        return true;
    };
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(pidfd) = pidfd else {
        return true;
    };
    let limit = Timespec::try_from(limit).ok();
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    poll(&mut polled, limit.as_ref()) != Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(hook: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion": "1.1.0", "hooks": {{"startContainer": [{hook}]}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn hook_that_fails_is_named_with_its_status() {
        run_start_container(&spec(r#"{"path": "/bin/true"}"#), "c", &[]).unwrap();
        let error = run_start_container(&spec(r#"{"path": "/bin/false"}"#), "c", &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "startContainer hook /bin/false: ended with exit status: 1"
        );
    }

    #[test]
    fn hook_past_its_timeout_is_ended() {
        let hook = r#"{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}"#;
        let error = run_start_container(&spec(hook), "c", &[]).unwrap_err();
        assert!(
            error.to_string().ends_with("has not ended after 1 s"),
            "{error}"
        );
    }

    #[test]
    fn hook_reads_the_state() {
        let hook = r#"{"path": "/bin/grep", "args": ["grep", "-q", "\"id\":\"web\""]}"#;
        run_start_container(&spec(hook), "web", &[]).unwrap();
        run_start_container(&spec(hook), "other", &[]).unwrap_err();
    }

    #[test]
    fn hooks_of_the_node_are_refused() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.1.0", "hooks": {"createRuntime": [{"path": "/x"}]}}"#,
        )
        .unwrap();
        let error = check(spec.hooks().as_ref().unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("hooks.createRuntime: "), "{error}");
    }
}
