// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Process table, stdio, cgroups, mounts and reaper of the guest agent.

mod agent;
mod clock;
mod error;
mod events;
mod files;
mod forward;
pub mod linux;
pub mod log;
mod network;
mod pid_namespace;
mod plan;
mod service;
pub mod stdio;
mod system;
mod table;
mod volume_plan;

pub use agent::{Agent, ProcessInfo};
pub use error::{Code, Error};
pub use events::Events;
pub use forward::ForwardedPorts;
pub use network::{CardPlan, NetworkPlan, Prefix, RoutePlan, RulePlan};
pub use pid_namespace::PidNamespace;
pub use plan::*;
pub use service::Service;
pub use system::{Cgroups, FileEnd, Files, Gate, Job, Launched, System};
pub use table::{Consequences, Exit, ProcessIo, ProcessTable};
pub use volume_plan::{
    HostFoldersPlan, MAX_VOLUME_NAME_LEN, MAX_VOLUMES, MediumPlan, OwnerPlan, PutPlan, SubPathPlan,
    VolumePlan,
};
