// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The one owner task of a pod.
