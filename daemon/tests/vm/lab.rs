//! A TAP device, a launcher, an image and a place for the state disk.
#![allow(unsafe_code, reason = "the TUN driver has no safe interface")]

use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use proxyvpn_torvm::config::{GuestConfig, List, TorSettings};
use proxyvpn_torvm::launch::Accelerator;
use proxyvpn_torvm::link::{HOST, HOST_MAC, PREFIX};
use proxyvpnd::tor::Password;
use proxyvpnd::vm::accel::Acceleration;
use proxyvpnd::vm::{Error, Image, Kept, Spec, Vm};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const TAP: &str = "torvm0";

pub(crate) struct Lab {
    directory: PathBuf,
    image: PathBuf,
    tap: File,
    launcher: Child,
    /// The packet engine's end of the guest's way out: nobody reads it.
    _link: OwnedFd,
    guest: OwnedFd,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let opted_in = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|value| value == "1");
        assert!(opted_in, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and namespaces of its own");
        // Built with the tests of the launcher: beside the folder that this program is in.
        let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("proxyvpn-qemu");
        let image =
            std::env::var_os("PROXYVPN_TORVM_IMAGE").map_or_else(|| "/usr/lib/proxyvpn/torvm".into(), PathBuf::from);
        assert!(
            image.join("manifest.json").exists(),
            "make the image with scripts/build-torvm-image.sh --out {}",
            image.display()
        );
        let directory = std::env::temp_dir().join(format!("proxyvpn-vm-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let tap = tap();
        let mac = HOST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        sh(&format!("ip link set {TAP} address {mac} up && ip addr add {HOST}/{PREFIX} dev {TAP}"));
        let socket = directory.join("socket");
        let mut launcher = Command::new(program);
        launcher.arg("--listen").arg(&socket).args(["--owner", "root", "--user", "nobody"]);
        let launcher = launcher.spawn().unwrap();
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(10), "the launcher does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        let (link, guest) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        Self { directory, image, tap, launcher, _link: link, guest }
    }

    pub(crate) async fn launch(
        &self,
        accelerator: Option<Accelerator>,
        password: &Password,
    ) -> Result<(Vm, Acceleration), Error> {
        let image = Image::open(&self.image).await?;
        let config = GuestConfig {
            control_password: password.hashed().unwrap(),
            tor: TorSettings::default(),
            proxy: None,
            hosts: List::default(),
        };
        let state = self.directory.join("state");
        let spec = Spec { accelerator, memory_mib: 192, config, state: &state };
        Vm::launch(&self.directory.join("socket"), image, spec, self.tap.as_fd(), self.guest.try_clone().unwrap()).await
    }

    /// Whether the guest left its file system in order.
    pub(crate) fn check_disk(&self) {
        sh(&format!("e2fsck -fn {}", self.directory.join("state/state.img").display()));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What the service manager's store would have.
pub(crate) fn copies(vm: &Vm) -> Kept {
    Kept::new(vm.kept().map(|(_, fd)| fd.try_clone_to_owned().unwrap()))
}

/// The daemon is killed between two bytes, and another one takes over.
pub(crate) fn hand_over(vm: Vm) -> Option<Vm> {
    let kept = copies(&vm);
    let [_, (_, qmp), (_, channel)] = vm.kept();
    rustix::io::write(qmp, b"{\"execute\": \"query-status\", ").unwrap();
    rustix::io::write(channel, b"{\"order\":").unwrap();
    drop(vm);
    Vm::adopt(kept)
}

/// The process of QEMU in this namespace of processes.
pub(crate) fn qemu() -> Option<u32> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    processes.into_iter().find(|pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
            && fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    })
}

/// Waits until there is none.
pub(crate) async fn gone() {
    let start = Instant::now();
    while let Some(pid) = qemu() {
        assert!(start.elapsed() < Duration::from_secs(4), "QEMU still runs: {pid}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn signal(name: &str) {
    sh(&format!("kill -{name} {}", qemu().expect("QEMU runs")));
}

fn sh(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn tap() -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: ifreq is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call; the descriptor is open.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    file
}
