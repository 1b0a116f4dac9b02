// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! An in-memory driver and guest agent with scripted faults, for tests without KVM.
