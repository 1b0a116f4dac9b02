// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the CNI has left in the namespace that the calling thread is in.
//!
//! Everything that a packet's way depends on is either read or refused by name: a pod whose routes were half understood
//! would be reachable for some and not for others.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::RouteSocket;
use crate::read_rules::rule;
use crate::{Address, Interface, MAX_ENTRIES, MAX_INTERFACES, Neighbour, NetError, Route, Rule};

/// The table of the kernel's own routes to its addresses (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u32 = 255;

/// What there is.
#[derive(Debug)]
pub(crate) struct Found {
    /// Every interface that is up, but for loopback, in the order of their indexes.
    pub(crate) interfaces: Vec<Interface>,
    /// Routing rules, but for the kernel's own.
    pub(crate) rules: Vec<Rule>,
}

/// Reads the namespace.
pub(crate) fn all() -> Result<Found, NetError> {
    let failed = || NetError::step("read", "the interfaces");
    let mut socket = RouteSocket::open().map_err(failed())?;
    let mut dump = |request| socket.dump(request).map_err(failed());
    let links = dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let addresses = dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let routes = dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
    let neighbours = dump(RouteNetlinkMessage::GetNeighbour(
        NeighbourMessage::default(),
    ))?;
    let rules = dump(RouteNetlinkMessage::GetRule(RuleMessage::default()))?;

    let mut interfaces = Vec::new();
    let mut unused = BTreeSet::new();
    for message in links {
        let RouteNetlinkMessage::NewLink(link) = message else {
            continue;
        };
        match interface(&link)? {
            Link::Used(interface) => interfaces.push(interface),
            Link::Down => _ = unused.insert(link.header.index),
            Link::Loopback => {}
        }
    }
    interfaces.sort_by_key(|interface| interface.index);
    check_count(interfaces.len(), "interfaces", MAX_INTERFACES)?;
    for interface in &mut interfaces {
        let index = interface.index;
        let of_index = |message| address(message, index);
        interface.addresses = addresses.iter().filter_map(of_index).collect();
        let of_index = |message| neighbour(message, index);
        interface.neighbours = neighbours.iter().filter_map(of_index).collect();
    }
    for message in &routes {
        if let RouteNetlinkMessage::NewRoute(message) = message
            && let Some((through, route)) = route(message, &unused)?
        {
            match interfaces.iter_mut().find(|found| found.index == through) {
                Some(interface) => interface.routes.push(route),
                // The guest's kernel has them for its own loopback.
                None if message.header.protocol == RouteProtocol::Kernel => {}
                None => return Err(unsupported_route("a route through loopback")),
            }
        }
    }
    let rules = rules.iter().filter_map(|message| rule(message).transpose());
    let found = Found {
        interfaces,
        rules: rules.collect::<Result<_, _>>()?,
    };
    found.check_counts()?;
    Ok(found)
}

impl Found {
    fn check_counts(&self) -> Result<(), NetError> {
        for interface in &self.interfaces {
            let addresses = interface.addresses.len();
            check_count(addresses, "addresses on an interface", MAX_ENTRIES)?;
            let routes = interface.routes.len();
            check_count(routes, "routes through an interface", MAX_ENTRIES)?;
            let neighbours = interface.neighbours.len();
            check_count(neighbours, "permanent neighbours", MAX_ENTRIES)?;
        }
        check_count(self.rules.len(), "routing rules", MAX_ENTRIES)
    }
}

fn check_count(count: usize, what: &'static str, most: usize) -> Result<(), NetError> {
    if count > most {
        return Err(NetError::TooMany { count, what, most });
    }
    Ok(())
}

fn unsupported_route(what: &str) -> NetError {
    NetError::Unsupported {
        interface: "the pod's network".to_owned(),
        what: what.to_owned(),
    }
}

/// What an interface is to the pod.
enum Link {
    /// The interface, without addresses and what else depends on its index.
    Used(Interface),
    /// No part of the pod.
    Down,
    /// The guest has its own.
    Loopback,
}

