// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Generates messages and the ttrpc service from `proto/inspect.proto` (pure Rust: no `protoc`).

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/inspect.proto");
    let out = std::env::var("OUT_DIR")?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/inspect.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated files open with inner attributes, which `include!` refuses.
    for name in ["inspect.rs", "inspect_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text = std::fs::read_to_string(&path)?;
        let body: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        std::fs::write(&path, body.join("\n"))?;
    }
    Ok(())
}
