//! A netlink socket to nf_tables: sends, and matches answers by sequence number.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, getsockname,
        netlink::{self, SocketAddrNetlink},
        recv, send, socket_with, sockopt,
    },
};

use super::{batch::Transaction, refused};
use crate::net::firewall::error::Error;

/// Limit for one answer. The kernel answers within the send, so this only bounds a kernel that misbehaves.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a listing that changed meanwhile is asked for again.
const DUMP_ATTEMPTS: u32 = 8;
/// Bound on what one listing may hold.
const MAX_MESSAGES: usize = 1 << 20;
/// Bound on what an earlier process may have left unread.
const MAX_UNREAD: u32 = 1 << 16;
/// Larger than any message that the kernel sends on such a socket (`NLMSG_GOODSIZE` is at most 32 KiB for dumps).
const BUFFER: usize = 1 << 17;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_MULTI: u16 = 2;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 16;
/// `struct nlmsghdr`: length, type, flags, sequence, port.
const HEADER: usize = 16;

/// The socket, with the next unused sequence number.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

/// Splits a buffer into messages; what is malformed ends it.
pub(super) fn messages(buffer: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let message = rest.get(..length).filter(|m| m.len() >= HEADER)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The errno that an error message carries, 0 for an acknowledgement; `None` for other messages.
fn errno(message: &[u8]) -> Option<i32> {
    let kind = u16_at(message, 4)?;
    if kind != NLMSG_ERROR && kind != NLMSG_DONE {
        return None;
    }
    Some(u32_at(message, HEADER).unwrap_or(0).cast_signed().saturating_neg().max(0))
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, Error> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))
            .map_err(|e| match e {
            Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => refused(Some("a netlink socket"), e.raw_os_error()),
            e => Error::Socket(e.into()),
        })?;
        bind(&fd, &SocketAddrNetlink::new(0, 0)).map_err(socket_error)?;
        Ok(Self { fd, sequence: 1 })
    }

    /// Goes on with a socket of an earlier process. What it has not read is thrown away: it could be taken for an answer, and
    /// a lost answer would fail the first read.
    pub(super) fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        let ours = sockopt::socket_domain(&fd).map_err(socket_error)? == AddressFamily::NETLINK
            && sockopt::socket_protocol(&fd).map_err(socket_error)? == Some(netlink::NETFILTER);
        if !ours {
            return Err(Error::Socket(io::Error::new(io::ErrorKind::InvalidInput, "not a socket of the firewall")));
        }
        let mut buffer = vec![0; BUFFER];
        for _ in 0..MAX_UNREAD {
            match recv(&fd, &mut buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Err(Errno::AGAIN) => return Ok(Self { fd, sequence: 1 }),
                Ok(_) | Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(error) => return Err(socket_error(error)),
            }
        }
        Err(Error::Differs("the socket never runs empty".to_owned()))
    }

    /// The descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The port by which the kernel knows this socket (netlink(7)).
    pub(super) fn port(&self) -> Result<u32, Error> {
        let address = getsockname(&self.fd).and_then(SocketAddrNetlink::try_from).map_err(socket_error)?;
        Ok(address.pid())
    }

    /// Sends a transaction and waits for its end. Gives back its messages.
    pub(super) fn commit(&mut self, transaction: Transaction) -> Result<Vec<Vec<u8>>, Error> {
        let (mut bytes, labels) = transaction.finish();
        let starts: Vec<usize> = messages(&bytes)
            .scan(0, |at, m| {
                let start = *at;
                *at += m.len().next_multiple_of(4);
                Some(start)
            })
            .collect();
        // Only the last message before the end asks for an acknowledgement: thousands of them would overflow the receive
        // buffer. Errors come unasked.
        let last = starts.len().saturating_sub(2);
        let first = self.take(starts.len());
        for (index, start) in starts.iter().enumerate() {
            let flags = u16_at(&bytes, start + 6).unwrap_or(0) & !NLM_F_ACK | if index == last { NLM_F_ACK } else { 0 };
            let sequence = first.wrapping_add(u32::try_from(index).unwrap_or(0));
            bytes[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
            bytes[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
        }
        self.send(&bytes)?;
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let received = self.receive(deadline)?;
            let mut done = false;
            for message in messages(&received) {
                let index = u32_at(message, 8).unwrap_or(0).wrapping_sub(first) as usize;
                match errno(message) {
                    _ if index >= starts.len() => {}
                    Some(0) => done |= index == last,
                    Some(error) => {
                        // Message 0 is the begin: an error on it is one of the whole transaction.
                        let what = index.checked_sub(1).and_then(|i| labels.get(i));
                        return Err(refused(what.map(String::as_str), error));
                    }
                    None => {}
                }
            }
            if done {
                return Ok(messages(&bytes).map(<[u8]>::to_vec).collect());
            }
        }
    }

    /// Sends a request and collects the answers.
    pub(super) fn request(&mut self, mut request: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.take(1);
            if let Some(field) = request.get_mut(8..12) {
                field.copy_from_slice(&sequence.to_ne_bytes());
            }
            self.send(&request)?;
            if let Some(answers) = self.collect(sequence)? {
                return Ok(answers);
            }
        }
        Err(Error::Differs("the tables change faster than they can be listed".to_owned()))
    }

    /// The answers to one request; `None` if they changed while they were listed.
    fn collect(&mut self, sequence: u32) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let mut answers = vec![];
        let mut interrupted = false;
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let received = self.receive(deadline)?;
            for message in messages(&received).filter(|m| u32_at(m, 8) == Some(sequence)) {
                interrupted |=
                    u16_at(message, 6).unwrap_or(0) & (NLM_F_MULTI | NLM_F_DUMP_INTR) == NLM_F_MULTI | NLM_F_DUMP_INTR;
                match errno(message) {
                    Some(0) => return Ok((!interrupted).then_some(answers)),
                    Some(error) => return Err(refused(None, error)),
                    None if answers.len() < MAX_MESSAGES => answers.push(message.to_vec()),
                    None => return Err(Error::Differs("too many rules to read".to_owned())),
                }
            }
        }
    }

    /// Takes sequence numbers; an answer to an older request never matches.
    fn take(&mut self, count: usize) -> u32 {
        let first = self.sequence;
        self.sequence = first.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        first
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        // The kernel wants the whole transaction at once. Without the capability the send fails soon anyway.
        if bytes.len() > BUFFER {
            let _ = sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len() * 2);
        }
        let sent = send(&self.fd, bytes, SendFlags::empty()).map_err(socket_error)?;
        if sent == bytes.len() { Ok(()) } else { Err(Error::Socket(io::ErrorKind::WriteZero.into())) }
    }

    fn receive(&self, deadline: Instant) -> Result<Vec<u8>, Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|e| Error::Socket(io::Error::other(e)))?;
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Err(Error::NoAnswer(TIMEOUT.as_secs())),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(socket_error(e)),
            }
            let mut buffer = vec![0; BUFFER];
            match recv(&self.fd, &mut buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok((_, length)) if length > BUFFER => return Err(Error::Socket(Errno::MSGSIZE.into())),
                Ok((_, length)) => {
                    buffer.truncate(length);
                    return Ok(buffer);
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(socket_error(e)),
            }
        }
    }
}

