//! A launcher that listens, and a daemon's part of a request, with a guest of a few instructions.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proxyvpn_torvm::launch::{Accelerator, Descriptor, MAX_MESSAGE, Reply, Request, STATE_SIZE};
use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with, socketpair, sockopt,
};
use rustix::process::{Pid, Signal, kill_process};

/// Who may connect, and who QEMU runs as: users that every Debian has.
pub(crate) const OWNER: &str = "daemon";
pub(crate) const USER: &str = "nobody";
/// Set in the copy of this program that runs in namespaces of its own.
const INSIDE: &str = "PROXYVPN_LAUNCHER_INSIDE";

/// Runs the named test once more in new namespaces, with a node of its own for the TUN driver; true in there.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let wanted = std::env::var_os("PROXYVPN_PRIVILEGED_TESTS").is_some_and(|value| value == "1");
    assert!(wanted, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes namespaces");
    let prepare = "mkdir -p /dev/net && mount -t tmpfs -o mode=755 tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"])
        .args(["sh", "-c", prepare, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespaces");
    false
}

/// Waits for `what` to give something.
pub(crate) fn wait<T>(text: &str, patience: Duration, mut what: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {patience:?}: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `proxyvpn-qemu --listen`, with a folder for the test's files.
pub(crate) struct Launcher {
    child: Child,
    pub(crate) dir: PathBuf,
    log: Arc<Mutex<String>>,
}

impl Launcher {
    pub(crate) fn start() -> Self {
        let dir = std::env::temp_dir().join(format!("proxyvpn-launcher-test-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_proxyvpn-qemu"))
            .arg("--listen")
            .arg(dir.join("socket"))
            .args(["--owner", OWNER, "--user", USER])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let writer = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                let line = line.unwrap();
                eprintln!("launcher| {}", line.escape_debug());
                writer.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        let launcher = Self { child, dir, log };
        wait("the launcher listens", Duration::from_secs(10), || launcher.try_connect());
        launcher
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    fn try_connect(&self) -> Option<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(self.socket()).unwrap()).ok()?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(20))).unwrap();
        Some(socket)
    }

    pub(crate) fn connect(&self) -> OwnedFd {
        self.try_connect().unwrap()
    }

    /// What a daemon sends for a guest with this kernel, and what it keeps.
    pub(crate) fn parts(&self, kernel: &[u8]) -> (Vec<OwnedFd>, Ends) {
        self.write("kernel", kernel, 0o644);
        self.write("initramfs", &[0; 4096], 0o644);
        if !self.dir.join("state").exists() {
            self.write("state", b"", 0o600);
            File::options().write(true).open(self.dir.join("state")).unwrap().set_len(STATE_SIZE).unwrap();
        }
        let mut config = File::from(memfd_create("config", MemfdFlags::CLOEXEC).unwrap());
        config.write_all(b"{}").unwrap();
        let (link, qemu_link) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_timeout(&link, sockopt::Timeout::Recv, Some(Duration::from_secs(5))).unwrap();
        let (qmp, qemu_qmp) = UnixStream::pair().unwrap();
        qmp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (channel, qemu_channel) = UnixStream::pair().unwrap();
        let fds = vec![
            tun(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR),
            qemu_link,
            qemu_qmp.into(),
            qemu_channel.into(),
            self.open("kernel", false),
            self.open("initramfs", false),
            self.open("state", true),
            config.into(),
        ];
        (fds, Ends { link, qmp, _channel: channel })
    }

    fn write(&self, name: &str, bytes: &[u8], mode: u32) {
        let path = self.dir.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn open(&self, name: &str, write: bool) -> OwnedFd {
        File::options().read(true).write(write).open(self.dir.join(name)).unwrap().into()
    }

    /// Starts a guest that says `text` and then waits for ever.
    pub(crate) fn guest(&self, text: &str) -> Guest {
        let (fds, ends) = self.parts(&guest(text));
        let connection = self.connect();
        send_request(&connection, &fds);
        drop(fds);
        let reply = reply(&connection).unwrap();
        assert!(matches!(&reply, Reply::Started { version } if version.contains('.')), "{reply:?}");
        assert!(line(&ends.qmp).starts_with(r#"{"QMP": {"version""#));
        // It is set up, with its restrictions and signal handlers, and reads none of the files any more.
        let last = text.lines().last().unwrap();
        wait("the guest says its line", Duration::from_secs(20), || self.log().contains(last).then_some(()));
        let (launcher, qemu) = wait("QEMU runs", Duration::from_secs(5), || self.newest_qemu());
        Guest { connection, ends, launcher, qemu }
    }

    /// The number of the newest QEMU of this launcher, with that of the process that supervises it.
    fn newest_qemu(&self) -> Option<(u32, u32)> {
        let parents: Vec<(u32, u32)> = processes().into_iter().filter_map(|pid| Some((pid, parent(pid)?))).collect();
        let mut found = vec![];
        for (pid, supervisor) in &parents {
            let mut above = *supervisor;
            while above > 1 && above != self.child.id() {
                above = parents.iter().find(|(pid, _)| *pid == above).map_or(0, |(_, parent)| *parent);
            }
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if above == self.child.id() && comm.starts_with("qemu-system") {
                found.push((*supervisor, *pid));
            }
        }
        found.into_iter().max_by_key(|(_, pid)| *pid)
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The daemon's ends.
pub(crate) struct Ends {
    pub(crate) link: OwnedFd,
    pub(crate) qmp: UnixStream,
    _channel: UnixStream,
}

/// A guest that runs.
pub(crate) struct Guest {
    pub(crate) connection: OwnedFd,
    pub(crate) ends: Ends,
    /// Who supervises it.
    pub(crate) launcher: u32,
    pub(crate) qemu: u32,
}

impl Guest {
    /// Waits until its QEMU is gone, and gives the time that this took.
    pub(crate) fn gone(&self, patience: Duration) -> Duration {
        let begin = Instant::now();
        wait("QEMU is gone", patience, || (!Path::new(&format!("/proc/{}/exe", self.qemu)).exists()).then_some(()));
        begin.elapsed()
    }
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

/// A line of QMP.
pub(crate) fn line(qmp: &UnixStream) -> String {
    let mut text = vec![];
    let mut byte = [0];
    while (&*qmp).read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        text.extend(byte);
    }
    String::from_utf8(text).unwrap()
}

pub(crate) fn send_request(connection: &OwnedFd, fds: &[OwnedFd]) {
    let request = Request { accelerator: Accelerator::Tcg, memory_mib: 128 };
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(Descriptor::ALL.len() + 1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let text = serde_json::to_vec(&request).unwrap();
    sendmsg(connection, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
}

/// `None`: the connection was closed.
pub(crate) fn reply(connection: &OwnedFd) -> Option<Reply> {
    let mut buffer = [0; MAX_MESSAGE];
    let (_, count) = recv(connection, &mut buffer, RecvFlags::empty()).unwrap();
    (count > 0).then(|| serde_json::from_slice(&buffer[..count]).unwrap())
}

/// A queue of a new device.
#[allow(unsafe_code, reason = "an ioctl")]
pub(crate) fn tun(flags: i32) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: ifreq is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) }, 0);
    file.into()
}

/// A kernel by the Multiboot specification: writes `text` to the first serial port, and halts.
pub(crate) fn guest(text: &str) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const HEADER: u32 = 32;
    const CODE: u32 = 24;
    // mov dx, 0x3f8; mov esi, text; again: lodsb; test al, al; jz end; out dx, al; jmp again; end: cli; hlt
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0, 0xbe];
    code.extend((BASE + HEADER + CODE).to_le_bytes());
    code.extend([0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xfa, 0xf4]);
    code.resize(CODE as usize, 0x90);
    code.extend(text.bytes());
    code.push(0);
    let end = BASE + HEADER + u32::try_from(code.len()).unwrap();
    // magic, "addresses follow", checksum; header, load, end of load, end of bss, entry
    let (magic, flags) = (0x1bad_b002_u32, 0x1_0000_u32);
    let checksum = 0u32.wrapping_sub(magic + flags);
    let header = [magic, flags, checksum, BASE, BASE, end, end, BASE + HEADER];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(code).collect()
}

fn processes() -> Vec<u32> {
    let names = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}
