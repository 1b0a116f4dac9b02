// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The guest's PID 1.
//!
//! As PID 1 it dials the host, says Hello, makes the guest's mounts while the host reads it, and serves. When the host's
//! connection closes, the VM ends. Every millisecond before the Hello is one of the pod's start, so nothing comes before
//! it that need not.
//!
//! Three other lives. Called `/pause` it is the first process of the pid namespace that a pod's containers share. Chosen by
//! the first argument where it is not PID 1: the helper that makes one process of a container, and an agent on unix sockets
//! in a folder, for tests on a machine without a VM.

mod transport;

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;

use agent_core::linux::{self, HELPER_ARGUMENT, Linux, MemoryWatch, boot};
use agent_core::{Agent, Service, log};
use agent_proto::{FORWARD_PORT, PROTOCOL_VERSION, STDIO_PORT, api, hello};
use rustix::time::{ClockId, clock_gettime};

use transport::{Connection, Transport};

/// More threads than requests that wait for the kernel at once would only cost memory.
const MAX_BLOCKING_THREADS: usize = 64;

fn main() -> ExitCode {
    let started_ns = boot_time_ns();
    // Process 1 too, of a namespace of its own.
    if std::env::args_os().next().as_deref() == Some(OsStr::new(oci_process::PAUSE)) {
        return oci_process::pause_main();
    }
    if std::process::id() == 1 {
        std::panic::set_hook(Box::new(|info| {
            let _ = writeln!(io::stderr(), "coffer-agent: {info}");
            boot::power_off();
        }));
        let ended = serve(&Transport::Vsock, started_ns, boot::set_up);
        if let Err(error) = ended {
            // The kernel's log may not reach the console; this does, where there is one.
            let _ = writeln!(io::stderr(), "coffer-agent: {error}");
        }
        boot::power_off();
        return ExitCode::FAILURE;
    }
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some(HELPER_ARGUMENT), _) => oci_process::helper_main(),
        (Some("serve-unix"), Some(folder)) => {
            match serve(
                &Transport::Unix(folder.into()),
                started_ns,
                boot::set_up_agent,
            ) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    let _ = writeln!(io::stderr(), "coffer-agent: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        _ => {
            let _ = writeln!(
                io::stderr(),
                "coffer-agent is the PID 1 of a microVM; it is not run by hand"
            );
            ExitCode::FAILURE
        }
    }
}

/// From the Hello to the end of the host's connection.
fn serve(
    transport: &Transport,
    started_ns: u64,
    set_up: fn() -> Result<(), agent_core::Error>,
) -> io::Result<()> {
    // The host may open streams as soon as it has the Hello.
    let listeners = Listeners {
        stdio: transport.listen(STDIO_PORT)?,
        forwarded: transport.listen(FORWARD_PORT)?,
    };
    let control = transport.dial()?;
    say_hello(&control, started_ns)?;
    set_up().map_err(|error| io::Error::other(error.chain()))?;
    if std::process::id() != 1 {
        // Orphans of containers come here, as they come to PID 1.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()?
        .block_on(run(listeners, control))
}

fn say_hello(control: &OwnedFd, started_ns: u64) -> io::Result<()> {
    let greeting = api::Hello {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        agent_started_ns: started_ns,
        agent_ready_ns: boot_time_ns(),
        ..Default::default()
    };
    let frame = hello::encode(&greeting).map_err(io::Error::other)?;
    let mut rest = frame.as_slice();
    while !rest.is_empty() {
        let count = rustix::io::retry_on_intr(|| rustix::io::write(control, rest))?;
        rest = rest.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Where the host connects.
struct Listeners {
    stdio: OwnedFd,
    forwarded: OwnedFd,
}

async fn run(listeners: Listeners, control: OwnedFd) -> io::Result<()> {
    let memory = MemoryWatch::new()?;
    let agent = Agent::new(Arc::new(Linux::new(memory.clone())));
    let reaping = linux::reaper::run({
        let agent = agent.clone();
        move |pid, status| agent.reaped(pid, status)
    });
    let watching = memory.run({
        let agent = agent.clone();
        move |container| agent.check_memory(container)
    });
    let accepting = transport::accept(listeners.stdio, {
        let connections = agent.connections().clone();
        move |stream| {
            let connections = connections.clone();
            tokio::spawn(async move { connections.accept(stream).await });
        }
    });
    let forwarding = transport::accept(listeners.forwarded, {
        let forwarded = agent.forwarded().clone();
        move |stream| {
            let forwarded = forwarded.clone();
            tokio::spawn(async move { forwarded.serve(stream).await });
        }
    });
    let (connection, closed) = Connection::new(control)?;
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(transport::once(connection))
        .register_service(Service::methods(agent));
    server.start().await.map_err(io::Error::other)?;
    tokio::select! {
        // The host has gone, or has had enough: the one way to end.
        _ = closed => log::info("the host has closed the connection"),
        ended = reaping => return ended,
        ended = watching => return ended,
        ended = accepting => return ended,
        ended = forwarding => return ended,
    }
    Ok(())
}

fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
