// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Port-forward. What else a kubelet streams is with [`kubernetes`](crate::kubernetes).

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use e2e::{DEADLINE, Node, count, eventually};
use k8s_cri::v1;
use nix::sched::{CloneFlags, setns};

use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{PYTHON, import_python};
use crate::web_socket::WebSocket;

/// The channel of port-forward that carries bytes.
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
    // Through the kubelet's own call.
    for port in [7001_u16, 7002] {
        let url = kubelet.port_forward(&pod, port);
        let mut stream = WebSocket::open(&format!("{url}?port={port}"));
        // Each channel begins with the port.
        assert_eq!(stream.receive().unwrap().1, port.to_le_bytes());
        stream.send(DATA, b"over CRI");
        stream.receive_until(DATA, "over CRI");
    }

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
fn forwarded_port_carries_mebibytes_each_way() {
    let len = usize::try_from(count(16, 64)).unwrap() << 20;
    let _node = Node::new("forwarded_port_carries_mebibytes_each_way");
    let mut kubelet = Kubelet::new("bulk");
    echo_pod(&mut kubelet, "bulk");
    let client = dial("127.0.0.1:7001").unwrap();
    let mut writer = client.try_clone().unwrap();
    let sending = thread::spawn(move || {
        writer.write_all(&pattern(len)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::with_capacity(len);
    (&client).read_to_end(&mut got).unwrap();
    sending.join().unwrap();
    assert!(got == pattern(len), "{} bytes came back", got.len());
}
