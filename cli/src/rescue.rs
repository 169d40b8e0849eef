//! `rescue`: gives the network back without daemon and bus.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::Command;

use crate::exit::{Exit, Failure, Outcome};
use crate::text;

/// The daemon's unit, and the one that keeps a lockdown.
const UNITS: [&str; 2] = ["proxyvpnd.service", "proxyvpn-lock.service"];
/// The file with the daemon's process id, where it does not run under systemd.
const PID_FILE: &str = "/run/proxyvpn/proxyvpnd.pid";
/// Where packages put the daemon, besides the directory of proxyctl.
const DIRECTORIES: [&str; 6] = [
    "/usr/libexec/proxyvpn",
    "/usr/lib/proxyvpn",
    "/usr/sbin",
    "/usr/local/sbin",
    "/usr/local/libexec/proxyvpn",
    "/usr/local/lib/proxyvpn",
];
/// What helps when nothing else does.
const REBOOT: &str = "reboot: nothing of ours outlives a reboot, but lockdown (rm /var/lib/proxyvpn/lockdown).";
/// How long systemd may take to stop the daemon.
const STOP: Duration = Duration::from_secs(15);
/// How long the daemon may take to end after SIGTERM.
const TERM: Duration = Duration::from_secs(5);
/// How long the clean-up may take.
const CLEANUP: Duration = Duration::from_secs(60);

/// `rescue`.
pub(crate) async fn rescue() -> Outcome {
    if !geteuid().is_root() {
        return Err(Failure::new(Exit::NotAuthorised, "rescue changes the network and needs root")
            .advise("Run: sudo proxyctl rescue"));
    }
    // What cannot be stopped is said, and the clean-up is done all the same.
    for unit in UNITS {
        if let Err(failure) = stop_unit(unit).await {
            text::note(failure.message().trim_end());
        }
    }
    if let Err(failure) = stop_process(Path::new(PID_FILE)) {
        text::note(failure.message().trim_end());
    }
    cleanup(&find_daemon()?).await?;
    text::out("rescue: done\nTo connect again: proxyctl connect (it starts the daemon)\n")?;
    Ok(Exit::Ok)
}

/// A command that gets nothing from our environment.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
    command.current_dir("/").stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Stops a unit where systemd runs it.
async fn stop_unit(unit: &str) -> Result<(), Failure> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    let Some(systemctl) =
        ["/usr/bin/systemctl", "/bin/systemctl"].map(Path::new).into_iter().find(|path| path.exists())
    else {
        return Err(Failure::new(
            Exit::Failure,
            format!("systemd runs, but there is no systemctl: {unit} is not stopped"),
        ));
    };
    let run = |args: &[&str]| command(systemctl).args(args).stderr(Stdio::null()).output();
    let state = tokio::time::timeout(STOP, run(&["show", "--property=LoadState,ActiveState", unit])).await;
    let Ok(Ok(state)) = state else {
        return Err(Failure::new(Exit::Failure, format!("systemd does not answer: {unit} is not stopped")));
    };
    let state = String::from_utf8_lossy(&state.stdout);
    let has = |line: &str| state.lines().any(|known| known == line);
    if !has("LoadState=loaded") || has("ActiveState=inactive") {
        return Ok(());
    }
    match tokio::time::timeout(STOP, run(&["stop", unit])).await {
        Ok(Ok(output)) if output.status.success() => {
            text::out(&format!("stopped {unit}\n"))?;
            // A systemd that was told to keep the descriptors of a stopped unit still keeps the firewall; others have nothing
            // left, or do not know the word.
            let _ = tokio::time::timeout(STOP, run(&["clean", "--what=fdstore", unit])).await;
            return Ok(());
        }
        Ok(_) => text::note(&format!("proxyctl: systemctl stop {unit} failed: killing it")),
        Err(_) => text::note(&format!("proxyctl: {unit} did not stop within {} s: killing it", STOP.as_secs())),
    }
    match tokio::time::timeout(STOP, run(&["kill", "--signal=KILL", unit])).await {
        Ok(Ok(output)) if output.status.success() => text::out(&format!("killed {unit}\n")),
        _ => Err(Failure::new(Exit::Failure, format!("{unit} could not be killed"))),
    }
}

