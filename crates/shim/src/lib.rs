// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! containerd-shim-coffer-v2: containerd's shim v2 contract on top of a sandbox.
