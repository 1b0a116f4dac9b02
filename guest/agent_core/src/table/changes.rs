// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Changes of a container's cgroup: one at a time, and no exec in a frozen one, where it would freeze before it runs.

use ids::ContainerId;

use super::{Phase, ProcessTable, unknown, wrong};
use crate::Error;

impl<G> ProcessTable<G> {
    /// Takes a container for a pause, which [`Self::end_pause`] ends. No exec starts from here on.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::WrongState`] unless the init runs, no exec is being started, and the container is
    /// neither paused nor being changed.
    pub fn begin_pause(&mut self, id: &ContainerId) -> Result<(), Error> {
        let container = self.containers.get_mut(id).ok_or_else(|| unknown(id))?;
        let state = match container.phase {
            _ if container.changing => "is being changed",
            _ if container.frozen => "is paused",
            Phase::Started if container.execs.values().any(|exec| exec.starting) => {
                "is just starting an exec"
            }
            Phase::Started => {
                (container.changing, container.frozen) = (true, true);
                return Ok(());
            }
            _ => "is not running",
        };
        Err(wrong(id, state))
    }

    /// The pause is done, or was not possible.
    pub fn end_pause(&mut self, id: &ContainerId, frozen: bool) {
        if let Some(container) = self.containers.get_mut(id) {
            (container.changing, container.frozen) = (false, frozen);
        }
    }

    /// Takes a container for a change of its cgroup, which [`Self::end_change`] ends.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::WrongState`] for one that has no cgroup or is being changed.
    pub fn begin_change(&mut self, id: &ContainerId) -> Result<(), Error> {
        let container = self.containers.get_mut(id).ok_or_else(|| unknown(id))?;
        let state = match container.phase {
            Phase::Creating => "is still being created",
            Phase::Removing => "is being removed",
            _ if container.changing => "is being changed",
            _ => {
                container.changing = true;
                return Ok(());
            }
        };
        Err(wrong(id, state))
    }

    /// The change is done. `thawed`: the container goes on.
    pub fn end_change(&mut self, id: &ContainerId, thawed: bool) {
        if let Some(container) = self.containers.get_mut(id) {
            container.changing = false;
            container.frozen &= !thawed;
        }
    }
}
