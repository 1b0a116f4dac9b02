// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers by `ctr`, as a person would run them.

use std::collections::HashMap;

use crate::command::{Output, eventually, run, run_with_input, spawn};
use crate::{BUSYBOX, RUNTIME};

/// A container that runs in the background, removed at the end.
#[derive(Debug)]
pub struct Container {
    id: String,
}

impl Container {
    /// Starts a container of the busybox image.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(id: &str, command: &[&str]) -> Self {
        Self::start_image(id, BUSYBOX, &[], command)
    }

    /// Starts a container of an image, with options for `ctr run`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_image(id: &str, image: &str, options: &[&str], command: &[&str]) -> Self {
        let container = Self { id: id.to_owned() };
        let mut arguments = vec!["run", "--detach", "--runtime", RUNTIME];
        arguments.extend(options);
        arguments.extend([image, id]);
        arguments.extend(command);
        run("ctr", &arguments).success();
        container
    }

    /// Runs a container of the busybox image to its end and removes it.
    pub fn run(id: &str, command: &[&str]) -> Output {
        Self::run_image(id, BUSYBOX, &[], command)
    }

    /// Runs a container of an image to its end and removes it, with options for `ctr run`.
    pub fn run_image(id: &str, image: &str, options: &[&str], command: &[&str]) -> Output {
        Self::run_with_input(id, image, options, command, b"")
    }

    /// The same with `input` on its stdin.
    pub fn run_with_input(
        id: &str,
        image: &str,
        options: &[&str],
        command: &[&str],
        input: &[u8],
    ) -> Output {
        let mut arguments = vec!["run", "--rm", "--runtime", RUNTIME];
        arguments.extend(options);
        arguments.extend([image, id]);
        arguments.extend(command);
        run_with_input("ctr", &arguments, input)
    }

    /// Runs a further process in it.
    pub fn exec(&self, exec_id: &str, command: &[&str]) -> Output {
        let mut arguments = vec!["task", "exec", "--exec-id", exec_id, &self.id];
        arguments.extend(command);
        run("ctr", &arguments)
    }

    /// Starts a further process in it, with piped output.
    pub fn spawn_exec(&self, exec_id: &str, command: &[&str]) -> std::process::Child {
        let mut arguments = vec!["task", "exec", "--exec-id", exec_id, &self.id];
        arguments.extend(command);
        spawn("ctr", &arguments)
    }

    /// Sends a signal to its init.
    pub fn kill(&self, signal: &str) -> Output {
        run("ctr", &["task", "kill", "--signal", signal, &self.id])
    }

    /// Freezes it.
    pub fn pause(&self) -> Output {
        run("ctr", &["task", "pause", &self.id])
    }

    /// Has it go on.
    pub fn resume(&self) -> Output {
        run("ctr", &["task", "resume", &self.id])
    }

    /// What it uses; see [`metrics`].
    ///
    /// # Panics
    /// If containerd cannot say.
    pub fn metrics(&self) -> HashMap<String, u64> {
        metrics("default", &self.id)
    }

    /// What containerd says of its task: "RUNNING", "PAUSED", "STOPPED", or nothing.
    pub fn status(&self) -> Option<String> {
        let tasks = run("ctr", &["task", "ls"]).stdout;
        let line = tasks
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// Waits until containerd says that its task has ended.
    ///
    /// # Panics
    /// If it does not in time.
    pub fn wait_stopped(&self) {
        eventually(&format!("{} stops", self.id), || {
            (self.status().is_none_or(|status| status == "STOPPED")).then_some(())
        });
    }

    /// Deletes the task of a container that has ended, and gives the exit code that containerd reports: `ctr` itself only
    /// warns of one that is not 0.
    ///
    /// # Panics
    /// If the task cannot be deleted.
    pub fn delete_task(&self) -> i32 {
        let output = run("ctr", &["task", "delete", &self.id]);
        assert_eq!(output.code, 0, "{output:?}");
        let Some((_, code)) = output.stderr.split_once("non-zero exit code ") else {
            return 0;
        };
        let digits: String = code.chars().take_while(char::is_ascii_digit).collect();
        digits
            .parse()
            .unwrap_or_else(|_| panic!("no exit code in {output:?}"))
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        run("ctr", &["task", "kill", "--signal", "SIGKILL", &self.id]);
        run("ctr", &["task", "delete", "--force", &self.id]);
        run("ctr", &["container", "delete", &self.id]);
    }
}

/// What `ctr task metrics` says of a task in a namespace of containerd: "cpu.usage_usec", "memory.usage",
/// "pids.current" and so on. A guest that has been too busy to answer in the time that figures may take is asked again.
///
/// # Panics
/// If containerd cannot say.
pub fn metrics(namespace: &str, id: &str) -> HashMap<String, u64> {
    let table = eventually("the guest says what it uses", || {
        let output = run("ctr", &["-n", namespace, "task", "metrics", id]);
        (!output.stderr.contains("no metrics received")).then_some(output)
    });
    let table = table.success();
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    table.stdout.lines().filter_map(line).collect()
}
