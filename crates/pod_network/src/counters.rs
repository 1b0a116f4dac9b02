// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What has passed through a pod's interfaces, counted where the CNI has put them: before the tap for what comes in, behind
//! its filter for what goes out. The numbers are those that any container runtime's pod would have.

use std::fs;
use std::path::Path;

use crate::NetError;
use crate::apply::TAP_PREFIX;
use crate::namespace;

/// The counters of one interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Its name.
    pub name: String,
    /// Bytes, packets, errors and drops of what the pod has received.
    pub received: [u64; 4],
    /// The same of what it has sent.
    pub sent: [u64; 4],
}

/// The most interfaces that are told of.
const MAX_INTERFACES: usize = 64;

/// The counters of every interface of the namespace, but for loopback and our taps.
///
/// # Errors
/// [`NetError::Namespace`], also if it is gone.
pub fn counters(namespace: &Path) -> Result<Vec<Counters>, NetError> {
    namespace::run_in(namespace, || {
        let text = fs::read_to_string("/proc/thread-self/net/dev");
        let text = text.map_err(NetError::step("read", "/proc/net/dev"))?;
        Ok(parse(&text))
    })
}

/// The lines of `/proc/net/dev`: "eth0: " and 16 counters, of which 1 to 4 and 9 to 12 are the directions' bytes,
/// packets, errors and drops (proc_pid_net(5)).
fn parse(text: &str) -> Vec<Counters> {
    let lines = text.lines().filter_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        let name = name.trim();
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        Some(Counters {
            name: name.to_owned(),
            received: *numbers.first_chunk()?,
            sent: *numbers.get(8..)?.first_chunk()?,
        })
    });
    lines
        .filter(|counters| counters.name != "lo" && !counters.name.starts_with(TAP_PREFIX))
        .take(MAX_INTERFACES)
        .collect()
}

#[cfg(test)]
mod tests {
    use network_testbed::{Namespace, is_root};

    use super::*;

    #[test]
    fn counters_have_their_places() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
  eth1: 1 2 3 4 5 6 7 8 9 10 11
  eth2: 1 2 x 4 5 6 7 8 9 10 11 12 13 14 15 16
";
        let eth0 = Counters {
            name: "eth0".to_owned(),
            received: [1, 2, 3, 4],
            sent: [9, 10, 11, 12],
        };
        assert_eq!(parse(text), [eth0]);
        assert_eq!(parse(&format!("{TAP_PREFIX}7: {}", "1 ".repeat(16))), []);
        assert_eq!(parse(""), []);
        let many = format!("e: {}\n", "1 ".repeat(16)).repeat(MAX_INTERFACES + 1);
        assert_eq!(parse(&many).len(), MAX_INTERFACES);
    }

    #[test]
    fn namespace_tells_of_its_interfaces_but_loopback() {
        if !is_root() {
            return;
        }
        let pod = Namespace::new();
        pod.ip("link add eth0 type veth peer name eth0p");
        pod.ip("link set eth0 up");
        let names: Vec<String> = counters(&pod.path())
            .unwrap()
            .into_iter()
            .map(|counters| counters.name)
            .collect();
        assert!(names.contains(&"eth0".to_owned()), "{names:?}");
        assert!(!names.contains(&"lo".to_owned()), "{names:?}");
        assert!(counters(Path::new("/nowhere/netns")).is_err());
    }
}
