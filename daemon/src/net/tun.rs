//! The tunnel device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::desired::Tunnel;
use super::sys;

/// Length of the transmit queue in packets: the usual 500 or 1000 overflow when many connections begin at once.
pub(super) const QUEUE: u32 = 10_000;

/// Opens the driver. Has no effect on the network.
pub(super) fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

/// Makes the device and opens its queues, each with virtio headers. Those of a TUN device have offloads; who drives the router
/// behind a TAP device asks for them (`TUNSETOFFLOAD`), as its driver can. It goes when all of them are closed.
pub(super) fn create(tunnel: &Tunnel, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let queues = queues.max(1);
    (0..queues)
        .map(|queue| {
            let file = open()?;
            sys::attach(&file, &tunnel.name, flags(tunnel, queues), queue == 0)?;
            if tunnel.gateway.is_none() {
                sys::offload(&file)?;
            }
            Ok(OwnedFd::from(file))
        })
        .collect()
}

fn flags(tunnel: &Tunnel, queues: usize) -> libc::c_int {
    let kind = if tunnel.gateway.is_some() { libc::IFF_TAP } else { libc::IFF_TUN };
    let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    kind | many | libc::IFF_NO_PI | libc::IFF_VNET_HDR
}

/// Whether this is one of so many queues of the device, as [`create`] opens it.
pub(super) fn is_queue(fd: BorrowedFd<'_>, tunnel: &Tunnel, queues: usize) -> bool {
    let decisive = libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    sys::device(fd).is_ok_and(|(found, found_flags)| {
        found == tunnel.name.as_bytes() && found_flags & decisive == flags(tunnel, queues)
    })
}
