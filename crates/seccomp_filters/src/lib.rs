// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Seccomp filters for each kind of VMM thread.
