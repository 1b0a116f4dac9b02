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
    /// Routes of the main table that go through it, but for those that its addresses bring about.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Neighbour>,
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
}

/// Who has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The address.
    pub ip: IpAddr,
    /// Whose it is.
    pub mac: [u8; 6],
}
