// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Generates from `proto/pod_sandbox_config.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    proto_codegen::generate("pod_sandbox_config")
}
