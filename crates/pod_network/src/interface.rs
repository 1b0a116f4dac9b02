// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the CNI has made of an interface, and the guest gets.

use std::net::IpAddr;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet.
    pub mtu: u16,
    /// Its addresses, link-local ones among them.
    pub addresses: Vec<Address>,
    /// Every route through it, those that the kernel made for its addresses among them.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

impl Interface {
    /// The addresses without their networks.
    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(|address| address.ip).collect()
    }
}

/// An address and its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network.
    pub prefix: u8,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to; its family is the route's.
    pub destination: Address,
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
    /// `RTAX_MTU` of rtnetlink(7), in bytes; 0: the interface's.
    pub mtu: u32,
    /// `RTAX_ADVMSS` of rtnetlink(7), in bytes; 0: the kernel's choice.
    pub advmss: u32,
}

/// A routing rule: packets from `source` to `destination` are routed by `table`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Rules are looked at in this order.
    pub priority: u32,
    /// The routing table.
    pub table: u32,
    /// Of the rule's family; of length 0 if everybody.
    pub source: Address,
    /// Of the rule's family; of length 0 if everybody.
    pub destination: Address,
}

/// Who has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The address.
    pub ip: IpAddr,
    /// Whose it is.
    pub mac: [u8; 6],
}
