// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a kubelet streams: port-forward, attach, exec with a terminal, and logs that are rotated.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use e2e::{DEADLINE, Node, eventually};
use k8s_cri::v1;
use nix::sched::{CloneFlags, setns};

use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{PYTHON, import_python};
use crate::web_socket::WebSocket;

/// Channels of exec and attach.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Channels of port-forward.
const DATA: u8 = 0;

/// Servers on the loopback addresses of either family, which give back what they get.
const ECHO: &str = "
import socket, threading
def echo(connection):
    while True:
        data = connection.recv(65536)
        if not data:
            break
        connection.sendall(data)
    connection.close()
def serve(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()
for family, address in ((socket.AF_INET, ('127.0.0.1', 7001)), (socket.AF_INET6, ('::1', 7002))):
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen(200)
    threading.Thread(target=serve, args=(listener,)).start()
print('ready', flush=True)
";

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A pod with the servers.
fn echo_pod(kubelet: &mut Kubelet, name: &str) -> Pod {
    import_python();
    let pod = kubelet.run_pod(name);
    let container = kubelet
        .create_with(&pod, "echo", 0, &["python3", "-c", ECHO], |config| {
            config.image = Some(v1::ImageSpec {
                image: PYTHON.to_owned(),
                ..Default::default()
            });
        })
        .unwrap();
    kubelet.start(&container);
    eventually("the servers listen", || {
        (kubelet.log("echo", 0, "stdout") == "ready\n").then_some(())
    });
    pod
}

/// Connects in the network namespace of the one pod there is, as containerd does.
fn dial(address: &str) -> std::io::Result<TcpStream> {
    let address: SocketAddr = address.parse().unwrap();
    let namespace = fs::read_dir("/run/netns").unwrap().next().unwrap().unwrap();
    let namespace = File::open(namespace.path()).unwrap();
    let dialled = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        TcpStream::connect_timeout(&address, DEADLINE)
    });
    let client = dialled.join().unwrap()?;
    client.set_read_timeout(Some(DEADLINE))?;
    client.set_write_timeout(Some(DEADLINE))?;
    Ok(client)
}

/// Bytes of which no two places look the same.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len / 8).flatten().collect()
}

#[test]
fn forwarded_port_reaches_the_loopback_of_the_guest() {
    let _node = Node::new("forwarded_port_reaches_the_loopback_of_the_guest");
    let mut kubelet = Kubelet::new("forward");
    let pod = echo_pod(&mut kubelet, "forward");
    for address in [
        "127.0.0.1:7001",
        "127.0.0.1:7002",
        "[::1]:7001",
        "[::1]:7002",
    ] {
        let mut client = dial(address).unwrap();
        client.write_all(address.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, address);
    }

    let refused = dial("127.0.0.1:9").and_then(|mut client| client.read(&mut [0; 1]));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionReset);

    let mut clients: Vec<_> = (0..100).map(|_| dial("127.0.0.1:7001").unwrap()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(format!("{number:08}").as_bytes()).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut answer = [0; 8];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("{number:08}").as_bytes());
    }

    // The end of the pod is the end of what is open.
    kubelet.stop_pod(&pod);
    for mut client in clients {
        assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
}

