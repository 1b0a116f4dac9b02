// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Every rule once, then every interleaving of a small model, then random inputs.

mod every_order;
mod pauses;
mod random;
mod rules;
mod world;
