// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Identifiers and units; depends on nothing.
