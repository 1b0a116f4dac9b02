// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Generates messages and ttrpc services from a crate's `.proto` file, for its build script (pure Rust: no `protoc`).
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::Path;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// Generates `<name>.rs` and, where the file declares services, `<name>_ttrpc.rs` (async) from `proto/<name>.proto` into
/// `OUT_DIR`, in a form that `include!` takes.
///
/// # Errors
/// The file cannot be read or understood, or the folder not written to.
pub fn generate(name: &str) -> Result<(), Box<dyn Error>> {
    let proto = format!("proto/{name}.proto");
    println!("cargo:rerun-if-changed={proto}");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .input(&proto)
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    for file in [format!("{name}.rs"), format!("{name}_ttrpc.rs")] {
        let path = Path::new(&out).join(file);
        if path.exists() {
            without_inner_attributes(&path)?;
        }
    }
    Ok(())
}

/// The generated files open with inner attributes and comments, which `include!` refuses.
fn without_inner_attributes(path: &Path) -> std::io::Result<()> {
    let text = fs::read_to_string(path)?;
    let body: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(path, body.join("\n"))
}
