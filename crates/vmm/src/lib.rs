// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The embedded KVM virtual machine monitor and its control messages.
