// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The node's processes, from `/proc`.

use std::collections::BTreeMap;
use std::fs;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// The program's name, at most 15 bytes of it.
    pub(crate) name: String,
    /// Its parent.
    pub(crate) parent: i32,
}

/// All processes but the kernel's own, by id.
pub(crate) fn all() -> BTreeMap<i32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter_map(|id| Some((id, read(id)?)))
        .filter(|(id, process)| *id != 2 && process.parent != 2)
        .collect()
}

fn read(id: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (head, tail) = stat.rsplit_once(") ")?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = tail.split(' ');
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    // A zombie whose parent will reap it is on its way out.
    (state != "X").then_some(Process { name, parent })
}

/// The ids of the processes whose name begins with `name` (the kernel keeps 15 bytes of it).
pub fn named(name: &str) -> Vec<i32> {
    let short: String = name.chars().take(15).collect();
    all()
        .into_iter()
        .filter(|(_, process)| process.name == short)
        .map(|(id, _)| id)
        .collect()
}

/// The same, of those that were called with `verb` as their last argument.
pub fn running(name: &str, verb: &str) -> Vec<i32> {
    let verb = format!("\0{verb}\0");
    let is_called = |id: &i32| {
        fs::read(format!("/proc/{id}/cmdline")).is_ok_and(|line| line.ends_with(verb.as_bytes()))
    };
    named(name).into_iter().filter(is_called).collect()
}

/// The same as [`named`], among the children of `parent`.
pub fn children_named(parent: i32, name: &str) -> Vec<i32> {
    let short: String = name.chars().take(15).collect();
    let is_child = |process: &Process| process.parent == parent && process.name == short;
    all()
        .into_iter()
        .filter(|(_, process)| is_child(process))
        .map(|(id, _)| id)
        .collect()
}

/// The parent of a process, if it is there.
pub fn parent_of(id: i32) -> Option<i32> {
    read(id).map(|process| process.parent)
}

/// Whether there is such a process.
pub fn process_exists(id: i32) -> bool {
    read(id).is_some()
}
