// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pod's network cards, in the network namespace of the calling thread: all that the CNI gave the pod on the host.
//!
//! In this order, so that each step finds what it needs: names while the cards are down; addresses; up; routes on the
//! link, then those through gateways; neighbours; rules. The kernel adds nothing of its own: no link-local address, no
//! route for an address, no probing for duplicates, which the host's filter would not let out.

use std::net::{IpAddr, Ipv4Addr};

use route_netlink::{Attributes, Change, Message, RouteSocket, attributes};

use crate::Error;
use crate::error::Context as _;
use crate::network::{CardPlan, NetworkPlan, Prefix, RoutePlan, RulePlan};

// `RTM_*` (Linux `include/uapi/linux/rtnetlink.h`); so are the structures at the beginnings of messages, in the functions
// below, where the kernel's header says nothing else.
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const RTM_NEWRULE: u16 = 32;
/// Bytes of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
// `if_link.h`.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
// `if_addr.h`.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
// `rtnetlink.h`.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
// `neighbour.h`.
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
// `fib_rules.h`.
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FR_ACT_TO_TBL: u8 = 1;
// `socket.h` and `if.h`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;

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
        network.rename(*index, card, &format!("{INTERIM_PREFIX}{index}"))?;
    }
    for (index, card) in &cards {
        network.rename(*index, card, &card.name)?;
        match network.set(*index, card, 0, no_link_local()) {
            // A card whose MTU is too small for IPv6 (RFC 8200 §5) does not speak it.
            Err(Error::Step { source, .. })
                if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            done => done?,
        }
        let mtu = Attributes::default().with(IFLA_MTU, &card.mtu.to_ne_bytes());
        network.set(*index, card, 0, mtu)?;
        for address in &card.addresses {
            network.add(&address_message(*index, *address), || {
                format!("giving {} the address {}", card.name, address.ip)
            })?;
        }
        network.set(*index, card, IFF_UP, Attributes::default())?;
    }
    for through_gateway in [false, true] {
        for (index, card) in &cards {
            let routes = card.routes.iter();
            for route in routes.filter(|route| route.gateway.is_some() == through_gateway) {
                network.add(&route_message(*index, route), || {
                    let Prefix { ip, length } = route.destination;
                    format!("routing {ip}/{length} through {}", card.name)
                })?;
            }
        }
    }
    for (index, card) in &cards {
        for (ip, mac) in &card.neighbours {
            network.add(&neighbour_message(*index, *ip, *mac), || {
                format!("making {ip} a neighbour of {}", card.name)
            })?;
        }
    }
    for rule in &plan.rules {
        network.add(&rule_message(rule), || {
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
        let question = Message {
            kind: RTM_GETLINK,
            body: vec![0; IFINFOMSG],
        };
        let answers = self
            .socket
            .dump(&question)
            .step(|| "listing the network cards".to_owned())?;
        let mut links: Vec<(u32, Vec<u8>)> = answers.iter().filter_map(index_and_mac).collect();
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

    fn add(&mut self, message: &Message, step: impl FnOnce() -> String) -> Result<(), Error> {
        // Each card has a route to the link-local addresses, which are all the same.
        let change = match message.kind {
            RTM_NEWROUTE => Change::Beside,
            _ => Change::New,
        };
        self.socket.change(message, change).step(step)
    }

    fn rename(&mut self, index: u32, card: &CardPlan, name: &str) -> Result<(), Error> {
        let name = [name.as_bytes(), &[0]].concat();
        let attributes = Attributes::default().with(IFLA_IFNAME, &name);
        self.set(index, card, 0, attributes)
    }

    /// Sets flags and attributes of a card.
    fn set(
        &mut self,
        index: u32,
        card: &CardPlan,
        flags: u32,
        attributes: Attributes,
    ) -> Result<(), Error> {
        // struct ifinfomsg: family, padding, type, index, flags, which flags to change
        let mut body = vec![0; 4];
        for word in [index, flags, flags] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(attributes.into_bytes());
        let message = Message {
            kind: RTM_SETLINK,
            body,
        };
        self.socket
            .change(&message, Change::Existing)
            .step(|| format!("setting up the network card {}", card.name))
    }
}

/// What a link's message says of it.
fn index_and_mac(link: &Message) -> Option<(u32, Vec<u8>)> {
    let (structure, rest) = link.body.split_at_checked(IFINFOMSG)?;
    let index = structure.get(4..8)?.first_chunk().copied()?;
    let (_, mac) = attributes(rest).find(|(kind, _)| *kind == IFLA_ADDRESS)?;
    Some((u32::from_ne_bytes(index), mac.to_vec()))
}

fn no_link_local() -> Attributes {
    let mode = Attributes::default().with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
    let families = Attributes::default().nested(AF_INET6.into(), &mode);
    Attributes::default().nested(IFLA_AF_SPEC, &families)
}

fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A table's number for the structures that have a byte for it; 0 (unspecified) if it does not fit.
fn small_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(0)
}

fn address_message(index: u32, address: Prefix) -> Message {
    let Prefix { ip, length } = address;
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let scope = if link_local {
        RT_SCOPE_LINK
    } else {
        RT_SCOPE_UNIVERSE
    };
    // struct ifaddrmsg: family, length, flags, scope, index
    let mut structure = vec![family(ip), length, 0, scope];
    structure.extend(index.to_ne_bytes());
    let flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE;
    let mut attributes = Attributes::behind(&structure)
        .with(IFA_LOCAL, &bytes(ip))
        .with(IFA_ADDRESS, &bytes(ip))
        .with(IFA_FLAGS, &flags.to_ne_bytes());
    // Networks of one or two addresses have no broadcast address (RFC 3021).
    if let IpAddr::V4(ip) = ip
        && length < 31
        && let Some(hosts) = u32::MAX.checked_shr(length.into())
    {
        let broadcast = Ipv4Addr::from_bits(ip.to_bits() | hosts);
        attributes = attributes.with(IFA_BROADCAST, &broadcast.octets());
    }
    Message {
        kind: RTM_NEWADDR,
        body: attributes.into_bytes(),
    }
}

fn route_message(index: u32, route: &RoutePlan) -> Message {
    let Prefix { ip, length } = route.destination;
    let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
    // struct rtmsg: family, length of the destination, of the source, type of service, table, protocol, scope, type, flags
    let mut structure = vec![family(ip), length, 0, 0, small_table(route.table)];
    structure.extend([RTPROT_STATIC, route.scope, RTN_UNICAST]);
    structure.extend(flags.to_ne_bytes());
    let mut attributes = Attributes::behind(&structure)
        .with(RTA_OIF, &index.to_ne_bytes())
        .with(RTA_TABLE, &route.table.to_ne_bytes());
    if length > 0 {
        attributes = attributes.with(RTA_DST, &bytes(ip));
    }
    for (kind, ip) in [(RTA_GATEWAY, route.gateway), (RTA_PREFSRC, route.source)] {
        if let Some(ip) = ip {
            attributes = attributes.with(kind, &bytes(ip));
        }
    }
    if route.metric > 0 {
        attributes = attributes.with(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    let mut metrics = Attributes::default();
    for (kind, metric) in [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)] {
        if metric > 0 {
            metrics = metrics.with(kind, &metric.to_ne_bytes());
        }
    }
    if !metrics.is_empty() {
        attributes = attributes.nested(RTA_METRICS, &metrics);
    }
    Message {
        kind: RTM_NEWROUTE,
        body: attributes.into_bytes(),
    }
}

fn neighbour_message(index: u32, ip: IpAddr, mac: [u8; 6]) -> Message {
    // struct ndmsg: family, padding, index, state, flags, type
    let mut structure = vec![family(ip), 0, 0, 0];
    structure.extend(index.to_ne_bytes());
    structure.extend(NUD_PERMANENT.to_ne_bytes());
    structure.extend([0, 0]);
    let attributes = Attributes::behind(&structure)
        .with(NDA_DST, &bytes(ip))
        .with(NDA_LLADDR, &mac);
    Message {
        kind: RTM_NEWNEIGH,
        body: attributes.into_bytes(),
    }
}

fn rule_message(rule: &RulePlan) -> Message {
    let (source, destination) = (rule.source, rule.destination);
    // struct fib_rule_hdr: family, lengths of destination and source, type of service, table, reserved twice, action, flags
    let mut structure = vec![family(source.ip), destination.length, source.length, 0];
    structure.extend([small_table(rule.table), 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0]);
    let mut attributes = Attributes::behind(&structure)
        .with(FRA_PRIORITY, &rule.priority.to_ne_bytes())
        .with(FRA_TABLE, &rule.table.to_ne_bytes());
    for (kind, prefix) in [(FRA_SRC, source), (FRA_DST, destination)] {
        if prefix.length > 0 {
            attributes = attributes.with(kind, &bytes(prefix.ip));
        }
    }
    Message {
        kind: RTM_NEWRULE,
        body: attributes.into_bytes(),
    }
}
