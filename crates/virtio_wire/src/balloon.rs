// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Traditional memory balloon structures (virtio v1.3 §5.5).
