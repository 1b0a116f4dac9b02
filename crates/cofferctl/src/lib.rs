// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The operator's tool for a Coffer node.