#[test]
fn forwarded_port_carries_64_mib_each_way() {
    const LEN: usize = 64 << 20;
    let _node = Node::new("forwarded_port_carries_64_mib_each_way");
    let mut kubelet = Kubelet::new("bulk");
    echo_pod(&mut kubelet, "bulk");
    let client = dial("127.0.0.1:7001").unwrap();
    let mut writer = client.try_clone().unwrap();
    let sending = thread::spawn(move || {
        writer.write_all(&pattern(LEN)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::with_capacity(LEN);
    (&client).read_to_end(&mut got).unwrap();
    sending.join().unwrap();
    assert!(got == pattern(LEN), "{} bytes came back", got.len());
}

#[test]
fn port_forward_of_the_kubelet_reaches_the_guest() {
    let _node = Node::new("port_forward_of_the_kubelet_reaches_the_guest");
    let mut kubelet = Kubelet::new("kubelet-forward");
    let pod = echo_pod(&mut kubelet, "kubelet-forward");
    for port in [7001_u16, 7002] {
        let url = kubelet.port_forward(&pod, port);
        let mut stream = WebSocket::open(&format!("{url}?port={port}"));
        // Each channel begins with the port.
        assert_eq!(stream.receive().unwrap().1, port.to_le_bytes());
        stream.send(DATA, b"over CRI");
        stream.receive_until(DATA, "over CRI");
    }
}

#[test]
fn exec_with_a_terminal_has_its_size_and_its_input() {
    let _node = Node::new("exec_with_a_terminal_has_its_size_and_its_input");
    let mut kubelet = Kubelet::new("terminal");
    let pod = kubelet.run_pod("terminal");
    let container = kubelet.run(&pod, "main", &["sleep", "infinity"]);
    let mut stream = WebSocket::open(&kubelet.exec_url(&container, &["sh"]));
    stream.send(RESIZE, br#"{"Width":100,"Height":40}"#);
    // The size comes beside the input, not before it.
    stream.send(
        STDIN,
        b"until [ \"$(stty size)\" = '40 100' ]; do sleep 0.1; done; echo si''zed\n",
    );
    stream.receive_until(STDOUT, "sized");
    stream.send(RESIZE, br#"{"Width":33,"Height":7}"#);
    stream.send(
        STDIN,
        b"until [ \"$(stty size)\" = '7 33' ]; do sleep 0.1; done; echo a''gain\n",
    );
    stream.receive_until(STDOUT, "again");
    stream.send(STDIN, b"exit 7\n");
    let status = String::from_utf8(stream.rest(STATUS)).unwrap();
    assert!(status.contains("\"7\""), "{status}");
}

#[test]
fn attach_comes_and_goes_and_loses_nothing() {
    let _node = Node::new("attach_comes_and_goes_and_loses_nothing");
    let mut kubelet = Kubelet::new("attach");
    let pod = kubelet.run_pod("attach");
    let command = sh("while read line; do echo got $line; done; echo over");
    let container = kubelet
        .create_with(&pod, "main", 0, &command, |config| config.stdin = true)
        .unwrap();
    kubelet.start(&container);
    let mut expected = String::new();
    for round in 0..3 {
        let mut stream = WebSocket::open(&kubelet.attach_url(&container));
        stream.send(STDIN, format!("line {round}\n").as_bytes());
        stream.receive_until(STDOUT, &format!("got line {round}"));
        expected.push_str(&format!("got line {round}\n"));
    }
    // Two at once see the same output.
    let mut both = [(); 2].map(|()| WebSocket::open(&kubelet.attach_url(&container)));
    // An attach is there when its output is; the first line of either may come before the other is.
    both[0].send(STDIN, b"first\n");
    both[0].receive_until(STDOUT, "got first");
    both[1].send(STDIN, b"second\n");
    for stream in &mut both {
        stream.receive_until(STDOUT, "got second");
    }
    expected.push_str("got first\ngot second\n");
    drop(both);
    eventually("the log is whole", || {
        (kubelet.log("main", 0, "stdout").len() >= expected.len()).then_some(())
    });
    assert_eq!(kubelet.log("main", 0, "stdout"), expected);
}

#[test]
fn input_once_ends_with_the_first_client() {
    let _node = Node::new("input_once_ends_with_the_first_client");
    let mut kubelet = Kubelet::new("once");
    let pod = kubelet.run_pod("once");
    let container = kubelet
        .create_with(&pod, "main", 0, &sh("cat; echo over"), |config| {
            config.stdin = true;
            config.stdin_once = true;
        })
        .unwrap();
    kubelet.start(&container);
    let mut stream = WebSocket::open(&kubelet.attach_url(&container));
    stream.send(STDIN, b"all there is\n");
    stream.receive_until(STDOUT, "all there is");
    drop(stream);
    assert_eq!(kubelet.exit_code(&container), 0);
    eventually("the log is whole", || {
        (kubelet.log("main", 0, "stdout") == "all there is\nover\n").then_some(())
    });
}

#[test]
fn rotated_log_loses_no_line() {
    let _node = Node::new("rotated_log_loses_no_line");
    let mut kubelet = Kubelet::new("rotated");
    let pod = kubelet.run_pod("rotated");
    let script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done; echo end";
    let container = kubelet.run(&pod, "main", &sh(script));
    let mut log = String::new();
    for _ in 0..5 {
        eventually("there is something to rotate", || {
            (!kubelet.log("main", 0, "stdout").is_empty()).then_some(())
        });
        let last = kubelet.log("main", 0, "stdout").ends_with("end\n");
        if last {
            break;
        }
        log.push_str(&kubelet.rotate_log(&container, "main", 0));
    }
    assert_eq!(kubelet.exit_code(&container), 0);
    eventually("the log is whole", || {
        kubelet
            .log("main", 0, "stdout")
            .ends_with("end\n")
            .then_some(())
    });
    log.push_str(&kubelet.log("main", 0, "stdout"));
    let expected: String = (1..=3000)
        .map(|number| format!("line {number}\n"))
        .collect();
    assert_eq!(log, expected + "end\n");
}

#[test]
fn logs_of_short_containers_are_complete() {
    let _node = Node::new("logs_of_short_containers_are_complete");
    let mut kubelet = Kubelet::new("short");
    let pod = kubelet.run_pod("short");
    let expected: String = (1..=2000).map(|number| format!("{number}\n")).collect();
    for attempt in 0..12 {
        let container = kubelet.create(&pod, "main", attempt, &["seq", "1", "2000"]);
        kubelet.start(&container);
        assert_eq!(kubelet.exit_code(&container), 0);
        kubelet.remove(&container);
        eventually("the log is whole", || {
            (kubelet.log("main", attempt, "stdout").len() >= expected.len()).then_some(())
        });
        assert_eq!(kubelet.log("main", attempt, "stdout"), expected);
    }
}
