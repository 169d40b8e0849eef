//! The connection by which QEMU is started and ended: a `SOCK_SEQPACKET` socket. While a copy of it is open, QEMU runs.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use proxyvpn_torvm::launch::{Descriptor, MAX_MESSAGE, Reply, Request};
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with,
};
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

use super::Error;
use super::sys::watch;
use crate::lines::clean;

/// Starting QEMU takes it some 100 ms.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Characters of a cause: QEMU's last words may be in it.
const MAX_CAUSE: usize = 1000;

/// See the module.
#[derive(Debug)]
pub(super) struct Launcher(AsyncFd<OwnedFd>);

/// What comes with a request, by its names in [`Descriptor::ALL`]'s order.
pub(super) type Descriptors<'a> = [BorrowedFd<'a>; Descriptor::ALL.len()];

impl Launcher {
    /// Takes over a connection.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        watch(socket).map(Self)
    }

    /// Connects and has QEMU started; gives QEMU's version.
    pub(super) async fn start(
        path: &Path,
        request: &Request,
        descriptors: Descriptors<'_>,
    ) -> Result<(Self, String), Error> {
        let silent = |_| Error::LauncherSilent { seconds: TIMEOUT.as_secs() };
        timeout(TIMEOUT, Self::start_patiently(path, request, descriptors)).await.map_err(silent)?
    }

    async fn start_patiently(
        path: &Path,
        request: &Request,
        descriptors: Descriptors<'_>,
    ) -> Result<(Self, String), Error> {
        let launcher = Self::connect(path).await.map_err(|source| Error::NoLauncher { socket: path.into(), source })?;
        launcher.send(request, descriptors).await.map_err(Error::Launcher)?;
        match launcher.recv().await.map_err(Error::Launcher)? {
            Some(Reply::Started { version }) => Ok((launcher, clean(&version, 64))),
            Some(Reply::Failed { cause } | Reply::Ended { cause }) => Err(Error::Failed { cause }),
            None => Err(Error::LauncherGone),
        }
    }

    async fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let address = SocketAddrUnix::new(path)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Self::new(socket),
                // Others wait to be accepted.
                Err(Errno::AGAIN | Errno::INTR) => sleep(Duration::from_millis(50)).await,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    async fn send(&self, request: &Request, descriptors: Descriptors<'_>) -> io::Result<()> {
        let message = serde_json::to_vec(request)?;
        loop {
            let mut guard = self.0.writable().await?;
            let sent = guard.try_io(|socket| {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(Descriptor::ALL.len()))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                Ok(sendmsg(socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?)
            });
            match sent {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// What the launcher says next; `None` at its end. Cancel safe.
    pub(super) async fn recv(&self) -> io::Result<Option<Reply>> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|socket| receive(socket.as_fd())) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(received) => return received,
                Err(_would_block) => {}
            }
        }
    }

    /// Whether QEMU runs, as far as the launcher has said; does not wait.
    pub(super) fn running(&self) -> Result<(), String> {
        loop {
            match receive(self.as_fd()) {
                Ok(Some(Reply::Started { .. })) => {}
                Ok(Some(Reply::Failed { cause } | Reply::Ended { cause })) => return Err(cause),
                Ok(None) => return Err("QEMU's launcher is gone".to_owned()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Has QEMU ended now, however many copies of the connection there are.
    pub(super) fn end(&self) {
        // What is not connected any more is over.
        let _ = shutdown(self.as_fd(), Shutdown::Both);
    }
}

impl AsFd for Launcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Reply>> {
    let mut buffer = [0; MAX_MESSAGE + 1];
    let (_, length) = recv(socket, &mut buffer, RecvFlags::DONTWAIT)?;
    let message = match buffer.get(..length) {
        Some([]) => return Ok(None),
        Some(message) => message,
        None => return Err(io::ErrorKind::InvalidData.into()),
    };
    let cleaned = |cause: String| clean(&cause, MAX_CAUSE);
    Ok(Some(match serde_json::from_slice(message)? {
        Reply::Started { version } => Reply::Started { version },
        Reply::Failed { cause } => Reply::Failed { cause: cleaned(cause) },
        Reply::Ended { cause } => Reply::Ended { cause: cleaned(cause) },
    }))
}
