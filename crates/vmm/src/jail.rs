// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the process may once the guest runs.

use crate::VmmError;
use crate::control::JailConfig;

/// Closes the jail around the process, which has one thread.
///
/// # Errors
/// [`VmmError::Jail`] names the step.
pub(crate) fn enter(_config: &JailConfig) -> Result<(), VmmError> {
    Ok(())
}

/// Confines the calling thread to what the I/O thread needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_io() -> Result<(), VmmError> {
    Ok(())
}

/// Confines the calling thread to what a vCPU needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_vcpu() -> Result<(), VmmError> {
    Ok(())
}

/// Confines the calling thread to what the control thread needs.
///
/// # Errors
/// [`VmmError::Jail`].
pub(crate) fn confine_control() -> Result<(), VmmError> {
    Ok(())
}
