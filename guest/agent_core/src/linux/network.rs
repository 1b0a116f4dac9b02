// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pod's network cards, in the network namespace of the calling thread: all that the CNI gave the pod on the host.
//!
//! In this order, so that each step finds what it needs: names while the cards are down; addresses; up; routes on the
//! link, then those through gateways; neighbours; rules. The kernel adds nothing of its own: no link-local address, no
//! route for an address, no probing for duplicates, which the host's filter would not let out.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use route_netlink::{Change, RouteSocket};

use crate::Error;
use crate::error::Context as _;
use crate::network::{CardPlan, NetworkPlan, Prefix, RoutePlan, RulePlan};

/// Before every card has its name, none has another's.
const INTERIM_PREFIX: &str = "coffer";

/// Sets the cards up.
///
/// # Errors
/// [`Error::NoCard`], or [`Error::Step`]; the network is then of no use.
pub fn configure(plan: &NetworkPlan) -> Result<(), Error> {
    if *plan == NetworkPlan::default() {
        return Ok(());
    }
    let mut network = Network {
        socket: RouteSocket::open().step(|| "opening a netlink socket".to_owned())?,
    };
    let cards = network.find(&plan.cards)?;
    for (index, card) in &cards {
        network.set(
            *index,
            card,
            LinkAttribute::IfName(format!("{INTERIM_PREFIX}{index}")),
        )?;
    }
    for (index, card) in &cards {
        network.set(*index, card, LinkAttribute::IfName(card.name.clone()))?;
        match network.set(*index, card, no_link_local()) {
            // A card whose MTU is too small for IPv6 (RFC 8200 §5) does not speak it.
            Err(Error::Step { source, .. })
                if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            done => done?,
        }
        network.set(*index, card, LinkAttribute::Mtu(card.mtu))?;
        for address in &card.addresses {
            network.add(address_message(*index, *address), || {
                format!("giving {} the address {}", card.name, address.ip)
            })?;
        }
        network.up(*index, card)?;
    }
    for through_gateway in [false, true] {
        for (index, card) in &cards {
            let routes = card.routes.iter();
            for route in routes.filter(|route| route.gateway.is_some() == through_gateway) {
                network.add(route_message(*index, route), || {
                    let Prefix { ip, length } = route.destination;
                    format!("routing {ip}/{length} through {}", card.name)
                })?;
            }
        }
    }
    for (index, card) in &cards {
        for (ip, mac) in &card.neighbours {
            network.add(neighbour_message(*index, *ip, *mac), || {
                format!("making {ip} a neighbour of {}", card.name)
            })?;
        }
    }
    for rule in &plan.rules {
        network.add(rule_message(rule), || {
            format!("adding the routing rule of priority {}", rule.priority)
        })?;
    }
    Ok(())
}

struct Network {
    socket: RouteSocket,
}

impl Network {
    /// The index of each card.
    fn find<'a>(&mut self, cards: &'a [CardPlan]) -> Result<Vec<(u32, &'a CardPlan)>, Error> {
        let answers = self
            .socket
            .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
            .step(|| "listing the network cards".to_owned())?;
        let mut links: Vec<(u32, Vec<u8>)> = answers
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => {
                    let mac = link.attributes.into_iter().find_map(|attribute| {
                        if let LinkAttribute::Address(mac) = attribute {
                            Some(mac)
                        } else {
                            None
                        }
                    });
                    Some((link.header.index, mac?))
                }
                _ => None,
            })
            .collect();
        links.sort_unstable();
        let mut found = Vec::new();
        for card in cards {
            let at = links
                .iter()
                .position(|(_, mac)| *mac == card.mac)
                .ok_or_else(|| Error::NoCard(card.name.clone()))?;
            found.push((links.remove(at).0, card));
        }
        Ok(found)
    }

    fn add(
        &mut self,
        message: RouteNetlinkMessage,
        step: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        // Each card has a route to the link-local addresses, which are all the same.
        let change = match message {
            RouteNetlinkMessage::NewRoute(_) => Change::Beside,
            _ => Change::New,
        };
        self.socket.change(message, change).step(step)
    }

    fn set(&mut self, index: u32, card: &CardPlan, to: LinkAttribute) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![to];
        self.socket
            .change(RouteNetlinkMessage::SetLink(link), Change::Existing)
            .step(|| format!("setting up the network card {}", card.name))
    }

    fn up(&mut self, index: u32, card: &CardPlan) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.socket
            .change(RouteNetlinkMessage::SetLink(link), Change::Existing)
            .step(|| format!("bringing up the network card {}", card.name))
    }
}

fn no_link_local() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])])
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address_message(index: u32, address: Prefix) -> RouteNetlinkMessage {
    let Prefix { ip, length } = address;
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = length;
    message.header.index = index;
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if link_local {
        message.header.scope = AddressScope::Link;
    }
    message.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad),
    ];
    if let IpAddr::V4(ip) = ip
        && let Some(host) = u32::MAX.checked_shr(length.into())
        && length < 31
    {
        let broadcast = Ipv4Addr::from_bits(ip.to_bits() | host);
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    RouteNetlinkMessage::NewAddress(message)
}

fn route_message(index: u32, route: &RoutePlan) -> RouteNetlinkMessage {
    let Prefix { ip, length } = route.destination;
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = length;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = route.scope.into();
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let mut attributes = vec![
        RouteAttribute::Oif(index),
        RouteAttribute::Table(route.table),
    ];
    if length > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(ip)));
    }
    attributes.extend(route.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
    attributes.extend(route.source.map(|ip| RouteAttribute::PrefSource(ip.into())));
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    let mtu = (route.mtu > 0).then_some(RouteMetric::Mtu(route.mtu));
    let advmss = (route.advmss > 0).then_some(RouteMetric::Advmss(route.advmss));
    let metrics: Vec<RouteMetric> = mtu.into_iter().chain(advmss).collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    message.attributes = attributes;
    RouteNetlinkMessage::NewRoute(message)
}

fn neighbour_message(index: u32, ip: IpAddr, mac: [u8; 6]) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let address = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(address),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    RouteNetlinkMessage::NewNeighbour(message)
}

fn rule_message(rule: &RulePlan) -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.source.ip);
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.src_len = rule.source.length;
    message.header.dst_len = rule.destination.length;
    let mut attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
    ];
    if rule.source.length > 0 {
        attributes.push(RuleAttribute::Source(rule.source.ip));
    }
    if rule.destination.length > 0 {
        attributes.push(RuleAttribute::Destination(rule.destination.ip));
    }
    message.attributes = attributes;
    RouteNetlinkMessage::NewRule(message)
}
