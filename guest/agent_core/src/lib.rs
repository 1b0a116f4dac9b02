// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Process table, cgroups, mounts and reaper of the guest agent.
