//! The tunnel device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::sys;

/// Length of the transmit queue in packets: the usual 500 or 1000 overflow when many connections begin at once.
pub(super) const QUEUE: u32 = 10_000;

/// Opens the driver. Has no effect on the network.
pub(super) fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

/// Makes the device and opens its queues, each with virtio headers and offloads. It goes when all of them are closed.
pub(super) fn create(name: &str, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let queues = queues.max(1);
    (0..queues)
        .map(|queue| {
            let file = open()?;
            sys::attach(&file, name, queues > 1, queue == 0)?;
            Ok(OwnedFd::from(file))
        })
        .collect()
}

/// Whether this is a queue of the device, as [`create`] opens it.
pub(super) fn is_queue(fd: BorrowedFd<'_>, name: &str, multi_queue: bool) -> bool {
    let wanted = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let wanted = if multi_queue { wanted | libc::IFF_MULTI_QUEUE } else { wanted };
    let decisive = libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    sys::device(fd).is_ok_and(|(found, flags)| found == name.as_bytes() && flags & decisive == wanted)
}
