// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pod's network as its containers, its neighbours and kubelet's probes see it.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use e2e::{DEADLINE, eventually};
use k8s_cri::v1;

use super::client::{Running, security};
use super::shared::Shared;
use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{IDLE, PodDir, mount, sh};

/// The node's address on the CNI plugin's bridge.
const NODE: &str = "10.88.0.1";

static POD: Shared<Web> = Shared::new(Web::new);

/// A pod that serves, and a neighbour.
struct Web {
    running: Running,
    ip: String,
    neighbour: Pod,
    neighbours_main: String,
}

impl Web {
    fn new() -> Self {
        let mut running = Running::new("web");
        let ip = running.kubelet.pod_ip(&running.pod);
        running.output("mkdir /www && echo healthy > /www/healthz && httpd -p 8080 -h /www && httpd -p 127.0.0.1:9090 -h /www");
        let neighbour = running.kubelet.run_pod("neighbour");
        let neighbours_main = running.kubelet.run(&neighbour, "neighbour", &IDLE);
        Self {
            running,
            ip,
            neighbour,
            neighbours_main,
        }
    }

    /// What the neighbouring pod says to a script.
    fn neighbour_output(&self, script: &str) -> String {
        let executed = self
            .running
            .kubelet
            .exec(&self.neighbours_main, &sh(script));
        assert_eq!(executed.code, 0, "{script}: {executed:?}");
        executed.stdout
    }
}

