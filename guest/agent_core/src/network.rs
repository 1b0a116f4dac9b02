// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pod's network in requests, as values that make sense.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_proto::api;

use crate::Error;

/// The most network cards, and the most entries of each list of a card's. The host has the same limits.
const MAX_CARDS: usize = 8;
const MAX_ENTRIES: usize = 64;
/// `IFNAMSIZ` without the zero at the end.
const MAX_NAME_LEN: usize = 15;

/// The network of the pod; empty: none but loopback.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Cards.
    pub cards: Vec<CardPlan>,
    /// Routing rules besides the kernel's own.
    pub rules: Vec<RulePlan>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardPlan {
    /// By which the guest finds it. Of cards with the same one, the first in the list is the first in the guest.
    pub mac: [u8; 6],
    /// The name that it gets.
    pub name: String,
    /// Bytes of the largest IP packet.
    pub mtu: u32,
    /// Its addresses; they bring about no routes.
    pub addresses: Vec<Prefix>,
    /// Its routes.
    pub routes: Vec<RoutePlan>,
    /// Its permanent neighbours.
    pub neighbours: Vec<(IpAddr, [u8; 6])>,
}

/// An address and the length of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network.
    pub length: u8,
}

/// A route. All addresses are of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutePlan {
    /// Where to.
    pub destination: Prefix,
    /// Through whom; on the link itself if none.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// 0: the kernel's choice.
    pub metric: u32,
    /// `RT_SCOPE_*` of rtnetlink(7).
    pub scope: u8,
    /// The gateway is on the link though no address says so.
    pub onlink: bool,
    /// The routing table.
    pub table: u32,
    /// 0: the card's.
    pub mtu: u32,
    /// 0: the kernel's choice.
    pub advmss: u32,
}

/// A routing rule. Both addresses are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RulePlan {
    /// Rules are looked at in this order.
    pub priority: u32,
    /// The routing table.
    pub table: u32,
    /// Of whom; everybody if its length is 0.
    pub source: Prefix,
    /// To whom; everybody if its length is 0.
    pub destination: Prefix,
}

impl NetworkPlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(
        interfaces: Vec<api::NetworkInterface>,
        rules: Vec<api::RoutingRule>,
    ) -> Result<Self, Error> {
        at_most("interfaces", interfaces.len(), MAX_CARDS)?;
        at_most("rules", rules.len(), MAX_ENTRIES)?;
        let cards = interfaces.into_iter().map(CardPlan::parse);
        let rules = rules.iter().map(RulePlan::parse);
        let plan = Self {
            cards: cards.collect::<Result<Vec<_>, _>>()?,
            rules: rules.collect::<Result<_, _>>()?,
        };
        for (number, card) in plan.cards.iter().enumerate() {
            let before = plan.cards.iter().take(number);
            if before.into_iter().any(|other| other.name == card.name) {
                let problem = format!("{:?} is there twice", card.name);
                return Err(Error::bad("interfaces.name", problem));
            }
        }
        Ok(plan)
    }
}

impl CardPlan {
    fn parse(card: api::NetworkInterface) -> Result<Self, Error> {
        at_most("interfaces.addresses", card.addresses.len(), MAX_ENTRIES)?;
        at_most("interfaces.routes", card.routes.len(), MAX_ENTRIES)?;
        at_most("interfaces.neighbours", card.neighbours.len(), MAX_ENTRIES)?;
        let addresses = card.addresses.iter().map(Prefix::parse);
        let routes = card.routes.iter().map(RoutePlan::parse);
        let neighbours = card
            .neighbours
            .iter()
            .map(|neighbour| Ok((ip(&neighbour.address)?, mac(&neighbour.mac)?)));
        Ok(Self {
            mac: mac(&card.mac)?,
            mtu: card.mtu,
            addresses: addresses.collect::<Result<_, _>>()?,
            routes: routes.collect::<Result<_, _>>()?,
            neighbours: neighbours.collect::<Result<_, Error>>()?,
            name: name(card.name)?,
        })
    }
}

impl Prefix {
    fn parse(prefix: &api::IpPrefix) -> Result<Self, Error> {
        let ip = ip(&prefix.address)?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        match u8::try_from(prefix.length) {
            Ok(length) if length <= most => Ok(Self { ip, length }),
            _ => {
                let problem = format!("is {}, at most {most} is possible", prefix.length);
                Err(Error::bad("length of a prefix", problem))
            }
        }
    }
}

impl RoutePlan {
    fn parse(route: &api::Route) -> Result<Self, Error> {
        let destination = Prefix::parse(route.destination.get_or_default())?;
        let optional = |bytes: &[u8]| match bytes {
            [] => Ok(None),
            bytes => ip(bytes).map(Some),
        };
        let (gateway, source) = (optional(&route.gateway)?, optional(&route.source)?);
        for other in [gateway, source].into_iter().flatten() {
            same_family(destination.ip, other)?;
        }
        let scope = u8::try_from(route.scope)
            .map_err(|_| Error::bad("scope", format!("is {}, which is none", route.scope)))?;
        Ok(Self {
            destination,
            gateway,
            source,
            metric: route.metric,
            scope,
            onlink: route.onlink,
            table: route.table,
            mtu: route.mtu,
            advmss: route.advmss,
        })
    }
}