fn interface(link: &LinkMessage) -> Result<Link, NetError> {
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return Ok(Link::Loopback);
    }
    if !flags.contains(LinkFlags::Up) {
        return Ok(Link::Down);
    }
    let (mut name, mut mac, mut mtu) = (String::new(), None, 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name.clone_from(found),
            LinkAttribute::Address(found) => mac = <[u8; 6]>::try_from(found.as_slice()).ok(),
            LinkAttribute::Mtu(found) => mtu = *found,
            _ => {}
        }
    }
    match mac {
        Some(mac) if link.header.link_layer_type == LinkLayerType::Ether => {
            Ok(Link::Used(Interface {
                index: link.header.index,
                name,
                mac,
                mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
                addresses: Vec::new(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            }))
        }
        _ => Err(NetError::Unsupported {
            interface: name,
            what: "no Ethernet address".to_owned(),
        }),
    }
}

fn address(message: &RouteNetlinkMessage, index: u32) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    if message.header.index != index {
        return None;
    }
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(found) => local = Some(*found),
            AddressAttribute::Address(found) => address = Some(*found),
            _ => {}
        }
    }
    // Where there are both, the other one is the far end of a point-to-point link.
    local.or(address).map(|ip| Address {
        ip,
        prefix: message.header.prefix_len,
    })
}

/// The route, and the index of the interface that it goes through; `None` for those that the kernel keeps by itself, and
/// for those through interfaces that are no part of the pod.
fn route(message: &RouteMessage, unused: &BTreeSet<u32>) -> Result<Option<(u32, Route)>, NetError> {
    let header = &message.header;
    let Some(everywhere) = everywhere(header.address_family) else {
        return Ok(None);
    };
    let mut through = None;
    let mut route = Route {
        destination: Address {
            ip: everywhere,
            prefix: header.destination_prefix_length,
        },
        gateway: None,
        source: None,
        metric: 0,
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        table: u32::from(header.table),
        mtu: 0,
        advmss: 0,
    };
    let mut refused = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(found) => route.table = *found,
            RouteAttribute::Oif(found) => through = Some(*found),
            RouteAttribute::Destination(found) => {
                route.destination.ip = ip(found).unwrap_or(everywhere);
            }
            RouteAttribute::Gateway(found) => route.gateway = ip(found),
            RouteAttribute::PrefSource(found) => route.source = ip(found),
            RouteAttribute::Priority(found) => route.metric = *found,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(found) => route.mtu = *found,
                        RouteMetric::Advmss(found) => route.advmss = *found,
                        _ => refused = Some("a route with metrics besides MTU and MSS"),
                    }
                }
            }
            RouteAttribute::MultiPath(_) => refused = Some("a route over several paths"),
            RouteAttribute::Via(_) => refused = Some("a route via another family"),
            RouteAttribute::Encap(_) => refused = Some("a route into a tunnel"),
            _ => {}
        }
    }
    let through_unused = through.is_some_and(|index| unused.contains(&index));
    if route.table == LOCAL_TABLE || through_unused {
        return Ok(None);
    }
    let own = header.protocol == RouteProtocol::Kernel;
    if own && header.kind != RouteType::Unicast {
        return Ok(None);
    }
    if header.kind != RouteType::Unicast {
        refused = Some("a route that is not unicast");
    } else if header.tos != 0 || header.source_prefix_length != 0 {
        refused = Some("a route by type of service or by source");
    }
    match (refused, through) {
        (Some(what), _) => Err(unsupported_route(what)),
        (None, None) => Err(unsupported_route("a route through no interface")),
        (None, Some(through)) => Ok(Some((through, route))),
    }
}

/// The unspecified address of a family, which stands for all of it.
pub(crate) fn everywhere(family: AddressFamily) -> Option<IpAddr> {
    match family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn neighbour(message: &RouteNetlinkMessage, index: u32) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else {
        return None;
    };
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                ip = Some(IpAddr::V4(*found));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                ip = Some(IpAddr::V6(*found));
            }
            NeighbourAttribute::LinkLayerAddress(found) => {
                mac = <[u8; 6]>::try_from(found.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour { ip: ip?, mac: mac? })
}
