// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Network namespaces that last as long as a test.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace; it goes with the value, and what is in it.
pub(crate) struct Namespace(File);

/// Whether the tests can run; says so if not.
pub(crate) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Where it is found.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.0.as_raw_fd()
        ))
    }

    /// Runs `work` on a thread in it.
    pub(crate) fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.0.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    /// Runs a program in it; its output.
    pub(crate) fn run(&self, program: &str, arguments: &str) -> String {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .arg(format!("--net={}", self.path().display()))
            .arg(program);
        let output = nsenter.args(arguments.split_whitespace()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `ip` in it.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.run("ip", arguments)
    }

    /// Moves an interface to another one.
    pub(crate) fn give(&self, interface: &str, other: &Self) {
        self.ip(&format!(
            "link set {interface} netns {}",
            other.path().display()
        ));
    }

    /// Writes a file of `/proc/sys/net`, which shows the writer's namespace.
    pub(crate) fn write(&self, path: &'static str, text: &'static str) {
        self.inside(move || std::fs::write(path, text).unwrap());
    }
}
