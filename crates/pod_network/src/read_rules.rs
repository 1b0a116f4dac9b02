// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Routing rules (ip-rule(8)) by source and destination; all others are refused by name.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags};

use crate::read::everywhere;
use crate::{Address, NetError, Rule};

/// The kernel's own rules, which every namespace has: priority and table.
const OWN: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];
/// "Any prefix will do", which the kernel says of every rule.
const NO_SUPPRESSION: u32 = u32::MAX;

/// The rule in a message; `None` for the kernel's own.
pub(crate) fn rule(message: &RouteNetlinkMessage) -> Result<Option<Rule>, NetError> {
    let RouteNetlinkMessage::NewRule(message) = message else {
        return Ok(None);
    };
    let header = &message.header;
    // There are rules of multicast routing, too.
    let Some(everybody) = everywhere(header.family) else {
        return Ok(None);
    };
    let all = Address {
        ip: everybody,
        prefix: 0,
    };
    let mut rule = Rule {
        priority: 0,
        table: u32::from(header.table),
        source: all,
        destination: all,
    };
    let mut simple = header.action == RuleAction::ToTable
        && header.tos == 0
        && !header.flags.contains(RuleFlags::Invert);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(found) => rule.priority = *found,
            RuleAttribute::Table(found) => rule.table = *found,
            RuleAttribute::Source(ip) => {
                rule.source = Address {
                    ip: *ip,
                    prefix: header.src_len,
                };
            }
            RuleAttribute::Destination(ip) => {
                rule.destination = Address {
                    ip: *ip,
                    prefix: header.dst_len,
                };
            }
            RuleAttribute::SuppressPrefixLen(NO_SUPPRESSION) | RuleAttribute::Protocol(_) => {}
            _ => simple = false,
        }
    }
    if !simple {
        let what = "a routing rule by more than source and destination".to_owned();
        let interface = "the pod's network".to_owned();
        return Err(NetError::Unsupported { interface, what });
    }
    let own = OWN.contains(&(rule.priority, rule.table))
        && rule.source.prefix == 0
        && rule.destination.prefix == 0;
    Ok((!own).then_some(rule))
}
