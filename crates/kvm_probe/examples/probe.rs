// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Prints whether this machine's KVM is usable; exits 1 if it is not.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match kvm_probe::probe(Path::new("/dev/kvm")) {
        Ok(report) => {
            println!("usable: {report:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("not usable: {error}");
            ExitCode::FAILURE
        }
    }
}
