// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A pod's network: from its network namespace to the cards of its VM and to what the agent makes of them.

use std::net::IpAddr;
use std::path::Path;

use agent_proto::api;
use hypervisor::NetworkInterface;
use pod_network::{Address, Interface, Metadata, NetError, PodNetwork, Route, Rule};
use pod_spec::MetadataService;
use sandbox::{SandboxError, SandboxErrorKind};

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
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;
    use std::process::Command;

    use agent_core::NetworkPlan;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs `work` on a thread in a network namespace of its own, which lasts as long as the file.
    fn in_new_namespace<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> (T, File) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            (work(), namespace)
        });
        thread.join().unwrap()
    }

    fn ip(arguments: &str) -> String {
        let mut ip = Command::new("ip");
        let output = ip.args(arguments.split_whitespace()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn path(namespace: &File) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd()).into()
    }

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
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let ((), pod) = in_new_namespace(|| {
            ip("link set lo up");
            for (name, last) in [("eth0", 7), ("net1", 8)] {
                ip(&format!(
                    "link add {name} address 02:00:00:00:00:0{last} mtu 1400 type veth peer name {name}p"
                ));
                // The other ends would be in the node's namespace; these count as down.
                ip(&format!("link set {name} up"));
            }
            ip("addr add 10.1.2.3/24 dev eth0");
            ip("-6 addr add fd00:1::3/64 dev eth0 nodad");
            // As the plugin ptp does.
            ip("route del 10.1.2.0/24 dev eth0");
            ip("route add 10.1.2.1 dev eth0 scope link");
            ip("route add default via 10.1.2.1 src 10.1.2.3");
            ip("-6 route add default via fd00:1::1 metric 99");
            ip("neigh add 10.1.2.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
            ip("addr add 172.16.0.5/32 dev net1");
            ip("route add 192.168.0.0/16 via 169.254.1.1 dev net1 onlink table 100 mtu 1300");
            ip("rule add from 172.16.0.5 lookup 100 priority 500");
        });
        let joined = join(&path(&pod), MetadataService::Denied).unwrap();
        assert_eq!(joined.cards.len(), 2);
        assert_eq!((joined.cards[0].mac[5], joined.cards[0].mtu), (7, 1400));
        let wanted = comparable(joined);

        let (interfaces, rules) = wanted.clone();
        let ((), guest) = in_new_namespace(move || {
            ip("link set lo up");
            // The cards, in another order and with the kernel's names.
            for (name, last) in [("eth0", 8), ("eth1", 7)] {
                ip(&format!(
                    "link add {name} address 02:00:00:00:00:0{last} type veth peer name {name}p"
                ));
            }
            let plan = NetworkPlan::parse(interfaces, rules).unwrap();
            agent_core::linux::network::configure(&plan).unwrap();
        });
        // Found by the same code in the guest's namespace as in the pod's; there the cards came in another order.
        let mut found = comparable(join(&path(&guest), MetadataService::Denied).unwrap());
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
