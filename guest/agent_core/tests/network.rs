// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Network cards set up in a network namespace of the test's own, where ends of veth pairs are the cards. Needs root;
//! without it the test says so and passes.
#![expect(clippy::unwrap_used, reason = "test")]

use agent_core::linux::network::configure;
use agent_core::{CardPlan, Error, NetworkPlan, Prefix, RoutePlan, RulePlan};
use network_testbed::{Namespace, is_root};

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix {
        ip: address.parse().unwrap(),
        length: length.parse().unwrap(),
    }
}

fn route(destination: &str, gateway: Option<&str>) -> RoutePlan {
    RoutePlan {
        destination: prefix(destination),
        gateway: gateway.map(|ip| ip.parse().unwrap()),
        source: None,
        metric: 0,
        scope: if gateway.is_some() { 0 } else { 253 },
        onlink: false,
        table: 254,
        mtu: 0,
        advmss: 0,
    }
}

fn card(name: &str, last: u8) -> CardPlan {
    let link_local = RoutePlan {
        metric: 256,
        scope: 0,
        ..route("fe80::/64", None)
    };
    CardPlan {
        mac: [2, 0, 0, 0, 0, last],
        name: name.to_owned(),
        mtu: 1400,
        addresses: vec![prefix(&format!("fe80::{last}/64"))],
        routes: vec![link_local],
        neighbours: Vec::new(),
    }
}

#[test]
fn cards_get_all_that_the_plan_says_and_nothing_else() {
    if !is_root() {
        return;
    }
    let guest = Namespace::new();
    // The kernel's names are the wrong way round.
    guest.ip("link add eth0 address 02:00:00:00:00:02 type veth peer name peer0");
    guest.ip("link add eth1 address 02:00:00:00:00:01 type veth peer name peer1");
    guest.ip("link set peer0 up");
    guest.ip("link set peer1 up");
    let mut eth0 = card("eth0", 1);
    eth0.addresses
        .extend([prefix("10.1.2.3/24"), prefix("fd00::3/64")]);
    eth0.neighbours = vec![("10.1.2.9".parse().unwrap(), [2, 0, 0, 0, 0, 9])];
    eth0.routes.extend([
        // Before the route to its gateway.
        route("0.0.0.0/0", Some("10.1.2.1")),
        route("10.1.2.1/32", None),
        RoutePlan {
            metric: 7,
            mtu: 1300,
            advmss: 1200,
            source: Some("10.1.2.3".parse().unwrap()),
            ..route("10.9.0.0/16", Some("10.1.2.1"))
        },
        route("::/0", Some("fe80::99")),
    ]);
    let mut net1 = card("net1", 2);
    net1.addresses.push(prefix("172.16.0.5/32"));
    net1.routes.push(RoutePlan {
        onlink: true,
        table: 1000,
        ..route("192.168.0.0/16", Some("169.254.1.1"))
    });
    let plan = NetworkPlan {
        cards: vec![eth0, net1],
        rules: vec![RulePlan {
            priority: 500,
            table: 1000,
            source: prefix("172.16.0.5/32"),
            destination: prefix("0.0.0.0/0"),
        }],
    };
    guest.inside(move || configure(&plan).unwrap());
    let seen = [
        "-br link show type veth",
        "-o addr show dev eth0",
        "-o addr show dev net1",
        "route show",
        "-6 route show",
        "route show table 1000",
        "rule show",
        "neigh show nud permanent",
    ]
    .map(|arguments| guest.ip(arguments));
    let [links, eth0, net1, routes, routes6, table, rules, neighbours] = seen;
    let mac_of = |name: &str| {
        let line = links.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(2).unwrap().to_owned()
    };
    assert_eq!(mac_of("eth0"), "02:00:00:00:00:01");
    assert_eq!(mac_of("net1"), "02:00:00:00:00:02");
    assert_eq!(eth0.lines().count(), 3, "{eth0}");
    for expected in ["10.1.2.3/24 brd 10.1.2.255", "fd00::3/64", "fe80::1/64"] {
        assert!(eth0.contains(expected), "{expected} in {eth0}");
    }
    assert!(!eth0.contains("tentative"), "{eth0}");
    assert_eq!(net1.lines().count(), 2, "{net1}");
    let mut routes: Vec<&str> = routes.lines().map(str::trim).collect();
    routes.sort_unstable();
    assert_eq!(
        routes,
        [
            "10.1.2.1 dev eth0 proto static scope link",
            "10.9.0.0/16 via 10.1.2.1 dev eth0 proto static src 10.1.2.3 metric 7 mtu 1300 advmss 1200",
            "default via 10.1.2.1 dev eth0 proto static",
        ]
    );
    for expected in [
        "fe80::/64 dev eth0 proto static metric 256",
        "fe80::/64 dev net1 proto static metric 256",
        "default via fe80::99 dev eth0 proto static",
    ] {
        assert!(routes6.contains(expected), "{expected} in {routes6}");
    }
    assert_eq!(
        table.trim(),
        "192.168.0.0/16 via 169.254.1.1 dev net1 proto static onlink"
    );
    assert!(
        rules.contains("500:\tfrom 172.16.0.5 lookup 1000"),
        "{rules}"
    );
    assert!(
        neighbours.contains("10.1.2.9 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT"),
        "{neighbours}"
    );
}

#[test]
fn card_that_is_not_there_is_named() {
    if !is_root() {
        return;
    }
    let plan = NetworkPlan {
        cards: vec![card("eth0", 1)],
        rules: Vec::new(),
    };
    let error = Namespace::new().inside(move || configure(&plan).unwrap_err());
    assert!(
        matches!(&error, Error::NoCard(name) if name == "eth0"),
        "{error}"
    );
}

#[test]
fn card_too_small_for_ipv6_speaks_ipv4() {
    if !is_root() {
        return;
    }
    let guest = Namespace::new();
    guest.ip("link add eth0 mtu 1000 address 02:00:00:00:00:01 type veth peer name peer0");
    let plan = NetworkPlan {
        cards: vec![CardPlan {
            mtu: 1000,
            addresses: vec![prefix("10.1.2.3/24")],
            routes: Vec::new(),
            ..card("eth0", 1)
        }],
        rules: Vec::new(),
    };
    guest.inside(move || configure(&plan).unwrap());
    let addresses = guest.ip("-o addr show dev eth0");
    assert!(addresses.contains("10.1.2.3/24"), "{addresses}");
    assert!(!addresses.contains("inet6"), "{addresses}");
}
