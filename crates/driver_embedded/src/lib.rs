// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs the embedded VMM as a jailed child process and implements the driver contract.
