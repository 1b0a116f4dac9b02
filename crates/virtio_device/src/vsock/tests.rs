// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device against a guest driver and real sockets.