impl RulePlan {
    fn parse(rule: &api::RoutingRule) -> Result<Self, Error> {
        let source = Prefix::parse(rule.source.get_or_default())?;
        let destination = Prefix::parse(rule.destination.get_or_default())?;
        same_family(source.ip, destination.ip)?;
        Ok(Self {
            priority: rule.priority,
            table: rule.table,
            source,
            destination,
        })
    }
}

fn at_most(field: &str, count: usize, most: usize) -> Result<(), Error> {
    if count > most {
        let problem = format!("are {count}, at most {most} are allowed");
        return Err(Error::bad(field, problem));
    }
    Ok(())
}

fn same_family(one: IpAddr, other: IpAddr) -> Result<(), Error> {
    if one.is_ipv4() == other.is_ipv4() {
        return Ok(());
    }
    let problem = format!("{one} and {other} are of different families");
    Err(Error::bad("addresses", problem))
}

fn name(name: String) -> Result<String, Error> {
    // What the kernel takes for a name (`dev_valid_name`), and no other way to name loopback.
    let valid = (1..=MAX_NAME_LEN).contains(&name.len())
        && ![".", "..", "lo"].contains(&name.as_str())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if valid {
        return Ok(name);
    }
    let problem = format!("{name:?} is no interface's name");
    Err(Error::bad("interfaces.name", problem))
}

fn ip(bytes: &[u8]) -> Result<IpAddr, Error> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::V4(Ipv4Addr::from(bytes)));
    }
    if let Ok(bytes) = <[u8; 16]>::try_from(bytes) {
        return Ok(IpAddr::V6(Ipv6Addr::from(bytes)));
    }
    let problem = format!("is {} bytes long, 4 or 16 are possible", bytes.len());
    Err(Error::bad("an IP address", problem))
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], Error> {
    bytes.try_into().map_err(|_| {
        let problem = format!("is {} bytes long, 6 are needed", bytes.len());
        Error::bad("a MAC address", problem)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(bytes: &[u8], length: u32) -> protobuf::MessageField<api::IpPrefix> {
        Some(api::IpPrefix {
            address: bytes.to_vec(),
            length,
            ..Default::default()
        })
        .into()
    }

    fn card(name: &str) -> api::NetworkInterface {
        api::NetworkInterface {
            mac: vec![2, 0, 0, 0, 0, 7],
            name: name.to_owned(),
            mtu: 1500,
            ..Default::default()
        }
    }

    fn parse(card: api::NetworkInterface) -> Result<NetworkPlan, Error> {
        NetworkPlan::parse(vec![card], Vec::new())
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for good in ["eth0", "net1", "fifteen-bytes-0"] {
            parse(card(good)).unwrap();
        }
        for bad in [
            "",
            "lo",
            ".",
            "..",
            "a/b",
            "a b",
            "a:b",
            "a%d",
            "sixteen-bytes-00",
        ] {
            parse(card(bad)).unwrap_err();
        }
        NetworkPlan::parse(vec![card("eth0"), card("eth0")], Vec::new()).unwrap_err();
    }

    #[test]
    fn addresses_of_wrong_lengths_are_refused() {
        for (bytes, length, good) in [
            (&[10, 0, 0, 1][..], 32, true),
            (&[10, 0, 0, 1], 33, false),
            (&[0; 16], 128, true),
            (&[0; 16], 129, false),
            (&[0; 16], 1 << 20, false),
            (&[0; 5], 8, false),
            (&[], 0, false),
        ] {
            let addresses = vec![prefix(bytes, length).unwrap()];
            let result = parse(api::NetworkInterface {
                addresses,
                ..card("eth0")
            });
            assert_eq!(result.is_ok(), good, "{bytes:?}/{length}");
        }
        let mac = vec![0; 5];
        parse(api::NetworkInterface {
            mac,
            ..card("eth0")
        })
        .unwrap_err();
    }

    #[test]
    fn families_are_not_mixed() {
        let route = |gateway: &[u8]| {
            let route = api::Route {
                destination: prefix(&[0; 4], 0),
                gateway: gateway.to_vec(),
                ..Default::default()
            };
            parse(api::NetworkInterface {
                routes: vec![route],
                ..card("eth0")
            })
        };
        route(&[]).unwrap();
        route(&[10, 0, 0, 1]).unwrap();
        route(&[0; 16]).unwrap_err();
        let rule = |destination: &[u8]| {
            let rule = api::RoutingRule {
                source: prefix(&[0; 4], 0),
                destination: prefix(destination, 0),
                ..Default::default()
            };
            NetworkPlan::parse(Vec::new(), vec![rule])
        };
        rule(&[0; 4]).unwrap();
        rule(&[0; 16]).unwrap_err();
    }

    #[test]
    fn lists_end_at_their_caps() {
        let cards = |count| {
            (0..count)
                .map(|number| card(&format!("eth{number}")))
                .collect()
        };
        NetworkPlan::parse(cards(MAX_CARDS), Vec::new()).unwrap();
        NetworkPlan::parse(cards(MAX_CARDS + 1), Vec::new()).unwrap_err();
        let addresses = |count| {
            parse(api::NetworkInterface {
                addresses: vec![prefix(&[10, 0, 0, 1], 8).unwrap(); count],
                ..card("eth0")
            })
        };
        addresses(MAX_ENTRIES).unwrap();
        addresses(MAX_ENTRIES + 1).unwrap_err();
    }
}
