//! Helpers that are run and waited for: bounded in time and in what they may say.

use std::io::{Read as _, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::error::{Error, While as _};

/// How long one may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes kept of its last words.
const WORDS: u64 = 512;

/// How one ended.
pub(crate) struct Ended {
    /// Its status.
    pub(crate) status: ExitStatus,
    /// The beginning of what it said on stderr, in one line.
    pub(crate) words: String,
}

/// Runs `path` with `input` (less than a pipe holds: 64 KiB) and waits; `meanwhile` is called about every second.
pub(crate) fn run(
    path: &'static str,
    arguments: &[&str],
    input: &str,
    mut meanwhile: impl FnMut(),
) -> Result<Ended, Error> {
    let mut child = Command::new(path)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .during(format!("start {path}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read its input ends with an error of its own.
        let _ = stdin.write_all(input.as_bytes());
    }
    let pidfd =
        pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty()).during(format!("watch {path}"))?;
    let begin = Instant::now();
    loop {
        // Readable: it ended.
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
        if ready.during(format!("wait for {path}"))? > 0 {
            break;
        }
        if begin.elapsed() > LIMIT {
            child.kill().during(format!("kill {path}"))?;
            let _ = child.wait();
            return Err(Error::Program { program: path, how: format!("took longer than {} s", LIMIT.as_secs()) });
        }
        meanwhile();
    }
    let status = child.wait().during(format!("wait for {path}"))?;
    let mut words = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(WORDS).read_to_end(&mut words).during(format!("read the errors of {path}"))?;
    }
    let words = String::from_utf8_lossy(&words).split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(Ended { status, words })
}

impl Ended {
    /// Anything but success is an error.
    pub(crate) fn successful(self, program: &'static str) -> Result<(), Error> {
        if self.status.success() {
            Ok(())
        } else {
            Err(Error::Program { program, how: format!("{}: {}", self.status, self.words) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_input_arrives_and_last_words_are_one_bounded_line() -> Result<(), Error> {
        let ended = run("/bin/sh", &["-c", "cat >&2; exit 3"], "two\nlines\n", || {})?;
        assert_eq!((ended.status.code(), ended.words.as_str()), (Some(3), "two lines"));
        let ended = run("/bin/sh", &["-c", "head -c 2000 /dev/zero | tr '\\0' x >&2"], "", || {})?;
        assert_eq!(ended.words.len() as u64, WORDS);
        Ok(())
    }

    #[test]
    fn one_that_is_missing_is_an_error() {
        assert!(run("/nonexistent", &[], "", || {}).is_err());
    }
}
