// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device against a guest's driver and real sockets.

mod guest;
mod hostile;
mod lifecycle;
mod streams;
