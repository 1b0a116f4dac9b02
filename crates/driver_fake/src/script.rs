// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What goes wrong, and a record of what was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::DriverErrorKind;
use tokio::sync::watch;

use crate::driver::FAKE_VMM_PID;

/// How a VM boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// The agent dials and says hello.
    Ready,
    /// The driver cannot launch.
    LaunchFails(DriverErrorKind),
    /// The agent never dials.
    Never,
    /// The guest kernel panics: the VM ends, with these last words on its console.
    Panic(String),
    /// The agent is of another release.
    WrongVersion,
    /// The agent dials and says nothing.
    Mute,
}

/// A script for one driver, shared with the test that changes it on the way. Calls are named as in agent.proto;
/// `AttachDisk`, `Launch` and `Resize` name those of the driver.
#[derive(Debug, Clone)]
pub struct Script {
    inner: Arc<Mutex<Inner>>,
    held: watch::Sender<BTreeSet<&'static str>>,
    calls: watch::Sender<Vec<String>>,
}

#[derive(Debug)]
struct Inner {
    boot: Boot,
    refused: BTreeMap<&'static str, (ttrpc::Code, String)>,
    refused_once: BTreeMap<&'static str, (ttrpc::Code, String)>,
    deadly: BTreeSet<&'static str>,
    exits_first: bool,
    refuses_streams: bool,
    guest_memory: (ids::Mib, ids::Mib),
    vmm: u32,
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

impl Script {
    /// Nothing goes wrong.
    pub fn new() -> Self {
        let inner = Inner {
            boot: Boot::Ready,
            refused: BTreeMap::new(),
            refused_once: BTreeMap::new(),
            deadly: BTreeSet::new(),
            exits_first: false,
            refuses_streams: false,
            guest_memory: (ids::Mib(0), ids::Mib(u32::MAX)),
            vmm: FAKE_VMM_PID,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            held: watch::Sender::new(BTreeSet::new()),
            calls: watch::Sender::new(Vec::new()),
        }
    }

    /// VMs boot like this from now on.
    #[must_use]
    pub fn boot(self, boot: Boot) -> Self {
        self.lock().boot = boot;
        self
    }

    /// VMs say that the process with this pid is their VMM.
    #[must_use]
    pub fn vmm(self, pid: u32) -> Self {
        self.lock().vmm = pid;
        self
    }

    /// The agent refuses `method`.
    pub fn refuse(&self, method: &'static str, code: ttrpc::Code, message: &str) {
        self.lock()
            .refused
            .insert(method, (code, message.to_owned()));
    }

    /// The agent refuses the next call of `method`.
    pub fn refuse_once(&self, method: &'static str, code: ttrpc::Code, message: &str) {
        self.lock()
            .refused_once
            .insert(method, (code, message.to_owned()));
    }

    /// `method` does not go on until it is released.
    pub fn hold(&self, method: &'static str) {
        self.held.send_modify(|held| {
            held.insert(method);
        });
    }

    /// Lets held calls of `method` go on, and later ones not be held.
    pub fn release(&self, method: &'static str) {
        self.held.send_modify(|held| {
            held.remove(method);
        });
    }

    /// The VM dies of `method`.
    pub fn die_at(&self, method: &'static str) {
        self.lock().deadly.insert(method);
    }

    /// The end of a program that ends at once is told before its start is answered.
    pub fn exit_before_start_reply(&self) {
        self.lock().exits_first = true;
    }

    /// Whether the guest refuses connections from the host.
    pub fn refuse_streams(&self, refuse: bool) {
        self.lock().refuses_streams = refuse;
    }

    /// The guest gives memory back only down to `least`, and takes it only up to `greatest`, in MiB.
    pub fn hold_memory(&self, least: u32, greatest: u32) {
        self.lock().guest_memory = (ids::Mib(least), ids::Mib(greatest));
    }

    /// Every call so far, in order: the method, and the container or disk that it is about.
    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    /// Waits until a call was made, held or not.
    pub async fn called(&self, call: &str) {
        let mut calls = self.calls.subscribe();
        // The sender is here, so there is no error.
        let _always = calls
            .wait_for(|calls| calls.iter().any(|made| made == call))
            .await;
    }

    pub(crate) fn how_to_boot(&self) -> Boot {
        self.lock().boot.clone()
    }

    pub(crate) fn exits_first(&self) -> bool {
        self.lock().exits_first
    }

    pub(crate) fn refuses_streams(&self) -> bool {
        self.lock().refuses_streams
    }

    pub(crate) fn vmm_pid(&self) -> u32 {
        self.lock().vmm
    }

    pub(crate) fn guest_memory(&self) -> (ids::Mib, ids::Mib) {
        self.lock().guest_memory
    }

    pub(crate) fn is_deadly(&self, method: &str) -> bool {
        self.lock().deadly.contains(method)
    }

    pub(crate) fn refusal(&self, method: &str) -> Option<(ttrpc::Code, String)> {
        let mut inner = self.lock();
        let once = inner.refused_once.remove(method);
        once.or_else(|| inner.refused.get(method).cloned())
    }

    /// Records a call, and waits while it is held.
    pub(crate) async fn enter(&self, method: &str, object: &str) {
        let call = if object.is_empty() {
            method.to_owned()
        } else {
            format!("{method} {object}")
        };
        self.calls.send_modify(|calls| calls.push(call));
        let mut held = self.held.subscribe();
        let _always = held.wait_for(|held| !held.contains(method)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
