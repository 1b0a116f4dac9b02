// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A pod's network: from its network namespace to the cards of its VM and to what the agent makes of them.

use std::net::{IpAddr, TcpListener};
use std::path::Path;

use agent_proto::api;
use hypervisor::NetworkInterface;
use pod_network::{
    Address, Interface, LoopbackGuard, LoopbackListener, Metadata, NetError, PodNetwork, Route,
    Rule,
};
use pod_spec::MetadataService;
use sandbox::{InterfaceCounters, SandboxError, SandboxErrorKind, Traffic};

/// A pod's network, joined; undone on drop.
#[derive(Debug)]
pub(crate) struct JoinedNetwork {
    /// For the driver.
    pub(crate) cards: Vec<NetworkInterface>,
    /// For the agent.
    pub(crate) interfaces: Vec<api::NetworkInterface>,
    /// For the agent.
    pub(crate) rules: Vec<api::RoutingRule>,
    /// Undoes on drop, after the cards.
    pub(crate) guard: PodNetwork,
}

/// Joins the interfaces of the namespace to taps.
pub(crate) fn join(
    namespace: &Path,
    metadata: MetadataService,
) -> Result<JoinedNetwork, SandboxError> {
    let metadata = match metadata {
        MetadataService::Denied => Metadata::Denied,
        MetadataService::Allowed => Metadata::Allowed,
    };
    let (guard, plan) = PodNetwork::attach(namespace, metadata).map_err(network_error)?;
    let interfaces = plan.taps.iter().map(|tap| interface(&tap.interface));
    Ok(JoinedNetwork {
        interfaces: interfaces.collect(),
        rules: plan.rules.iter().map(rule).collect(),
        cards: plan
            .taps
            .into_iter()
            .map(|tap| NetworkInterface {
                tap: tap.tap,
                mac: tap.interface.mac,
                mtu: tap.interface.mtu,
            })
            .collect(),
        guard,
    })
}

/// Takes over the TCP ports of the namespace's loopback, so that port-forward reaches the guest. A node that does not allow
/// it has pods all the same, whose ports cannot be forwarded.
pub(crate) fn take_loopback(namespace: &Path) -> Option<(TcpListener, LoopbackGuard)> {
    match LoopbackListener::open(namespace) {
        Ok(LoopbackListener { listener, guard }) => Some((listener, guard)),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "port-forward will not reach this pod: the node's kernel must be 5.9 or later, and let the shim load BPF programs"
            );
            None
        }
    }
}

/// What has passed through the namespace's interfaces; nothing if it is gone.
pub(crate) fn counters(namespace: &Path) -> Vec<InterfaceCounters> {
    let traffic = |[bytes, packets, errors, dropped]: [u64; 4]| Traffic {
        bytes,
        packets,
        errors,
        dropped,
    };
    match pod_network::counters(namespace) {
        Ok(all) => all
            .into_iter()
            .map(|counters| InterfaceCounters {
                name: counters.name,
                received: traffic(counters.received),
                sent: traffic(counters.sent),
            })
            .collect(),
        Err(error) => {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "the pod's network is not counted"
            );
            Vec::new()
        }
    }
}

fn network_error(error: NetError) -> SandboxError {
    let kind = match &error {
        NetError::Namespace { .. } => SandboxErrorKind::FailedPrecondition,
        NetError::NodeNamespace(_) | NetError::Unsupported { .. } => {
            SandboxErrorKind::Unimplemented
        }
        NetError::TooMany { .. } => SandboxErrorKind::ResourceExhausted,
        NetError::Step { .. } => SandboxErrorKind::Internal,
    };
    SandboxError::new(kind, "join the pod's network").because(error)
}

fn interface(found: &Interface) -> api::NetworkInterface {
    let neighbours = found.neighbours.iter().map(|neighbour| api::Neighbour {
        address: bytes(neighbour.ip),
        mac: neighbour.mac.to_vec(),
        ..api::Neighbour::default()
    });
    api::NetworkInterface {
        mac: found.mac.to_vec(),
        name: found.name.clone(),
        mtu: u32::from(found.mtu),
        addresses: found.addresses.iter().copied().map(prefix).collect(),
        routes: found.routes.iter().map(route).collect(),
        neighbours: neighbours.collect(),
        ..api::NetworkInterface::default()
    }
}