/// An HTTP GET as kubelet's probes make it: status and body.
fn get(host: &str, port: u16, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect((host, port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // In one segment, as the kubelet sends it: where a full queue has the server answer SYNs with cookies, a second segment
    // without the first is reset, by any Linux.
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: kube-probe/1.30\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, body.to_owned())
}

#[test]
fn http_probe_has_the_servers_status_and_body() {
    let web = POD.case();
    assert_eq!(
        get(&web.ip, 8080, "/healthz"),
        (200, "healthy\n".to_owned())
    );
    assert_eq!(get(&web.ip, 8080, "/missing").0, 404);
}

#[test]
fn tcp_probe_of_an_open_port_succeeds_and_of_a_closed_one_is_refused_at_once() {
    let web = POD.case();
    let dial = |port: u16| {
        let address = format!("{}:{port}", web.ip).parse().unwrap();
        TcpStream::connect_timeout(&address, Duration::from_secs(10))
    };
    dial(8080).unwrap();
    assert_eq!(dial(8081).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn port_on_the_pods_loopback_is_not_reachable_from_outside() {
    let web = POD.case();
    let dialled = TcpStream::connect((web.ip.as_str(), 9090));
    assert_eq!(dialled.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(
        web.running
            .output("wget -q -O - http://127.0.0.1:9090/healthz"),
        "healthy\n"
    );
}

#[test]
fn containers_of_a_pod_reach_each_other_on_localhost() {
    let web = POD.case();
    let ended = web.running.script(
        "client",
        "wget -q -O - http://127.0.0.1:8080/healthz",
        |_| (),
    );
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "healthy\n"));
}

#[test]
fn pod_reaches_itself_at_its_own_address() {
    let web = POD.case();
    let fetch = format!("wget -q -O - http://{}:8080/healthz", web.ip);
    assert_eq!(web.running.output(&fetch), "healthy\n");
}

#[test]
fn pod_reaches_another_pod_at_its_address() {
    let web = POD.case();
    let fetch = format!("wget -q -O - http://{}:8080/healthz", web.ip);
    assert_eq!(web.neighbour_output(&fetch), "healthy\n");
    let own = web.running.kubelet.pod_ip(&web.neighbour);
    assert_ne!(own, web.ip);
}

#[test]
fn port_of_one_pod_is_not_anothers() {
    let web = POD.case();
    let own = web.running.kubelet.pod_ip(&web.neighbour);
    let dialled = TcpStream::connect((own.as_str(), 8080));
    assert_eq!(dialled.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // Both may have the same port.
    web.neighbour_output("mkdir /www && echo another > /www/healthz && httpd -p 8080 -h /www");
    assert_eq!(get(&own, 8080, "/healthz"), (200, "another\n".to_owned()));
    assert_eq!(
        get(&web.ip, 8080, "/healthz"),
        (200, "healthy\n".to_owned())
    );
    web.neighbour_output("killall httpd");
}

#[test]
fn ping_of_any_size_goes_out_of_the_pod_and_into_it() {
    let web = POD.case();
    // The larger one is cut into fragments on its way.
    for size in [56, 8000] {
        let out = web
            .running
            .output(&format!("ping -c 2 -W 60 -s {size} {NODE}"));
        assert!(out.contains(" 0% packet loss"), "{out}");
        let between = web.neighbour_output(&format!("ping -c 2 -W 60 -s {size} {}", web.ip));
        assert!(between.contains(" 0% packet loss"), "{between}");
    }
}

#[test]
fn datagram_goes_out_of_the_pod_and_its_answer_comes_back() {
    let web = POD.case();
    let socket = UdpSocket::bind((NODE, 0)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        // A TFTP server (RFC 1350) of one file of one block: request, data 1, acknowledgement of 1.
        let mut buffer = [0; 2048];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert!(
            buffer[..len].starts_with(b"\0\x01file\0octet\0"),
            "{buffer:?}"
        );
        socket.send_to(b"\0\x03\0\x01answer", from).unwrap();
        let (len, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"\0\x04\0\x01");
        from.ip().to_string()
    });
    let got = web
        .running
        .output(&format!("tftp -g -l - -r file {NODE} {port}"));
    assert_eq!(got, "answer");
    assert_eq!(server.join().unwrap(), web.ip);
}

#[test]
fn server_keeps_its_port_when_another_container_of_the_pod_ends() {
    let web = POD.case();
    let other = web.running.kubelet.run(&web.running.pod, "other", &IDLE);
    web.running.discard(&other);
    assert_eq!(get(&web.ip, 8080, "/healthz").0, 200);
}

#[test]
fn port_of_a_container_that_was_killed_is_free_for_the_next() {
    let web = POD.case();
    let serve = |attempt: u32| {
        let script =
            format!("mkdir /www; echo {attempt} > /www/attempt; exec httpd -f -p 8300 -h /www");
        let id = web
            .running
            .kubelet
            .create(&web.running.pod, "server", attempt, &sh(&script));
        web.running.kubelet.start(&id);
        let got = eventually("it serves", || {
            TcpStream::connect((web.ip.as_str(), 8300)).ok()?;
            Some(get(&web.ip, 8300, "/attempt"))
        });
        assert_eq!(got, (200, format!("{attempt}\n")));
        web.running.discard(&id);
        let gone = TcpStream::connect((web.ip.as_str(), 8300));
        assert_eq!(gone.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    };
    serve(0);
    serve(1);
}

#[test]
fn pod_without_dns_config_has_the_nodes() {
    let web = POD.case();
    let of_node = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(web.running.output("cat /etc/resolv.conf"), of_node);
}

#[test]
fn loopback_is_up_for_both_families() {
    let web = POD.case();
    let addresses = web
        .running
        .output("ip -o addr show dev lo | tr -s ' ' | cut -d' ' -f4");
    assert_eq!(addresses, "127.0.0.1/8\n::1/128\n");
}

#[test]
fn connections_at_the_same_time_are_all_served() {
    let web = POD.case();
    let codes: Vec<u16> = thread::scope(|scope| {
        let ip = web.ip.as_str();
        let threads: Vec<_> = (0..20)
            .map(|_| scope.spawn(move || get(ip, 8080, "/healthz").0))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(codes, [200; 20]);
}

#[test]
fn network_of_a_pod_is_gone_with_it() {
    let web = POD.case();
    let mut kubelet = Kubelet::new("leaves");
    let pod = kubelet.run_pod("leaves");
    let main = kubelet.run(&pod, "main", &IDLE);
    let ip = kubelet.pod_ip(&pod);
    assert_eq!(kubelet.exec(&main, &sh("httpd -p 80 -h /etc")).code, 0);
    assert_eq!(get(&ip, 80, "/passwd").0, 200);
    kubelet.stop_pod(&pod);
    let dialled = TcpStream::connect_timeout(
        &format!("{ip}:80").parse().unwrap(),
        Duration::from_secs(10),
    );
    assert!(dialled.is_err(), "{dialled:?}");
    assert_eq!(
        get(&web.ip, 8080, "/healthz").0,
        200,
        "others are as they were"
    );
}

#[test]
fn packet_filter_of_the_pod_is_set_with_net_admin_alone() {
    let pod = POD.case();
    let running = &pod.running;
    let dir = PodDir::new("web");
    // The node's own nft, with its libraries.
    let folder = dir.path.join("nft");
    let copy = format!(
        "mkdir {0} && LD_TRACE_LOADED_OBJECTS=1 $(command -v nft) | grep -o '/[^ ]*' | xargs -I@ cp -L @ {0} && cp $(command -v nft) {0}",
        folder.display()
    );
    e2e::run("sh", &["-c", &copy]).success();
    let filter = "nft() { /nft/ld-linux-x86-64.so.2 --library-path /nft /nft/nft \"$@\"; }; \
                  heard() { ping -6 -c 1 -W 5 ::1 > /dev/null 2>&1 && echo heard || echo lost; }; heard; \
                  nft add table ip6 t && nft 'add chain ip6 t out { type filter hook output priority 0; }' && \
                  nft add rule ip6 t out icmpv6 type echo-request counter drop && heard; \
                  nft list table ip6 t | grep -c 'counter packets [1-9]'; nft delete table ip6 t && heard";
    let run = |name: &str, add: &[&str]| {
        running.script(name, &format!("({filter}) 2>&1"), |config| {
            config.mounts = vec![mount(&folder, "/nft", true)];
            security(config).capabilities = Some(v1::Capability {
                add_capabilities: add.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            });
        })
    };
    let with = run("nft", &["NET_ADMIN"]);
    assert_eq!(with.stdout, "heard\nlost\n1\nheard\n");
    let without = run("no-nft", &[]);
    assert!(
        without.stdout.contains("Operation not permitted"),
        "{without:?}"
    );
}
