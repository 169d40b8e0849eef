//! What a caller on the bus gives as a descriptor. The caller is hostile: sizes and times are bounded.

use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use tokio::sync::{Semaphore, oneshot};
use zeroize::Zeroizing;

use super::file;

/// How long a descriptor may take to give everything.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// Threads that may wait for descriptors. A file on a hostile file system can hold its thread for ever.
static READERS: Semaphore = Semaphore::const_new(8);

/// Why a descriptor cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// A directory, device, socket or terminal.
    #[error("it must be a file or a pipe")]
    Kind,
    /// Over the bound.
    #[error("it is longer than {max} bytes")]
    TooLong {
        /// The bound.
        max: usize,
    },
    /// No end in time.
    #[error("it did not end within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// Too many descriptors are being waited for.
    #[error("too many callers are giving files at the same time; try again")]
    Busy,
    /// The kernel refuses.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// Reads `fd` to its end, within [`TIMEOUT`], on a thread of its own that nobody waits for longer. The buffer is wiped.
///
/// # Errors
/// See [`DescriptorError`].
pub async fn read(fd: OwnedFd, max: usize) -> Result<Zeroizing<Vec<u8>>, DescriptorError> {
    let permit = READERS.try_acquire().map_err(|_| DescriptorError::Busy)?;
    let (done, result) = oneshot::channel();
    // Not the runtime's blocking pool: that waits for its threads when the daemon ends.
    std::thread::Builder::new()
        .name("descriptor".to_owned())
        .spawn(move || {
            // The receiver may have given up.
            let _ = done.send(read_blocking(fd, max));
            drop(permit);
        })
        .map_err(DescriptorError::Read)?;
    match tokio::time::timeout(TIMEOUT + Duration::from_millis(200), result).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(_)) => Err(DescriptorError::Read(io::ErrorKind::BrokenPipe.into())),
        Err(_) => Err(DescriptorError::Timeout),
    }
}

fn read_blocking(fd: OwnedFd, max: usize) -> Result<Zeroizing<Vec<u8>>, DescriptorError> {
    let stat = fstat(&fd).map_err(|errno| DescriptorError::Read(errno.into()))?;
    let mut file = File::from(fd);
    match FileType::from_raw_mode(stat.st_mode) {
        // A caller that has just written a memfd stands at its end.
        FileType::RegularFile => file.rewind().map_err(DescriptorError::Read)?,
        FileType::Fifo => {}
        _ => return Err(DescriptorError::Kind),
    }
    let reader = Patient { file, deadline: Instant::now() + TIMEOUT };
    let bytes = file::read_bounded(reader, max).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => DescriptorError::Timeout,
        _ => DescriptorError::Read(error),
    })?;
    bytes.ok_or(DescriptorError::TooLong { max })
}

/// Waits for each piece, up to a deadline.
struct Patient {
    file: File,
    deadline: Instant,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::TimedOut)?;
            let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            match self.file.read(buffer) {
                // Non-blocking, and somebody else took what was there.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn a_pipe_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let writing = std::thread::spawn(move || {
            for _ in 0..3 {
                writer.write_all(b"abc").unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        assert_eq!(*read(reader.into(), 9).await.unwrap(), b"abcabcabc");
        writing.join().unwrap();
    }

    #[tokio::test]
    async fn size_time_and_kind_are_bounded() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&[b'x'; 10]).unwrap();
        drop(writer);
        assert!(matches!(read(reader.into(), 9).await, Err(DescriptorError::TooLong { max: 9 })));

        let (reader, writer) = io::pipe().unwrap();
        let start = Instant::now();
        assert!(matches!(read(reader.into(), 9).await, Err(DescriptorError::Timeout)));
        assert!(start.elapsed() < TIMEOUT + Duration::from_secs(1));
        drop(writer);

        for path in ["/dev/zero", "/"] {
            let fd = File::open(path).unwrap().into();
            assert!(matches!(read(fd, 9).await, Err(DescriptorError::Kind)), "{path}");
        }
    }
}
