// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The node that a test runs on, from before the test to the audit after it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::audit::Audit;
use crate::command::{self, DEADLINE};
use crate::watchdog::Watchdog;

/// Coffer's config file on the node.
const CONFIG: &str = "/etc/coffer/config.toml";

/// Where containerd writes its log on the node, and with it that of every shim.
const CONTAINERD_LOG: &str = "/run/containerd.log";

/// One test's hold on the node. Its end is the audit: the test fails if anything is left that was not there before.
#[derive(Debug)]
pub struct Node {
    test: String,
    before: Audit,
    log_at_start: usize,
    watchdog: Watchdog,
}

impl Node {
    /// Takes the node for a test.
    ///
    /// # Panics
    /// Outside a node.
    pub fn new(test: &str) -> Self {
        assert!(
            std::env::var_os("COFFER_E2E").is_some(),
            "the end-to-end tests run in a node: use `cargo xtask test`"
        );
        let log_at_start = log_len();
        Self {
            test: test.to_owned(),
            before: Audit::take(),
            log_at_start,
            watchdog: Watchdog::new(test),
        }
    }

    /// Takes the node for a further test without an audit in between: what is made for several tests goes with the last.
    pub fn hand_to(&mut self, test: &str) {
        assert!(!self.watchdog.call_off(), "{} hung", self.test);
        self.watchdog = Watchdog::new(test);
        test.clone_into(&mut self.test);
        self.log_at_start = log_len();
    }

    /// What containerd and the shims have logged since the test began.
    pub fn log(&self) -> String {
        let log = fs::read(CONTAINERD_LOG).unwrap_or_default();
        String::from_utf8_lossy(log.get(self.log_at_start..).unwrap_or_default()).into_owned()
    }

    /// Writes another config for Coffer until the value is dropped.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn change_config(&self, text: &str) -> ConfigChange {
        let original = fs::read(CONFIG).ok();
        fs::write(CONFIG, text).expect("write Coffer's config");
        ConfigChange { original }
    }

    fn keep_logs(&self) {
        let Some(artifacts) = std::env::var_os("COFFER_E2E_ARTIFACTS") else {
            return;
        };
        let directory = PathBuf::from(artifacts).join(&self.test);
        if let Err(error) = fs::create_dir_all(&directory) {
            eprintln!("logs of {} are not kept: {error}", self.test);
            return;
        }
        let write = |name: &str, text: String| {
            if let Err(error) = fs::write(directory.join(name), text) {
                eprintln!("{name} of {} is not kept: {error}", self.test);
            }
        };
        write("containerd-and-shims.log", self.log());
        write("node-kernel.log", command::run("dmesg", &[]).stdout);
        keep_folder(Path::new("/run/coffer"), &directory.join("run-coffer"));
    }
}

fn log_len() -> usize {
    let len = fs::metadata(CONTAINERD_LOG).map_or(0, |log| log.len());
    usize::try_from(len).unwrap_or(0)
}

fn keep_folder(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            keep_folder(&entry.path(), &target);
        } else if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            // Best effort: this runs while a test is failing.
            let _ = fs::create_dir_all(to).and_then(|()| fs::copy(entry.path(), target).map(drop));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let hung = self.watchdog.call_off();
        if std::thread::panicking() {
            self.keep_logs();
            return;
        }
        assert!(!hung, "{} hung", self.test);
        // What has just been killed may take a moment to go.
        let deadline = Instant::now() + DEADLINE / 3;
        loop {
            let left = Audit::take().left_since(&self.before);
            if left.is_empty() {
                return;
            }
            if Instant::now() > deadline {
                self.keep_logs();
                panic!("{} left behind:\n{}", self.test, left.join("\n"));
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

/// Another config for Coffer, until it is dropped.
#[derive(Debug)]
pub struct ConfigChange {
    original: Option<Vec<u8>>,
}

impl Drop for ConfigChange {
    fn drop(&mut self) {
        let restored = match &self.original {
            Some(bytes) => fs::write(CONFIG, bytes),
            None => fs::remove_file(CONFIG),
        };
        if let Err(error) = restored {
            eprintln!("Coffer's config is not restored: {error}");
        }
    }
}
