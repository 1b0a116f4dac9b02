// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block, vsock, rng, console and balloon over guest memory; knows neither KVM nor the transport.
