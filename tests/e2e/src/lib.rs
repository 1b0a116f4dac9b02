// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! End-to-end tests: real VMs under a real containerd.
