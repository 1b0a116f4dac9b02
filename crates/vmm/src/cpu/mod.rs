// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a guest sees of its CPUs, and how their state is saved.

pub mod cpuid;
pub mod msr;
