//! The request: one packet with its descriptors.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use proxyvpn_torvm::launch::{Descriptor, MAX_MESSAGE, MEMORY_MIB, REQUEST_MS, Request};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the request cannot be read")]
    Read(#[source] Errno),
    #[error("the connection was closed before a request came")]
    Closed,
    #[error("no request came within {REQUEST_MS} ms")]
    Late,
    #[error("the request is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("the request comes with {0} descriptors, not {expected}", expected = Descriptor::ALL.len())]
    Count(usize),
    #[error("the request comes with more than {expected} descriptors", expected = Descriptor::ALL.len())]
    TooMany,
    #[error("the request is not understood")]
    Syntax(#[source] serde_json::Error),
    #[error("{0} MiB of memory is not within {first} to {last}", first = MEMORY_MIB.start(), last = MEMORY_MIB.end())]
    Memory(u32),
}

/// Waits for the request on `connection`. The descriptors are as many as [`Descriptor::ALL`], and still to be checked.
pub(crate) fn receive(connection: impl AsFd) -> Result<(Request, [OwnedFd; Descriptor::ALL.len()]), Error> {
    wait(&connection)?;
    let mut text = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(Descriptor::ALL.len()))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received =
        recvmsg(&connection, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags).map_err(Error::Read)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Error::TooMany);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(Error::TooLong);
    }
    if received.bytes == 0 {
        return Err(Error::Closed);
    }
    let request: Request = serde_json::from_slice(&text[..received.bytes]).map_err(Error::Syntax)?;
    if !MEMORY_MIB.contains(&request.memory_mib) {
        return Err(Error::Memory(request.memory_mib));
    }
    let descriptors = descriptors.try_into().map_err(|fds: Vec<_>| Error::Count(fds.len()))?;
    Ok((request, descriptors))
}

fn wait(connection: &impl AsFd) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_millis(REQUEST_MS);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Error::Late)?;
        match poll(&mut [PollFd::new(connection, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(Error::Late),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::Read(error)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::BorrowedFd;

    use proxyvpn_torvm::launch::Accelerator;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
        socketpair,
    };

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn sent(text: &[u8], count: usize) -> Result<(Request, [OwnedFd; Descriptor::ALL.len()]), Error> {
        let (ours, theirs) = pair();
        let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| ours.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(count == 0 || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&ours, &[IoSlice::new(text)], &mut ancillary, SendFlags::empty()).unwrap();
        receive(&theirs)
    }

    const GOOD: &[u8] = br#"{"accelerator":"tcg","memory-mib":256}"#;

    #[test]
    fn a_request_comes_with_its_descriptors_which_no_child_inherits() {
        let (request, fds) = sent(GOOD, 8).unwrap();
        assert_eq!(request, Request { accelerator: Accelerator::Tcg, memory_mib: 256 });
        for fd in &fds {
            assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn another_number_of_descriptors_is_refused() {
        assert!(matches!(sent(GOOD, 0), Err(Error::Count(0))));
        assert!(matches!(sent(GOOD, 7), Err(Error::Count(7))));
        // The buffer has room for some more than are allowed (`cmsg_space!` aligns).
        assert!(matches!(sent(GOOD, 9), Err(Error::Count(9))));
        assert!(matches!(sent(GOOD, 64), Err(Error::TooMany)));
    }

    #[test]
    fn what_is_not_a_request_is_refused() {
        assert!(matches!(sent(&[b' '; MAX_MESSAGE + 1], 8), Err(Error::TooLong)));
        let texts: [&[u8]; 7] = [
            b"{",
            b"\xff\0",
            br#"{"accelerator":"tcg"}"#,
            br#"{"accelerator":"tcg,accel=kvm","memory-mib":256}"#,
            br#"{"accelerator":"tcg","memory-mib":256,"append":"x"}"#,
            br#"{"accelerator":"tcg","memory-mib":-1}"#,
            br#"{"accelerator":"tcg","memory-mib":256} x"#,
        ];
        for text in texts {
            assert!(matches!(sent(text, 8), Err(Error::Syntax(_))), "{}", String::from_utf8_lossy(text));
        }
        for memory in [0, 127, 4097] {
            let text = format!(r#"{{"accelerator":"tcg","memory-mib":{memory}}}"#);
            assert!(matches!(sent(text.as_bytes(), 8), Err(Error::Memory(_))), "{memory}");
        }
    }

    #[test]
    fn who_closes_or_says_nothing_does_not_hold_the_place() {
        let (ours, theirs) = pair();
        drop(ours);
        assert!(matches!(receive(&theirs), Err(Error::Closed)));
        let (_ours, theirs) = pair();
        let begin = Instant::now();
        assert!(matches!(receive(&theirs), Err(Error::Late)));
        assert!(begin.elapsed() < Duration::from_millis(REQUEST_MS + 2_000));
    }
}
