// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent's requests about the files that the host puts into the guest.

use agent_proto::MAX_FILE_END_LEN;
use ids::ContainerId;

use crate::Error;
use crate::agent::Agent;
use crate::system::{FileEnd, System};
use crate::volume_plan::PutPlan;

impl<S: System> Agent<S> {
    /// Takes one part of what a volume is to hold.
    ///
    /// # Errors
    /// Those of [`crate::Files::put`].
    pub async fn put_files(&self, plan: PutPlan) -> Result<(), Error> {
        self.blocking(move |system| system.put(&plan)).await
    }

    /// The end of a copied mount that is a single file.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown container, [`Error::BadRequest`] for more than [`MAX_FILE_END_LEN`] bytes, or
    /// what keeps the file from being read.
    pub async fn read_copied(
        &self,
        id: &ContainerId,
        index: u32,
        max_bytes: u32,
    ) -> Result<FileEnd, Error> {
        let max = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        if max > MAX_FILE_END_LEN {
            return Err(Error::bad(
                "max_bytes",
                format!("is {max_bytes}, at most {MAX_FILE_END_LEN} are allowed"),
            ));
        }
        self.table().check_known(id)?;
        let container = id.clone();
        self.blocking(move |system| system.read_copied(&container, index, max))
            .await
    }
}
