//! What a descriptor has to be. The daemon is not trusted to send the right ones: whoever took it over must not get QEMU to hold more
//! than the TorVM needs.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use proxyvpn_torvm::launch::{Descriptor, MAX_CONFIG, MAX_INITRAMFS, MAX_KERNEL, STATE_SIZE};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use crate::sys;

/// Why a descriptor is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0:?} cannot be asked what it is")]
    Ask(Descriptor, #[source] Errno),
    #[error("Tap is not a queue of a TAP device")]
    NoTap(#[source] io::Error),
    #[error("{0:?} is not {1}")]
    Not(Descriptor, &'static str),
    #[error("{0:?} has {1} bytes: more or less than it may")]
    Size(Descriptor, u64),
}

/// Checks all of them, in the order of [`Descriptor::ALL`].
pub(crate) fn all(fds: &[OwnedFd; Descriptor::ALL.len()]) -> Result<(), Error> {
    Descriptor::ALL.into_iter().zip(fds).try_for_each(|(descriptor, fd)| one(descriptor, fd.as_fd()))
}

fn one(descriptor: Descriptor, fd: BorrowedFd<'_>) -> Result<(), Error> {
    match descriptor {
        Descriptor::Tap => tap(fd),
        Descriptor::Link => socket(descriptor, fd, SocketType::SEQPACKET, "one end of a SOCK_SEQPACKET pair"),
        Descriptor::Qmp | Descriptor::Channel => {
            socket(descriptor, fd, SocketType::STREAM, "one end of a SOCK_STREAM pair")
        }
        Descriptor::Kernel => image(descriptor, fd, MAX_KERNEL),
        Descriptor::Initramfs => image(descriptor, fd, MAX_INITRAMFS),
        Descriptor::State => {
            let size = file(descriptor, fd, Mode::empty())?;
            let flags = flags(descriptor, fd)?;
            if flags & OFlags::RWMODE != OFlags::RDWR || flags.intersects(OFlags::APPEND | OFlags::PATH) {
                return Err(Error::Not(descriptor, "opened for reading and writing"));
            }
            sized(descriptor, size, size == STATE_SIZE)
        }
        Descriptor::Config => {
            let size = file(descriptor, fd, Mode::ROTH)?;
            sized(descriptor, size, (1..=MAX_CONFIG).contains(&size))
        }
    }
}

fn tap(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let (_, flags) = sys::tun_device(fd).map_err(Error::NoTap)?;
    if flags & libc::IFF_TAP == 0 {
        return Err(Error::Not(Descriptor::Tap, "a queue of a TAP device, but of a TUN device"));
    }
    if flags & libc::IFF_NO_PI == 0 || flags & libc::IFF_VNET_HDR == 0 {
        return Err(Error::Not(Descriptor::Tap, "with virtio headers alone (IFF_NO_PI, IFF_VNET_HDR)"));
    }
    Ok(())
}

fn socket(descriptor: Descriptor, fd: BorrowedFd<'_>, kind: SocketType, what: &'static str) -> Result<(), Error> {
    let found = match (socket_domain(fd), socket_type(fd), socket_acceptconn(fd)) {
        (Ok(domain), Ok(found), Ok(listens)) => domain == AddressFamily::UNIX && found == kind && !listens,
        (Err(Errno::NOTSOCK), ..) => false,
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => return Err(Error::Ask(descriptor, error)),
    };
    if found && in_pair(fd) { Ok(()) } else { Err(Error::Not(descriptor, what)) }
}

/// Whether there is another end, without a name: not a connection to some service of the host.
fn in_pair(fd: BorrowedFd<'_>) -> bool {
    // It asks for the address alone, which is the same for every type of local socket.
    let peer = fd.try_clone_to_owned().and_then(|fd| UnixStream::from(fd).peer_addr());
    peer.is_ok_and(|peer| peer.is_unnamed())
}

fn image(descriptor: Descriptor, fd: BorrowedFd<'_>, most: u64) -> Result<(), Error> {
    let size = file(descriptor, fd, Mode::ROTH)?;
    let flags = flags(descriptor, fd)?;
    if flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::PATH) {
        return Err(Error::Not(descriptor, "opened read-only"));
    }
    sized(descriptor, size, (1..=most).contains(&size))
}

/// A regular file whose mode has `needed`: QEMU opens what it reads anew, by `/proc/self/fd`, as its own user.
fn file(descriptor: Descriptor, fd: BorrowedFd<'_>, needed: Mode) -> Result<u64, Error> {
    let stat = fstat(fd).map_err(|error| Error::Ask(descriptor, error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::Not(descriptor, "a regular file"));
    }
    if !Mode::from_raw_mode(stat.st_mode).contains(needed) {
        return Err(Error::Not(descriptor, "readable by anybody"));
    }
    Ok(u64::try_from(stat.st_size).unwrap_or_default())
}

fn flags(descriptor: Descriptor, fd: BorrowedFd<'_>) -> Result<OFlags, Error> {
    fcntl_getfl(fd).map_err(|error| Error::Ask(descriptor, error))
}

fn sized(descriptor: Descriptor, size: u64, good: bool) -> Result<(), Error> {
    if good { Ok(()) } else { Err(Error::Size(descriptor, size)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::path::PathBuf;

    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::net::{SocketFlags, socket, socketpair};

    use super::*;

    fn refused(descriptor: Descriptor, fd: impl Into<OwnedFd>) -> String {
        one(descriptor, fd.into().as_fd()).unwrap_err().to_string()
    }

    fn accepted(descriptor: Descriptor, fd: impl Into<OwnedFd>) {
        one(descriptor, fd.into().as_fd()).unwrap();
    }

    /// A file of `size` bytes with this mode, which goes with the value.
    struct TestFile(PathBuf);

    impl TestFile {
        fn new(name: &str, size: u64, mode: u32) -> Self {
            let path = std::env::temp_dir().join(format!("proxyvpn-qemu-{}-{name}", std::process::id()));
            let file = File::create(&path).unwrap();
            file.set_len(size).unwrap();
            file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
            Self(path)
        }

        fn open(&self, read: bool, write: bool, flags: i32) -> File {
            OpenOptions::new().read(read).write(write).custom_flags(flags).open(&self.0).unwrap()
        }
    }

    impl Drop for TestFile {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn memfd(size: u64) -> File {
        let file = File::from(memfd_create("config", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file
    }

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn ends_of_socket_pairs_are_accepted() {
        let (end, _other) = pair(SocketType::SEQPACKET);
        accepted(Descriptor::Link, end);
        for descriptor in [Descriptor::Qmp, Descriptor::Channel] {
            let (end, _other) = UnixStream::pair().unwrap();
            accepted(descriptor, end);
        }
    }

    #[test]
    fn other_sockets_are_refused() {
        let path = std::env::temp_dir().join(format!("proxyvpn-qemu-{}-service", std::process::id()));
        let service = UnixListener::bind(&path).unwrap();
        let to_service = UnixStream::connect(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let to_tcp = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let unconnected = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let fds: [OwnedFd; 7] = [
            to_service.into(),
            service.into(),
            to_tcp.into(),
            tcp.into(),
            unconnected,
            UnixDatagram::pair().unwrap().0.into(),
            File::open("/dev/null").unwrap().into(),
        ];
        for fd in &fds {
            for descriptor in [Descriptor::Qmp, Descriptor::Channel, Descriptor::Link] {
                let error = one(descriptor, fd.as_fd()).unwrap_err();
                assert!(matches!(error, Error::Not(..)), "{error}");
            }
        }
        let (stream, _a) = UnixStream::pair().unwrap();
        assert_eq!(refused(Descriptor::Link, stream), "Link is not one end of a SOCK_SEQPACKET pair");
        let (packets, _b) = pair(SocketType::SEQPACKET);
        assert_eq!(refused(Descriptor::Qmp, packets), "Qmp is not one end of a SOCK_STREAM pair");
    }

    #[test]
    fn kernel_and_initramfs_cannot_be_written_by_a_guest_that_broke_out() {
        let image = TestFile::new("image", 4096, 0o644);
        let private = TestFile::new("private", 4096, 0o640);
        let empty = TestFile::new("empty", 0, 0o644);
        let huge = TestFile::new("huge", MAX_INITRAMFS + 1, 0o644);
        for descriptor in [Descriptor::Kernel, Descriptor::Initramfs] {
            accepted(descriptor, image.open(true, false, 0));
            assert!(refused(descriptor, image.open(true, true, 0)).ends_with("is not opened read-only"));
            assert!(refused(descriptor, image.open(false, true, 0)).ends_with("is not opened read-only"));
            assert!(refused(descriptor, image.open(true, false, libc::O_PATH)).ends_with("is not opened read-only"));
            assert!(refused(descriptor, private.open(true, false, 0)).ends_with("is not readable by anybody"));
            assert!(refused(descriptor, empty.open(true, false, 0)).contains("has 0 bytes"));
            assert!(refused(descriptor, huge.open(true, false, 0)).contains("more or less than it may"));
            assert!(refused(descriptor, File::open("/").unwrap()).ends_with("is not a regular file"));
            assert!(refused(descriptor, File::open("/dev/zero").unwrap()).ends_with("is not a regular file"));
            assert!(refused(descriptor, UnixStream::pair().unwrap().0).ends_with("is not a regular file"));
        }
    }

    #[test]
    fn the_state_disk_has_its_size_and_can_be_written() {
        let disk = TestFile::new("disk", STATE_SIZE, 0o600);
        let short = TestFile::new("short", STATE_SIZE - 512, 0o600);
        accepted(Descriptor::State, disk.open(true, true, 0));
        assert!(refused(Descriptor::State, disk.open(true, false, 0)).ends_with("opened for reading and writing"));
        assert!(refused(Descriptor::State, disk.open(true, true, libc::O_APPEND)).ends_with("for reading and writing"));
        assert!(refused(Descriptor::State, short.open(true, true, 0)).contains("more or less than it may"));
        assert!(refused(Descriptor::State, File::open("/dev/zero").unwrap()).ends_with("is not a regular file"));
    }

    #[test]
    fn the_configuration_is_short() {
        accepted(Descriptor::Config, memfd(2));
        assert!(refused(Descriptor::Config, memfd(0)).contains("has 0 bytes"));
        assert!(refused(Descriptor::Config, memfd(MAX_CONFIG + 1)).contains("more or less than it may"));
        assert!(refused(Descriptor::Config, UnixStream::pair().unwrap().0).ends_with("is not a regular file"));
    }

    #[test]
    fn what_is_no_tap_device_is_refused() {
        assert_eq!(refused(Descriptor::Tap, File::open("/dev/null").unwrap()), "Tap is not a queue of a TAP device");
        assert_eq!(refused(Descriptor::Tap, pair(SocketType::SEQPACKET).0), "Tap is not a queue of a TAP device");
    }
}
