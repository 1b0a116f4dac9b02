// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Sockets, virtual links, and nf_tables with NAT.

use std::fs::File;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::Report;
use crate::netlink::{APPEND, Message, NEW, Netlink, attribute, name, nested};

// rtnetlink(7), linux/if_link.h
const RTM_NEWLINK: u16 = 16;
const IFLA_LINK: u16 = 5;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/netfilter/nf_tables_compat.h
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT: u16 = NFNL_SUBSYS_NFTABLES << 8;
const NFT_MSG_NEWTABLE: u16 = NFT;
const NFT_MSG_NEWCHAIN: u16 = NFT | 3;
const NFT_MSG_NEWRULE: u16 = NFT | 6;
const NFPROTO_INET: u8 = 1;
const HOOK_OUTPUT: u32 = 3;
const HOOK_POSTROUTING: u32 = 4;

pub(crate) fn run(report: &mut Report) {
    for (label, family, kind) in [
        ("IPv4", AddressFamily::Inet, SockType::Stream),
        ("IPv6", AddressFamily::Inet6, SockType::Stream),
        ("Unix", AddressFamily::Unix, SockType::SeqPacket),
        ("packet", AddressFamily::Packet, SockType::Raw),
        ("vsock", AddressFamily::Vsock, SockType::Stream),
    ] {
        report.check(&format!("{label} sockets"), open_socket(family, kind, None));
    }
    report.check(
        "socket diagnosis",
        open_socket(
            AddressFamily::Netlink,
            SockType::Raw,
            Some(SockProtocol::NetlinkSockDiag),
        ),
    );
    report.check(
        "tun",
        File::open("/dev/net/tun").map(drop).map_err(Into::into),
    );
    links(report);
    for (label, hook, expression) in [
        ("masquerade", HOOK_POSTROUTING, "masq"),
        ("redirect", HOOK_OUTPUT, "redir"),
        ("conntrack", HOOK_OUTPUT, "counter"),
    ] {
        report.check(
            &format!("nf_tables {label}"),
            nat_rule(label, hook, expression),
        );
    }
    report.check(
        "conntrack",
        File::open("/proc/net/nf_conntrack")
            .map(drop)
            .map_err(Into::into),
    );
}

/// Family or protocol not supported is what a kernel without them says.
fn open_socket(
    family: AddressFamily,
    kind: SockType,
    protocol: Option<SockProtocol>,
) -> Result<()> {
    match socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol) {
        Ok(_) => Ok(()),
        Err(error) => bail!("{error}"),
    }
}

fn links(report: &mut Report) {
    report.check("link dummy", add_link("dummy", "parent0", &[]));
    let on_dummy = index_of("parent0").map(|index| attribute(IFLA_LINK, &index.to_ne_bytes()));
    let vlan_id = nested(
        IFLA_INFO_DATA,
        &[attribute(IFLA_VLAN_ID, &7_u16.to_ne_bytes())],
    );
    for (kind, needs_parent, data) in [
        ("bridge", false, None),
        ("veth", false, None),
        ("macvlan", true, None),
        ("ipvlan", true, None),
        ("vlan", true, Some(vlan_id)),
    ] {
        let result = if needs_parent {
            on_dummy
                .as_ref()
                .map_err(|error| Errno::from_raw(*error).into())
                .and_then(|parent| {
                    // macvlan and ipvlan exclude each other on one parent, so each link goes before the next comes.
                    let added = add_link_with(kind, "probe0", std::slice::from_ref(parent), data);
                    added.and_then(|()| delete_link("probe0"))
                })
        } else {
            add_link_with(kind, &format!("probe-{kind}"), &[], data)
        };
        report.check(&format!("link {kind}"), result);
    }
}

fn add_link(kind: &str, link: &str, attributes: &[Vec<u8>]) -> Result<()> {
    add_link_with(kind, link, attributes, None)
}

fn add_link_with(
    kind: &str,
    link: &str,
    attributes: &[Vec<u8>],
    data: Option<Vec<u8>>,
) -> Result<()> {
    let mut info = vec![name(IFLA_INFO_KIND, kind)];
    info.extend(data);
    let message = Message::new(RTM_NEWLINK, NEW, &[0; 16])
        .with(&[name(IFLA_IFNAME, link), nested(IFLA_LINKINFO, &info)])
        .with(attributes);
    Netlink::open(SockProtocol::NetlinkRoute)?.ask(vec![message], 1)
}

fn delete_link(link: &str) -> Result<()> {
    const RTM_DELLINK: u16 = 17;
    let message = Message::new(RTM_DELLINK, 0, &[0; 16]).with(&[name(IFLA_IFNAME, link)]);
    Netlink::open(SockProtocol::NetlinkRoute)?.ask(vec![message], 1)
}

fn index_of(link: &str) -> Result<u32, i32> {
    nix::net::if_::if_nametoindex(link).map_err(|error| error as i32)
}

/// A table of its own with a NAT chain, and in it one rule with one expression.
fn nat_rule(table: &str, hook: u32, expression: &str) -> Result<()> {
    // struct nfgenmsg: family, version, resource (big endian; of a batch: the subsystem)
    let family = [NFPROTO_INET, 0, 0, 0];
    let batch = [0, 0, 0, NFNL_SUBSYS_NFTABLES.to_be_bytes()[1]];
    // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY
    let hook = nested(
        4,
        &[
            attribute(1, &hook.to_be_bytes()),
            attribute(2, &100_i32.to_be_bytes()),
        ],
    );
    // NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA }
    let element = nested(1, &[name(1, expression), nested(2, &[])]);
    let messages = vec![
        Message::silent(NFNL_MSG_BATCH_BEGIN, &batch),
        // NFTA_TABLE_NAME
        Message::new(NFT_MSG_NEWTABLE, NEW, &family).with(&[name(1, table)]),
        // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_TYPE
        Message::new(NFT_MSG_NEWCHAIN, NEW, &family).with(&[
            name(1, table),
            name(3, "nat"),
            hook,
            name(7, "nat"),
        ]),
        // NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS
        Message::new(NFT_MSG_NEWRULE, APPEND, &family).with(&[
            name(1, table),
            name(2, "nat"),
            nested(4, &[element]),
        ]),
        Message::silent(NFNL_MSG_BATCH_END, &batch),
    ];
    Netlink::open(SockProtocol::NetlinkNetFilter)?
        .ask(messages, 3)
        .with_context(|| format!("add {expression}"))
}
