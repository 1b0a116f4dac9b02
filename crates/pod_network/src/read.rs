// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the CNI has left in the namespace that the calling thread is in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use route_netlink::RouteSocket;

use crate::{Address, Interface, MAX_ENTRIES, MAX_INTERFACES, Neighbour, NetError, Route};

/// Every interface that is up, but for loopback, in the order of their indexes.
pub(crate) fn interfaces() -> Result<Vec<Interface>, NetError> {
    let failed = || NetError::step("read", "the interfaces");
    let mut socket = RouteSocket::open().map_err(failed())?;
    let mut dump = |request| socket.dump(request).map_err(failed());
    let links = dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let addresses = dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let routes = dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
    let neighbours = dump(RouteNetlinkMessage::GetNeighbour(
        NeighbourMessage::default(),
    ))?;

    let mut interfaces = Vec::new();
    for message in links {
        if let RouteNetlinkMessage::NewLink(link) = message
            && let Some(interface) = interface(&link)?
        {
            interfaces.push(interface);
        }
    }
    interfaces.sort_by_key(|interface| interface.index);
    check_count(interfaces.len(), "interfaces", MAX_INTERFACES)?;
    for interface in &mut interfaces {
        interface.addresses = addresses
            .iter()
            .filter_map(|message| address(message, interface.index))
            .collect();
        check_count(
            interface.addresses.len(),
            "addresses on an interface",
            MAX_ENTRIES,
        )?;
        for message in &routes {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                interface.routes.extend(route(message, interface)?);
            }
        }
        check_count(
            interface.routes.len(),
            "routes through an interface",
            MAX_ENTRIES,
        )?;
        interface.neighbours = neighbours
            .iter()
            .filter_map(|message| neighbour(message, interface.index))
            .collect();
        check_count(
            interface.neighbours.len(),
            "permanent neighbours",
            MAX_ENTRIES,
        )?;
    }
    Ok(interfaces)
}

fn check_count(count: usize, what: &'static str, most: usize) -> Result<(), NetError> {
    if count > most {
        return Err(NetError::TooMany { count, what, most });
    }
    Ok(())
}

/// The interface, without addresses and what else depends on its index; `None` for those that are no part of the pod.
fn interface(link: &LinkMessage) -> Result<Option<Interface>, NetError> {
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return Ok(None);
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
        Some(mac) if link.header.link_layer_type == LinkLayerType::Ether => Ok(Some(Interface {
            index: link.header.index,
            name,
            mac,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
        })),
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

fn route(message: &RouteMessage, interface: &Interface) -> Result<Option<Route>, NetError> {
    let header = &message.header;
    let unsupported = |what: &str| NetError::Unsupported {
        interface: interface.name.clone(),
        what: what.to_owned(),
    };
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let (mut table, mut through) = (u32::from(header.table), None);
    let (mut destination, mut gateway, mut source, mut metric) = (None, None, None, 0);
    let mut spread = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(found) => table = *found,
            RouteAttribute::Oif(found) => through = Some(*found),
            RouteAttribute::Destination(found) => destination = ip(found),
            RouteAttribute::Gateway(found) => gateway = ip(found),
            RouteAttribute::PrefSource(found) => source = ip(found),
            RouteAttribute::Priority(found) => metric = *found,
            RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) | RouteAttribute::Encap(_) => {
                spread = true;
            }
            _ => {}
        }
    }
    if table != main || header.protocol == RouteProtocol::Kernel {
        return Ok(None);
    }
    if spread {
        return Err(unsupported("a route over several paths or a tunnel"));
    }
    if through != Some(interface.index) {
        return Ok(None);
    }
    if header.kind != RouteType::Unicast {
        return Err(unsupported("a route that is not unicast"));
    }
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return Ok(None),
    };
    Ok(Some(Route {
        destination: Address {
            ip: destination.unwrap_or(unspecified),
            prefix: header.destination_prefix_length,
        },
        gateway,
        source,
        metric,
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
    }))
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