fn socket_error(error: Errno) -> Error {
    if error == Errno::PERM { Error::Privilege } else { Error::Socket(error.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_messages_end_the_list() {
        let message = |length: u32, rest: usize| [length.to_ne_bytes().to_vec(), vec![0; rest]].concat();
        for (bytes, count) in [
            (vec![], 0),
            (vec![1, 2, 3], 0),
            (message(0, 60), 0),
            (message(15, 60), 0),
            (message(u32::MAX, 60), 0),
            (message(16, 12), 1),
            (message(17, 13), 1),
            ([message(16, 12), message(20, 16)].concat(), 2),
            ([message(16, 12), message(40, 16)].concat(), 1),
        ] {
            assert_eq!(messages(&bytes).count(), count, "{bytes:?}");
        }
    }

    #[test]
    fn errors_are_told_from_acknowledgements() {
        let message = |kind: u16, error: i32| {
            let mut m = vec![0; 20];
            m[..4].copy_from_slice(&20u32.to_ne_bytes());
            m[4..6].copy_from_slice(&kind.to_ne_bytes());
            m[16..].copy_from_slice(&error.to_ne_bytes());
            m
        };
        assert_eq!(errno(&message(NLMSG_ERROR, 0)), Some(0));
        assert_eq!(errno(&message(NLMSG_ERROR, -2)), Some(2));
        assert_eq!(errno(&message(NLMSG_ERROR, i32::MIN)), Some(i32::MAX));
        assert_eq!(errno(&message(NLMSG_DONE, 0)), Some(0));
        assert_eq!(errno(&message(0x0a03, -2)), None);
    }
}
