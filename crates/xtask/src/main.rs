// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Builds, tests, checks and benchmarks the project.

fn main() {}
