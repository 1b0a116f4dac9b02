// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The driver side of the virtio rings, for tests, fuzz targets and benchmarks.
