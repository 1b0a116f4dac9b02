// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Versioned messages between the shim and the guest agent, and the stdio stream header.
