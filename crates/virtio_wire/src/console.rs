// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Console structures (virtio v1.3 §5.3).
