// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The tests; see the crate's documentation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz_targets::{TARGETS, Target};

use crate::Random;

/// Random inputs for each target.
const RANDOM_INPUTS: usize = 500;
/// Longest random input, in bytes.
const MAX_BYTES: u64 = 1024;
/// Changed copies of each seed.
const MUTATIONS: usize = 4;

/// Says which input it was, if the target panics.
struct Blame<'a>(&'a Target, &'a [u8]);

impl Drop for Blame<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("target {} fails on the input {hex}", self.0.name);
        }
    }
}

fn run(target: &Target, data: &[u8]) {
    let _blame = Blame(target, data);
    (target.run)(data);
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder().join("seeds").join(target.name)) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| fs::read(path).unwrap())
        .collect()
}

#[test]
fn seeds_and_their_mutations_find_nothing() {
    for target in TARGETS {
        let mut random = Random::new(1);
        let seeds = seeds(target);
        assert!(
            !seeds.is_empty(),
            "target {} has no seeds in fuzz/seeds",
            target.name
        );
        for seed in &seeds {
            run(target, seed);
            for _ in 0..MUTATIONS {
                let mut data = seed.clone();
                for _ in 0..=random.below(4) {
                    if !data.is_empty() {
                        let at = random.below(data.len() as u64);
                        data[at] = random.number().to_le_bytes()[0];
                    }
                }
                run(target, &data);
            }
        }
    }
}

#[test]
fn random_input_finds_nothing() {
    for target in TARGETS {
        let mut random = Random::new(2);
        run(target, &[]);
        for _ in 0..RANDOM_INPUTS {
            let len = random.below(MAX_BYTES);
            run(target, &random.bytes(len));
        }
    }
}

#[test]
fn every_target_has_its_libfuzzer_binary_and_every_binary_its_target() {
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    let names: BTreeSet<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names.len(), TARGETS.len(), "two targets of one name");
    for name in &names {
        let entry = format!("[[bin]]\nname = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n");
        assert!(manifest.contains(&entry), "fuzz/Cargo.toml lacks {entry}");
        let body = fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(
            body.contains(&format!("fuzz_targets::run(\"{name}\", data)")),
            "{name}.rs runs another target"
        );
    }
    assert_eq!(
        manifest.matches("[[bin]]").count(),
        names.len(),
        "a binary without a target"
    );
}
