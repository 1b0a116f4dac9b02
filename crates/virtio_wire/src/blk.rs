// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block device structures (virtio v1.3 §5.2).