/// Ends the process that the file names, if it is really the daemon.
fn stop_process(pid_file: &Path) -> Result<(), Failure> {
    let fail =
        |what: &str, error: io::Error| Failure::new(Exit::Failure, format!("{what} {}: {error}", pid_file.display()));
    let content = match fs::read_to_string(pid_file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        content => content.map_err(|error| fail("cannot read", error))?,
    };
    let Some(pid) = content.trim().parse().ok().filter(|&pid| pid > 1).and_then(Pid::from_raw) else {
        return Err(Failure::new(Exit::Failure, format!("{} holds no process id", pid_file.display())));
    };
    // The descriptor comes first: what is then found out holds for the process that gets the signal.
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        process => process.map_err(|error| fail("cannot open the process of", error.into()))?,
    };
    if !is_daemon(pid) {
        // A stale file: the number has another owner now.
        return Ok(());
    }
    let ended = |limit: Duration| {
        let limit = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
        matches!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)), Ok(1..))
    };
    for (signal, done) in [(Signal::TERM, "stopped"), (Signal::KILL, "killed")] {
        match pidfd_send_signal(&process, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(fail("cannot stop the process of", error.into())),
        }
        if ended(TERM) {
            return text::out(&format!("{done} proxyvpnd (process {})\n", pid.as_raw_nonzero()));
        }
    }
    Err(Failure::new(Exit::Failure, format!("proxyvpnd (process {}) does not end", pid.as_raw_nonzero())))
}

/// Whether the process runs a program of the daemon's name. The link ends in " (deleted)" after an upgrade.
fn is_daemon(pid: Pid) -> bool {
    fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).is_ok_and(|exe| {
        let name = exe.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.strip_suffix(" (deleted)").unwrap_or(&name) == "proxyvpnd"
    })
}

/// The daemon's program, found where only root can have put it.
fn find_daemon() -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    let mut refused = Vec::new();
    for directory in beside.into_iter().chain(DIRECTORIES.map(PathBuf::from)) {
        let path = directory.join("proxyvpnd");
        match trusted(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => refused.push(format!("{}: {error}", path.display())),
        }
    }
    let failure = Failure::new(Exit::Failure, "proxyvpnd, which does the clean-up, is not found");
    let by_hand = format!("Install proxyvpn again and repeat this, or {REBOOT}");
    Err(failure.advise(if refused.is_empty() { by_hand } else { format!("{}\n{by_hand}", refused.join("\n")) }))
}

/// Whether nobody but root can have written the program, or can replace it.
fn trusted(path: &Path) -> io::Result<()> {
    let file = path.metadata()?;
    let resolved = path.canonicalize()?;
    let directory = resolved.parent().unwrap_or(Path::new("/")).metadata()?;
    let roots = |metadata: &fs::Metadata| metadata.uid() == 0 && metadata.mode() & 0o022 == 0;
    if file.is_file() && roots(&file) && roots(&directory) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "not used: others than root could have changed it"))
}

/// Runs the daemon's clean-up and shows what it says.
async fn cleanup(daemon: &Path) -> Result<(), Failure> {
    let fail = |error: io::Error| Failure::new(Exit::Failure, format!("cannot run {}: {error}", daemon.display()));
    let advice = format!("Repeat it, or {REBOOT}");
    let mut child = command(daemon)
        .args(["--cleanup", "--end-holder"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // What is shown goes to standard error too when nobody reads our output: the clean-up must not end by that.
    let work = async {
        tokio::join!(relay(stdout, |line| _ = text::out(line)), relay(stderr, |line| text::note(line.trim_end())));
        child.wait().await
    };
    match tokio::time::timeout(CLEANUP, work).await {
        Err(_) => Err(Failure::new(Exit::TimedOut, format!("the clean-up did not end within {} s", CLEANUP.as_secs()))
            .advise(advice)),
        Ok(status) => match status.map_err(fail)? {
            status if status.success() => Ok(()),
            status => Err(Failure::new(Exit::Failure, format!("the clean-up failed ({status})")).advise(advice)),
        },
    }
}

/// Passes lines on, made safe for a terminal.
async fn relay(stream: Option<impl AsyncRead + Unpin>, mut show: impl FnMut(&str)) {
    let Some(stream) = stream else { return };
    let mut reader = BufReader::new(stream);
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes).await, Ok(1..)) {
        show(&text::lines(&String::from_utf8_lossy(&bytes)));
        bytes.clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn only_roots_programs_are_run() {
        assert!(trusted(Path::new("/usr/bin/env")).is_ok());
        assert_eq!(trusted(Path::new("/nonexistent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        let path = std::env::temp_dir().join(format!("proxyctl-trust-{}", std::process::id()));
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(trusted(&path).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn another_process_is_left_alone() {
        let path = std::env::temp_dir().join(format!("proxyctl-pid-{}", std::process::id()));
        // This very process is not proxyvpnd: a signal would end the test.
        fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        assert!(stop_process(&path).is_ok());
        fs::write(&path, "1\n").unwrap();
        assert!(stop_process(&path).is_err());
        fs::write(&path, "-5").unwrap();
        assert!(stop_process(&path).is_err());
        fs::remove_file(&path).unwrap();
        assert!(stop_process(&path).is_ok());
    }
}
