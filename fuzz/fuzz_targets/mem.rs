// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::run("mem", data));
