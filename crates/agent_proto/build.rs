// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Generates from `proto/agent.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    proto_codegen::generate("agent")
}
