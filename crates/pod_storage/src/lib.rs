// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From containerd's mounts to disks for the VM and mounts in the guest.
