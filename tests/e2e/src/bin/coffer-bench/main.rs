// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Measures Coffer beside runc, in one run on one node, with alternating repetitions. `cargo xtask bench` runs it in a
//! node and prints what it says.
//!
//! `coffer-bench REPETITIONS RESULT.json`
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod measure;
mod memory;
mod result;

use std::path::PathBuf;

use result::Results;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let repetitions: u32 = arguments.next().map_or(10, |text| text.parse().unwrap());
    let path = arguments
        .next()
        .map_or_else(|| PathBuf::from("bench.json"), PathBuf::from);

    let mut results = Results::default();
    measure::first_use(&mut results);
    measure::cold_start(&mut results, repetitions);
    measure::exec(&mut results, repetitions);
    measure::stdout(&mut results, repetitions.div_ceil(3));
    measure::phases(&mut results);
    memory::idle_pod(&mut results);
    std::fs::write(&path, results.to_json()).unwrap();
    print!("{}", results.table());
}
