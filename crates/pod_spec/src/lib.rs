// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! OCI spec, CRI annotations and node config become a validated pod and its containers.
