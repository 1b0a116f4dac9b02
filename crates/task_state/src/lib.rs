// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Pure lifecycle of tasks and execs, and the order of their events.
