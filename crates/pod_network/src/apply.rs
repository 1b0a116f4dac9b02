// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Taps, and their joints with the CNI's interfaces, in the namespace that the calling thread is in.
//!
//! On both interfaces sits an `ingress` qdisc with filters of [`PRIORITY`] and above: by them [`undo`] knows what is ours.
#![expect(
    unsafe_code,
    reason = "making a tap is an ioctl without a safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcFilterU32,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};
use route_netlink::Change;

use crate::filter::{self, Instruction};
use crate::netlink::RouteSocket;
use crate::{Interface, Metadata, NetError, TapPlan};

/// What the names of our taps begin with; the interface's index follows.
pub(crate) const TAP_PREFIX: &str = "coffer";
const TUN_DEVICE: &str = "/dev/net/tun";
/// TUNSETIFF (Linux `include/uapi/linux/if_tun.h`).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// The first of our filters' priorities, a number that nobody picks by accident; the spoofing filter comes before the
/// redirection.
const PRIORITY: u32 = 0xc0f0;
const SPOOFING: u32 = PRIORITY;
const REDIRECTION: u32 = PRIORITY + 1;
/// `ETH_P_ALL` in network order, as the lower half of `tcm_info`.
const ALL_PROTOCOLS: u32 = 0x0300;
/// The ingress qdisc, to which filters belong.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
// Linux `include/uapi/linux/pkt_cls.h`.
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;

/// Makes a tap for each interface, and joins them. Nothing is left of those that cannot be.
pub(crate) fn join_all(
    interfaces: Vec<Interface>,
    metadata: Metadata,
) -> Result<Vec<TapPlan>, NetError> {
    let mut socket = open()?;
    sweep(&mut socket)?;
    let mut plans: Vec<TapPlan> = Vec::new();
    for interface in interfaces {
        match join(&mut socket, &interface, metadata) {
            Ok(tap) => plans.push(TapPlan { tap, interface }),
            Err(error) => {
                // With the taps gone, what is left is what a killed process leaves.
                drop(plans);
                // The first error says more than one of cleaning up after it.
                let _ = sweep(&mut socket);
                return Err(error);
            }
        }
    }
    Ok(plans)
}

fn open() -> Result<RouteSocket, NetError> {
    RouteSocket::open().map_err(NetError::step("change", "the interfaces"))
}

fn join(
    socket: &mut RouteSocket,
    interface: &Interface,
    metadata: Metadata,
) -> Result<OwnedFd, NetError> {
    let step = |operation| NetError::step(operation, &interface.name);
    let name = tap_name(interface.index);
    let tap = make_tap(&name).map_err(step("make a tap for"))?;
    let index = index_of(socket, &name).map_err(step("find the tap of"))?;
    let program = filter::program(interface.mac, &interface.ips(), metadata);
    // The filter first: nothing that comes from the tap ever passes without it.
    for (message, operation) in [
        (ingress(index), "prepare the tap of"),
        (spoofing_filter(index, &program), "filter the tap of"),
        (redirection(index, interface.index), "join the tap to"),
        (ingress(interface.index), "prepare"),
        (redirection(interface.index, index), "join the tap to"),
    ] {
        socket
            .change(message, Change::New)
            .map_err(step(operation))?;
    }
    // Silent: the namespace's own stack gives the tap no address to speak from. Before it is up, or it has one.
    match socket.change(
        RouteNetlinkMessage::SetLink(silent(index)),
        Change::Existing,
    ) {
        // No IPv6 on this node.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
        done => done.map_err(step("silence the tap of"))?,
    }
    socket
        .change(
            RouteNetlinkMessage::SetLink(up(index, interface.mtu)),
            Change::Existing,
        )
        .map_err(step("bring up the tap of"))?;
    Ok(tap)
}

fn tap_name(index: u32) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// Makes a tap that lives as long as the descriptor.
fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN_DEVICE)?;
    // SAFETY: `ifreq` is plain data; zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name is shorter than the array, whose last byte stays zero.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(15) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    // SAFETY: the request is a valid `ifreq` with a terminated name, and lives over the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

fn links(socket: &mut RouteSocket) -> io::Result<Vec<(u32, String)>> {
    let answers = socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(answers
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => {
                let name = link
                    .attributes
                    .into_iter()
                    .find_map(|attribute| match attribute {
                        LinkAttribute::IfName(name) => Some(name),
                        _ => None,
                    });
                Some((link.header.index, name?))
            }
            _ => None,
        })
        .collect())
}

fn index_of(socket: &mut RouteSocket, name: &str) -> io::Result<u32> {
    links(socket)?
        .into_iter()
        .find(|(_, found)| found == name)
        .map(|(index, _)| index)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn silent(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
    )])];
    link
}

