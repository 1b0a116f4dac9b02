// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Generates messages from `proto/pod_sandbox_config.proto` (pure Rust: no `protoc`).

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/pod_sandbox_config.proto");
    let out = std::env::var("OUT_DIR")?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/pod_sandbox_config.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated file opens with inner attributes, which `include!` refuses.
    let path = Path::new(&out).join("pod_sandbox_config.rs");
    let text = std::fs::read_to_string(&path)?;
    let body: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    std::fs::write(&path, body.join("\n"))?;
    Ok(())
}
