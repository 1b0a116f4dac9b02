// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The driver contract: what a VMM must do for a sandbox, and what it may.
