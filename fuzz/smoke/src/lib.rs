// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs every fuzz target on its corpus and on seeded random input, without a fuzzer.
