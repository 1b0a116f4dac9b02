// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Network namespaces that last as long as a test, set up with `ip` and `tc` as a CNI plugin would. For tests alone.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "support of tests, which panics where a test would"
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace; it goes with the value, and all that is in it.
#[derive(Debug)]
pub struct Namespace(File);

/// Whether the machine lets tests make namespaces; says so if not.
#[must_use]
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

impl Namespace {
    /// An empty one, with loopback down.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "it makes something in the kernel"
    )]
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Where it is found as long as the value lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs `work` on a thread in it.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.0.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    /// Runs a program in it; its output.
    #[must_use]
    pub fn run(&self, program: &str, arguments: &str) -> String {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .arg(format!("--net={}", self.path().display()))
            .arg(program);
        let output = nsenter.args(arguments.split_whitespace()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `ip` in it; its output.
    #[expect(clippy::must_use_candidate, reason = "most commands have no output")]
    pub fn ip(&self, arguments: &str) -> String {
        self.run("ip", arguments)
    }

    /// Moves an interface to another one.
    pub fn give(&self, interface: &str, other: &Self) {
        let target = other.path();
        self.ip(&format!("link set {interface} netns {}", target.display()));
    }

    /// Writes a file of `/proc/sys/net`, which is that of the writer's namespace.
    pub fn write(&self, path: &'static str, text: &'static str) {
        self.inside(move || std::fs::write(path, text).unwrap());
    }
}
