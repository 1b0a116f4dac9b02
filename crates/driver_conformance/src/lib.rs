// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The cases that each driver passes.
