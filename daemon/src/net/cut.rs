//! Ending connections that cannot go on, so that their programs are told at once and connect again. What must not leave is
//! up to the firewall alone; where the kernel does not end sockets, it cuts them at the next segment.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_sock_diag::constants::{IPPROTO_TCP, IPPROTO_UDP, TCP_SYN_SENT};
use netlink_packet_sock_diag::inet::StateFlags;

use super::desired::{Desired, MARK, Tunnel};
use super::diag::{Found, SockDiag};
use super::sockets::Inbound;

/// How many sockets are remembered at once.
const BATCH: usize = 4096;
/// How often the table is read: sockets can be missed while others come and go, and a batch may not hold all.
const ROUNDS: u32 = 16;

/// Ends what would have to leave by an uplink and may not: connections from before. `own`: every address of this machine;
/// `outside`: those that are not the tunnel's. Gives how many were ended.
pub(super) fn older(desired: &Desired, own: &HashSet<IpAddr>, outside: &HashSet<IpAddr>) -> io::Result<usize> {
    let mut inbound = if desired.inbound_replies { Some(Inbound::new(outside)?) } else { None };
    let mut began_outside =
        |socket: &Found| inbound.as_mut().is_some_and(|inbound| inbound.has(socket.local, socket.remote, socket.state));
    let tcp = end(IPPROTO_TCP, |socket| !may_stay(desired, own, IPPROTO_TCP, socket) && !began_outside(socket));
    if !desired.killswitch {
        return tcp;
    }
    let udp = end(IPPROTO_UDP, |socket| !may_stay(desired, own, IPPROTO_UDP, socket));
    Ok(tcp? + udp?)
}

/// Ends the TCP connections of these addresses of this machine.
pub(super) fn of(addresses: &[IpAddr]) -> io::Result<usize> {
    end(IPPROTO_TCP, |socket| addresses.contains(&socket.local.ip()))
}

/// The same, but not those that only begin.
pub(super) fn of_begun(addresses: &[IpAddr]) -> io::Result<usize> {
    end(IPPROTO_TCP, |socket| addresses.contains(&socket.local.ip()) && socket.state != TCP_SYN_SENT)
}

/// The same, only those that begin: for them the kernel sends nothing.
pub(super) fn of_beginning(addresses: &[IpAddr]) -> io::Result<usize> {
    end(IPPROTO_TCP, |socket| addresses.contains(&socket.local.ip()) && socket.state == TCP_SYN_SENT)
}

/// Ends connections with our mark whose own address is none of `own`: no answer can come back to them. Gives how many.
pub(super) fn stranded(own: &HashSet<IpAddr>) -> io::Result<usize> {
    end(IPPROTO_TCP, |socket| {
        let local = socket.local.ip();
        socket.mark == Some(MARK) && !local.is_loopback() && !own.contains(&local)
    })
}

/// Whether this kernel ends sockets (`CONFIG_INET_DIAG_DESTROY`).
pub(super) fn possible() -> io::Result<bool> {
    SockDiag::open()?.can_destroy()
}

/// What the firewall lets through, and what stays on this machine or in the tunnel.
fn may_stay(desired: &Desired, own: &HashSet<IpAddr>, protocol: u8, socket: &Found) -> bool {
    let (local, remote) = (socket.local, socket.remote);
    let tunnelled = desired.tunnel.iter().flat_map(Tunnel::addresses).any(|address| address == local.ip());
    let lease = protocol == IPPROTO_UDP && [(68, 67), (546, 547)].contains(&(local.port(), remote.port()));
    tunnelled
        || lease
        || local.ip().is_loopback()
        || remote.ip().is_loopback()
        || own.contains(&remote.ip())
        // Without a mark it was not told, and may be one of the daemon's.
        || socket.mark.is_none_or(|mark| mark == MARK)
        || desired.exceptions.users.contains(&socket.uid)
        || desired.exceptions.lan.iter().any(|net| net.contains(&remote.ip()))
        || remote.port() == 53 && desired.exceptions.resolvers.iter().any(|ip| ip.to_canonical() == remote.ip())
}

/// Ends the sockets with a peer for which `unwanted` holds, as long as a program has them: nobody waits for others.
fn end(protocol: u8, mut unwanted: impl FnMut(&Found) -> bool) -> io::Result<usize> {
    let states = if protocol == IPPROTO_TCP {
        StateFlags::all()
            .difference(StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT | StateFlags::SYN_RECV)
    } else {
        StateFlags::ESTABLISHED
    };
    let mut diag = SockDiag::open()?;
    let mut ended = 0;
    for _ in 0..ROUNDS {
        let mut batch = vec![];
        diag.each(protocol, &states, |socket| {
            if batch.len() < BATCH && socket.held && peer(socket.remote) && unwanted(&socket) {
                batch.push(socket);
            }
        })?;
        let before = ended;
        for socket in &batch {
            match diag.destroy(protocol, socket) {
                Ok(was_there) => ended += usize::from(was_there),
                // The same for every socket.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(%error, "one connection cannot be ended"),
            }
        }
        if ended == before {
            break;
        }
    }
    Ok(ended)
}

/// A socket without one is not connected.
fn peer(remote: SocketAddr) -> bool {
    !remote.ip().is_unspecified() && remote.port() != 0
}
