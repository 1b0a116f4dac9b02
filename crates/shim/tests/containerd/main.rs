// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The shim from containerd's side, without KVM.

#[cfg(test)]
mod inspect;
#[cfg(test)]
mod process;
#[cfg(test)]
mod sandbox;
#[cfg(test)]
mod service;
#[cfg(test)]
mod support;
#[cfg(test)]
mod telemetry;
