//! Runs a program of the administrator's: absolute path, empty environment, bounded time and output.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::error::Error;

/// Where programs of the system are; nothing of the caller's path is trusted.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
/// Limit for one run: iptables waits up to 5 s for its lock.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Bound on what is read of a program's output, in bytes.
const MAX_OUTPUT: u64 = 4 << 20;
/// How much of an error message is kept, in bytes.
const MAX_MESSAGE: usize = 400;

/// Finds a program of the system.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}

/// Runs a program with this input and gives back its output. A failure is an error with what it said.
pub(super) fn run(program: &Path, arguments: &[&str], input: &str) -> Result<String, Error> {
    let failed = |source| Error::Run { program: program.to_owned(), source };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // Three threads, because each pipe could fill while another one is waited for.
    let input = input.to_owned();
    let stdin = child.stdin.take();
    thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
    let output = read(child.stdout.take());
    let errors = read(child.stderr.take());
    let deadline = Instant::now() + TIMEOUT;
    let (Ok(output), Ok(errors)) = (
        output.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        errors.recv_timeout(deadline.saturating_duration_since(Instant::now())),
    ) else {
        drop(child.kill());
        drop(child.wait());
        return Err(Error::Slow { program: program.to_owned(), seconds: TIMEOUT.as_secs() });
    };
    // Both pipes are closed; a program that goes on without them is ended.
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            None => {
                drop(child.kill());
                break child.wait().map_err(failed)?;
            }
        }
    };
    if status.success() {
        return output.map_err(failed);
    }
    let mut message = errors.unwrap_or_default();
    message.truncate(message.floor_char_boundary(MAX_MESSAGE));
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(Error::Program { program: program.to_owned(), status: status.to_string(), message })
}

fn read(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<io::Result<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = vec![];
        let result = pipe.map_or(Ok(0), |pipe| pipe.take(MAX_OUTPUT).read_to_end(&mut bytes));
        // The receiver is gone only after a time-out.
        drop(sender.send(result.map(|_| String::from_utf8_lossy(&bytes).into_owned())));
    });
    receiver
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;

    #[test]
    fn gives_output_and_says_what_failed() {
        let cat = find("cat").unwrap();
        let long = "x".repeat(1 << 20);
        assert_eq!(run(&cat, &[], &long).unwrap(), long);
        assert_eq!(run(&find("env").unwrap(), &[], "").unwrap(), "LC_ALL=C\n");
        let error = run(&cat, &["/nonexistent"], "").unwrap_err();
        assert!(matches!(&error, Error::Program { message, .. } if message.contains("No such file")), "{error}");
        assert!(matches!(run(Path::new("/nonexistent"), &[], ""), Err(Error::Run { .. })));
        assert_eq!(find("no-such-program"), None);
    }
}