fn route(found: &Route) -> api::Route {
    api::Route {
        destination: Some(prefix(found.destination)).into(),
        gateway: found.gateway.map(bytes).unwrap_or_default(),
        source: found.source.map(bytes).unwrap_or_default(),
        metric: found.metric,
        scope: u32::from(found.scope),
        onlink: found.onlink,
        table: found.table,
        mtu: found.mtu,
        advmss: found.advmss,
        ..api::Route::default()
    }
}

fn rule(found: &Rule) -> api::RoutingRule {
    api::RoutingRule {
        priority: found.priority,
        table: found.table,
        source: Some(prefix(found.source)).into(),
        destination: Some(prefix(found.destination)).into(),
        ..api::RoutingRule::default()
    }
}

fn prefix(address: Address) -> api::IpPrefix {
    api::IpPrefix {
        address: bytes(address.ip),
        length: u32::from(address.prefix),
        ..api::IpPrefix::default()
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use agent_core::NetworkPlan;
    use network_testbed::{Namespace, is_root};

    use super::*;

    /// What differs between the pod's namespace and the guest without anybody seeing it.
    fn comparable(
        mut joined: JoinedNetwork,
    ) -> (Vec<api::NetworkInterface>, Vec<api::RoutingRule>) {
        for interface in &mut joined.interfaces {
            interface
                .addresses
                .sort_by_key(|prefix| prefix.address.clone());
            interface.routes.sort_by_key(|route| format!("{route:?}"));
        }
        (joined.interfaces.clone(), joined.rules.clone())
    }

    #[test]
    fn guest_has_the_network_that_the_cni_has_made() {
        if !is_root() {
            return;
        }
        let pod = Namespace::new();
        pod.ip("link set lo up");
        for (name, last) in [("eth0", 7), ("net1", 8)] {
            // The other ends, which would be in the node's namespace, are down and so no part of the pod.
            pod.ip(&format!(
                "link add {name} address 02:00:00:00:00:0{last} mtu 1400 type veth peer name {name}p"
            ));
            pod.ip(&format!("link set {name} up"));
        }
        for command in [
            "addr add 10.1.2.3/24 dev eth0",
            "-6 addr add fd00:1::3/64 dev eth0 nodad",
            // As the plugin ptp does.
            "route del 10.1.2.0/24 dev eth0",
            "route add 10.1.2.1 dev eth0 scope link",
            "route add default via 10.1.2.1 src 10.1.2.3",
            "-6 route add default via fd00:1::1 metric 99",
            "neigh add 10.1.2.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
            "addr add 172.16.0.5/32 dev net1",
            "route add 192.168.0.0/16 via 169.254.1.1 dev net1 onlink table 100 mtu 1300",
            "rule add from 172.16.0.5 lookup 100 priority 500",
        ] {
            pod.ip(command);
        }
        let joined = join(&pod.path(), MetadataService::Denied).unwrap();
        assert_eq!(joined.cards.len(), 2);
        assert_eq!((joined.cards[0].mac[5], joined.cards[0].mtu), (7, 1400));
        let wanted = comparable(joined);

        let guest = Namespace::new();
        guest.ip("link set lo up");
        // The cards, in another order and with the kernel's names.
        for (name, last) in [("eth0", 8), ("eth1", 7)] {
            guest.ip(&format!(
                "link add {name} address 02:00:00:00:00:0{last} type veth peer name {name}p"
            ));
        }
        let (interfaces, rules) = wanted.clone();
        guest.inside(move || {
            let plan = NetworkPlan::parse(interfaces, rules).unwrap();
            agent_core::linux::network::configure(&plan).unwrap();
        });
        // Found by the same code in the guest's namespace as in the pod's; there the cards came in another order.
        let mut found = comparable(join(&guest.path(), MetadataService::Denied).unwrap());
        found.0.sort_by_key(|interface| interface.mac.clone());
        assert_eq!(found, wanted);
    }

    #[test]
    fn network_that_is_not_there_is_said_so() {
        let error = join(Path::new("/nowhere/netns"), MetadataService::Denied).unwrap_err();
        assert_eq!(error.kind(), SandboxErrorKind::FailedPrecondition);
        assert!(
            error
                .report()
                .starts_with("join the pod's network: enter the network namespace /nowhere/netns"),
            "{}",
            error.report()
        );
    }
}
