// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! virtio wire structs and pure parsers (little-endian types, open enums).
