// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs a probe guest to prove that a node's KVM can run a stock Linux guest.
