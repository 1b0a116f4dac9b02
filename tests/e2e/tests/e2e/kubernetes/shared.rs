// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What several cases share: made by the first of them that runs, torn down and audited after the last.
//!
//! A case that fails takes it along, so that what it has broken fails no other; the next one makes it anew. If it cannot be
//! made, every case fails at once with the reason.

use std::any::Any;
use std::collections::BTreeSet;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::{env, thread};

use e2e::Node;

/// Something that the cases of one module share, in a `static`.
pub(crate) struct Shared<T: 'static> {
    make: fn() -> T,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// The value, and the hold on the node from before it was made. In this order: the node's audit is the last.
    made: Option<(T, Node)>,
    /// Why it cannot be made.
    failure: Option<String>,
    /// The cases that have not ended yet.
    left: Option<BTreeSet<String>>,
}

impl<T> Shared<T> {
    pub(crate) const fn new(make: fn() -> T) -> Self {
        Self {
            make,
            state: Mutex::new(State {
                made: None,
                failure: None,
                left: None,
            }),
        }
    }

    /// Begins a case; its end is that of the returned value.
    pub(crate) fn case(&'static self) -> Case<T> {
        // libtest names a test's thread as the test.
        let name = thread::current().name().unwrap_or_default().to_owned();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.left.get_or_insert_with(|| cases_beside(&name));
        assert_eq!(
            state.failure, None,
            "what the cases of this file share cannot be made"
        );
        if let Some((_, node)) = &mut state.made {
            node.hand_to(&name);
        } else {
            let node = Node::new(&name);
            match catch_unwind(AssertUnwindSafe(self.make)) {
                Ok(value) => state.made = Some((value, node)),
                Err(panic) => {
                    state.failure = Some(message(panic.as_ref()));
                    drop(state);
                    // Drops the node while panicking: it keeps the logs.
                    resume_unwind(panic);
                }
            }
        }
        Case { state, name }
    }
}

/// One case's hold on what is shared.
pub(crate) struct Case<T: 'static> {
    state: MutexGuard<'static, State<T>>,
    name: String,
}

impl<T> Case<T> {
    /// The node that it is on.
    pub(crate) fn node(&self) -> &Node {
        let (_, node) = self.state.made.as_ref().unwrap();
        node
    }
}

impl<T> Deref for Case<T> {
    type Target = T;

    fn deref(&self) -> &T {
        let (value, _) = self.state.made.as_ref().unwrap();
        value
    }
}

impl<T> Drop for Case<T> {
    fn drop(&mut self) {
        let left = self.state.left.as_mut().unwrap();
        left.remove(&self.name);
        if left.is_empty() || thread::panicking() {
            let (value, node) = self.state.made.take().unwrap();
            drop(value);
            drop(node);
        }
    }
}

/// The tests of this run that are in the same module as `name`.
fn cases_beside(name: &str) -> BTreeSet<String> {
    static OF_THIS_RUN: OnceLock<String> = OnceLock::new();
    let listed = OF_THIS_RUN.get_or_init(|| {
        let program = env::current_exe().unwrap();
        let mut list = Command::new(program);
        list.args(env::args_os().skip(1))
            .args(["--list", "--format", "terse"]);
        String::from_utf8(list.output().unwrap().stdout).unwrap()
    });
    let module = |name: &str| name.rsplit_once("::").map(|(module, _)| module.to_owned());
    let beside = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|other| module(other) == module(name));
    beside.map(str::to_owned).collect()
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}
