// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What is asked of a container's cgroup: to freeze, to have other limits, to be measured; and of the guest: to have other
//! hardware.

use agent_proto::api;
use ids::ContainerId;
use oci_spec::runtime::LinuxResources;

use super::Agent;
use crate::Error;
use crate::system::System;

impl<S: System> Agent<S> {
    /// Freezes a container; done once nothing in it runs.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`] unless its init runs, or why it cannot be frozen; it goes on then.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        self.table().begin_pause(id)?;
        let container = id.clone();
        let frozen = self.blocking(move |system| system.freeze(&container)).await;
        self.table().end_pause(id, frozen.is_ok());
        frozen
    }

    /// Lets a container go on, frozen or not.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`] while it is being changed, or why it cannot go on.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), Error> {
        self.table().begin_change(id)?;
        let container = id.clone();
        let thawed = self.blocking(move |system| system.thaw(&container)).await;
        self.table().end_change(id, thawed.is_ok());
        thawed
    }

    /// Sets limits of a container.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`] while it is being changed, or [`Error::Resource`] with nothing changed.
    pub async fn update(&self, id: &ContainerId, resources: LinuxResources) -> Result<(), Error> {
        self.table().begin_change(id)?;
        let container = id.clone();
        let updated = self
            .blocking(move |system| system.update(&container, &resources))
            .await;
        self.table().end_change(id, false);
        updated
    }

    /// Takes what the VM has more of, or does without what it is to have less of. Gives the number of vCPUs that are up.
    ///
    /// # Errors
    /// Those of [`crate::system::Hardware::resize`].
    pub async fn resize_guest(&self, vcpus: u32, device: Option<String>) -> Result<u32, Error> {
        self.blocking(move |system| system.resize(vcpus, device.as_deref()))
            .await
    }

    /// What a container uses and may use.
    ///
    /// # Errors
    /// [`Error::NotFound`], or why it cannot be read.
    pub async fn stats(&self, id: &ContainerId) -> Result<api::ContainerStats, Error> {
        self.table().check_known(id)?;
        let container = id.clone();
        self.blocking(move |system| system.stats(&container)).await
    }
}