fn up(index: u32, mtu: u16) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = vec![LinkAttribute::Mtu(u32::from(mtu))];
    link
}

fn traffic_control(index: u32, parent: TcHandle, handle: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    // Indexes are positive in the kernel, whatever the types of its messages.
    message.header.index = index.cast_signed();
    message.header.parent = parent;
    message.header.handle = handle;
    message
}

fn ingress(index: u32) -> RouteNetlinkMessage {
    let mut message = traffic_control(index, TcHandle::INGRESS, INGRESS);
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

fn filter_on(index: u32, priority: u32, kind: &str, options: Vec<TcOption>) -> RouteNetlinkMessage {
    let mut message = traffic_control(index, INGRESS, TcHandle::UNSPEC);
    message.header.info = priority << 16 | ALL_PROTOCOLS;
    message.attributes = vec![
        TcAttribute::Kind(kind.to_owned()),
        TcAttribute::Options(options),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}

fn spoofing_filter(index: u32, program: &[Instruction]) -> RouteNetlinkMessage {
    let mut bytes = Vec::new();
    for instruction in program {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.skip_if, instruction.skip_else]);
        bytes.extend(instruction.k.to_ne_bytes());
    }
    let count = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let raw = |kind, value| TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)));
    let options = vec![
        raw(TCA_BPF_OPS_LEN, count.to_ne_bytes().to_vec()),
        raw(TCA_BPF_OPS, bytes),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ];
    filter_on(index, SPOOFING, TcFilterBpf::KIND, options)
}

/// Everything that comes in at `from` goes out at `to`.
fn redirection(from: u32, to: u32) -> RouteNetlinkMessage {
    let mut parameters = TcMirror::default();
    parameters.generic.action = TcActionType::Stolen;
    parameters.eaction = TcMirrorActionType::EgressRedir;
    parameters.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            parameters,
        ))]),
    ];
    let mut everything = TcU32Selector::default();
    everything.flags = TcU32SelectorFlags::Terminal;
    everything.nkeys = 1;
    everything.keys = vec![TcU32Key::default()];
    let options = vec![
        TcOption::U32(TcFilterU32Option::Selector(everything)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ];
    filter_on(from, REDIRECTION, TcFilterU32::KIND, options)
}

/// Takes away the taps of these interfaces, and the qdiscs with our filters.
pub(crate) fn undo(interfaces: &[u32]) -> Result<(), NetError> {
    let mut socket = open()?;
    for &index in interfaces {
        let name = tap_name(index);
        match index_of(&mut socket, &name) {
            // A tap goes by itself when its last descriptor is closed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(NetError::step("find the tap", &name)(error)),
            Ok(tap) => {
                let mut link = LinkMessage::default();
                link.header.index = tap;
                let done = socket.change(RouteNetlinkMessage::DelLink(link), Change::Existing);
                gone(done).map_err(NetError::step("delete the tap", &name))?;
            }
        }
        release(&mut socket, index, &name)?;
    }
    Ok(())
}

/// Takes away the qdiscs with our filters from interfaces whose taps have gone: they are of a process that was killed.
pub(crate) fn sweep_all() -> Result<(), NetError> {
    sweep(&mut open()?)
}

fn sweep(socket: &mut RouteSocket) -> Result<(), NetError> {
    let all = links(socket).map_err(NetError::step("read", "the interfaces"))?;
    let named = |wanted: &str| all.iter().any(|(_, name)| name == wanted);
    for (index, name) in &all {
        // A tap's own qdisc goes with it.
        if !name.starts_with(TAP_PREFIX) && !named(&tap_name(*index)) {
            release(socket, *index, name)?;
        }
    }
    Ok(())
}

/// Takes our qdisc from an interface.
fn release(socket: &mut RouteSocket, index: u32, name: &str) -> Result<(), NetError> {
    if !is_ours(socket, index).map_err(NetError::step("read the filters of", name))? {
        return Ok(());
    }
    let mut message = traffic_control(index, TcHandle::INGRESS, INGRESS);
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    let delete = RouteNetlinkMessage::DelQueueDiscipline(message);
    gone(socket.change(delete, Change::Existing)).map_err(NetError::step("release", name))
}

/// That it has gone already is fine.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn is_ours(socket: &mut RouteSocket, index: u32) -> io::Result<bool> {
    let ask =
        RouteNetlinkMessage::GetTrafficFilter(traffic_control(index, INGRESS, TcHandle::UNSPEC));
    let filters = match socket.dump(ask) {
        // No ingress qdisc.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            return Ok(false);
        }
        filters => filters?,
    };
    Ok(filters.iter().any(|message| {
        matches!(message, RouteNetlinkMessage::NewTrafficFilter(filter)
            if (SPOOFING..=REDIRECTION).contains(&(filter.header.info >> 16)))
    }))
}
