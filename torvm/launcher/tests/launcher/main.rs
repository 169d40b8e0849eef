//! A guest that breaks out of QEMU finds nothing; a QEMU that nobody wants ends; what the daemon must not send is refused. With a real
//! QEMU, which the launcher isolates itself.
//!
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyvpn-qemu --features privileged-tests --test launcher -- --ignored`
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "tests")]

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use lab::{Launcher, guest, inside, kill, line, reply, send_request, tun, wait};
use proxyvpn_torvm::launch::{Descriptor, Reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(2);

#[test]
#[ignore = "needs root"]
fn it_runs_as_long_as_one_copy_of_the_connection_is_open() {
    if !inside("it_runs_as_long_as_one_copy_of_the_connection_is_open") {
        return;
    }
    let launcher = Launcher::start();
    let vm = launcher.guest("hello\n");
    (&vm.ends.qmp).write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
    assert_eq!(line(&vm.ends.qmp).trim_end(), r#"{"return": {}}"#);

    // As in the service manager's store, when the daemon is killed: the next one goes on with the copies.
    let (connection, qmp) = (vm.connection.try_clone().unwrap(), vm.ends.qmp.try_clone().unwrap());
    let lab::Guest { connection: old, ends: lab::Ends { link, .. }, qemu, launcher: supervisor } = vm;
    drop(old);
    std::thread::sleep(SOON);
    (&qmp).write_all(b"{\"execute\":\"query-status\"}").unwrap();
    assert!(line(&qmp).contains(r#""status": "running""#));

    drop(connection);
    wait("QEMU ends", SOON, || fs::metadata(format!("/proc/{qemu}/exe")).is_err().then_some(()));
    wait("the launcher ends", SOON, || fs::metadata(format!("/proc/{supervisor}/exe")).is_err().then_some(()));
    // Nobody else held the link: the packet engine sees its end.
    assert_eq!(recv(&link, &mut [0; 9], RecvFlags::empty()).unwrap().1, 0);
}

#[test]
#[ignore = "needs root"]
fn who_breaks_out_finds_nothing() {
    if !inside("who_breaks_out_finds_nothing") {
        return;
    }
    let launcher = Launcher::start();
    // What a host has: a service in the abstract namespace, one on the loopback device, files.
    let ip = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(ip.success());
    let tcp = std::net::TcpListener::bind("127.0.0.1:7777").unwrap();
    let service = UnixListener::bind(launcher.dir.join("service")).unwrap();
    let vm = launcher.guest("hello\n");

    let status = fs::read_to_string(format!("/proc/{}/status", vm.qemu)).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:"), field("Groups:")), ("1".into(), "2".into(), String::new()));
    // the launcher's, and QEMU's own
    assert_eq!(field("Seccomp_filters:"), "2");
    assert_eq!(field("Uid:"), "65534\t65534\t65534\t65534");
    for kind in ["net", "mnt", "pid", "ipc", "uts", "cgroup"] {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(namespace(&vm.qemu.to_string()), namespace("self"), "{kind}");
    }
    only_its_descriptors(&launcher, vm.qemu);

    let drill = r#"
        echo "devices: $(sed 1,2d /proc/net/dev | cut -d: -f1 | xargs)"
        echo "up: $(ip -o link show up 2>&1)"
        echo "root: $(ls / | xargs)"
        echo "writable: $(find / -path /proc -prune -o ! -type l -writable -print 2>/dev/null | xargs)"
        echo "processes: $(ls /proc | grep -c '^[0-9]')"
        echo "launcher: $(ls /proc/1/ 2>&1 | grep -o 'No such file or directory')"
        kill -9 1; sleep 0.2; echo "alive: $?"
        echo "mount: $(mount -t tmpfs x /dev 2>&1 >/dev/null | wc -l)"
        echo "namespace: $(unshare --net true 2>&1 | wc -l)"
        python3 - <<'END'
import socket
def attempt(name, family, address):
    try: socket.socket(family).connect(address); print(name, 'CONNECTED')
    except OSError as error: print(name, error.strerror)
attempt('loopback:', socket.AF_INET, ('127.0.0.1', 7777))
attempt('outside:', socket.AF_INET, ('192.0.2.1', 80))
attempt('service:', socket.AF_UNIX, 'SERVICE')
attempt('bus:', socket.AF_UNIX, '/run/dbus/system_bus_socket')
END
    "#;
    let drill = drill.replace("SERVICE", launcher.dir.join("service").to_str().unwrap());
    let output = Command::new("nsenter")
        .args(["--target", &vm.qemu.to_string(), "--all", "--", "/usr/bin/setpriv", "--reuid=65534", "--regid=65534"])
        .args(["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "/bin/sh", "-c", &drill])
        .env("PATH", "/usr/bin:/usr/sbin")
        .output()
        .unwrap();
    let found = String::from_utf8(output.stdout).unwrap();
    eprintln!("{found}{}", String::from_utf8_lossy(&output.stderr));
    let says =
        |name: &str| found.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("nothing").trim().to_owned();
    assert_eq!((says("devices:"), says("up:")), ("lo".into(), String::new()));
    let root: BTreeSet<String> = says("root:").split(' ').map(str::to_owned).collect();
    let known = ["bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "usr"].map(str::to_owned);
    assert!(root.is_subset(&known.into()), "{root:?}");
    assert!(["/dev/null", "/dev/kvm /dev/null"].contains(&says("writable:").as_str()), "{found}");
    assert_eq!(says("launcher:"), "No such file or directory");
    assert_eq!(says("alive:"), "0");
    assert_ne!((says("mount:"), says("namespace:")), ("0".into(), "0".into()));
    assert_eq!(
        (says("loopback:"), says("outside:")),
        ("Network is unreachable".into(), "Network is unreachable".into())
    );
    assert_eq!(
        (says("service:"), says("bus:")),
        ("No such file or directory".into(), "No such file or directory".into())
    );
    drop((tcp, service));
    // It took neither the launcher nor QEMU along.
    assert!(fs::metadata(format!("/proc/{}/exe", vm.qemu)).is_ok());
}

/// What QEMU holds open: the request's eight, pipes to the launcher, and what it made for its own event loop.
fn only_its_descriptors(launcher: &Launcher, qemu: u32) {
    let fds = fs::read_dir(format!("/proc/{qemu}/fd")).unwrap();
    let targets: Vec<String> =
        fds.map(|fd| fs::read_link(fd.unwrap().path()).unwrap().to_str().unwrap().to_owned()).collect();
    let counted = |wanted: &dyn Fn(&str) -> bool| targets.iter().filter(|target| wanted(target)).count();
    let dir = launcher.dir.to_str().unwrap();
    let file = |name: &'static str| move |target: &str| target == format!("{dir}/{name}");
    assert_eq!(counted(&|target| target.starts_with("socket:")), 3, "{targets:?}");
    assert_eq!(counted(&|target| target.starts_with("pipe:")), 2, "{targets:?}");
    assert_eq!(counted(&|target| target.ends_with("/net/tun")), 1, "{targets:?}");
    assert_eq!((counted(&file("kernel")), counted(&file("initramfs"))), (1, 1), "{targets:?}");
    let rest = |target: &str| {
        [
            "socket:",
            "pipe:",
            "/dev/null",
            "anon_inode:[eventfd]",
            "anon_inode:[signalfd]",
            "anon_inode:[eventpoll]",
            "/memfd:config",
        ]
        .iter()
        .any(|known| target.starts_with(known))
            || target.ends_with("/net/tun")
            || ["kernel", "initramfs", "state"].iter().any(|name| target == format!("{dir}/{name}"))
    };
    assert_eq!(counted(&rest), targets.len(), "{targets:?}");
}

#[test]
#[ignore = "needs root"]
fn its_end_is_told_with_the_cause() {
    if !inside("its_end_is_told_with_the_cause") {
        return;
    }
    let launcher = Launcher::start();
    let (fds, _ends) = launcher.parts(b"this is not a kernel");
    let connection = launcher.connect();
    send_request(&connection, &fds);
    assert!(matches!(reply(&connection), Some(Reply::Started { .. })));
    let Some(Reply::Ended { cause }) = reply(&connection) else { panic!("not told") };
    assert!(cause.starts_with("QEMU ended with status 1; ") && cause.contains("kernel"), "{cause}");
    assert_eq!(reply(&connection), None);

    // The state disk of a machine that runs is locked.
    let first = launcher.guest("first\n");
    let (fds, _ends) = launcher.parts(&guest("second\n"));
    let connection = launcher.connect();
    send_request(&connection, &fds);
    assert!(matches!(reply(&connection), Some(Reply::Started { .. })));
    let Some(Reply::Ended { cause }) = reply(&connection) else { panic!("not told") };
    assert!(cause.contains("lock"), "{cause}");

    kill(first.qemu, Signal::SEGV);
    let Some(Reply::Ended { cause }) = reply(&first.connection) else { panic!("not told") };
    assert_eq!(cause, "QEMU was ended by signal 11", "what the firmware and the guest printed is no cause");

    // Unless it says why it ends.
    let third = launcher.guest("\x1b[2J[ 1.0] Kernel panic - not syncing: drill\nthird\n");
    kill(third.qemu, Signal::SEGV);
    let Some(Reply::Ended { cause }) = reply(&third.connection) else { panic!("not told") };
    assert_eq!(cause, "QEMU was ended by signal 11; Kernel panic - not syncing: drill");
}

#[test]
#[ignore = "needs root"]
fn what_the_guest_prints_comes_into_the_log_without_steering_a_terminal() {
    if !inside("what_the_guest_prints_comes_into_the_log_without_steering_a_terminal") {
        return;
    }
    let launcher = Launcher::start();
    let _vm = launcher.guest("\r\n\x1b[2J\x1b]0;title\x07good\r\nproxyvpnd: forged\n");
    let log = launcher.log();
    assert!(log.lines().any(|line| line == "guest: proxyvpnd: forged"), "{log}");
    assert!(log.chars().all(|char| char == '\n' || char == ' ' || char.is_ascii_graphic()), "{log:?}");
}

#[test]
#[ignore = "needs root"]
fn a_qemu_that_does_not_end_is_killed() {
    if !inside("a_qemu_that_does_not_end_is_killed") {
        return;
    }
    let launcher = Launcher::start();
    let mut vm = launcher.guest("hello\n");
    kill(vm.qemu, Signal::STOP);
    vm.connection = UnixStream::pair().unwrap().0.into();
    let took = vm.gone(Duration::from_secs(4));
    assert!(took > Duration::from_millis(1500), "it was not asked first: {took:?}");
}

#[test]
#[ignore = "needs root"]
fn qemu_does_not_outlive_who_supervises_it() {
    if !inside("qemu_does_not_outlive_who_supervises_it") {
        return;
    }
    let launcher = Launcher::start();
    let vm = launcher.guest("hello\n");
    kill(vm.launcher, Signal::KILL);
    vm.gone(SOON);
    assert_eq!(reply(&vm.connection), None);
}

#[test]
#[ignore = "needs root"]
fn strangers_and_a_fifth_guest_are_refused() {
    if !inside("strangers_and_a_fifth_guest_are_refused") {
        return;
    }
    let launcher = Launcher::start();
    let socket = launcher.socket();
    let metadata = fs::metadata(&socket).unwrap();
    assert_eq!((metadata.mode() & 0o777, metadata.uid()), (0o600, 1));
    let attempt = |user: &str| {
        let script = format!(
            "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect({socket:?})\ntry: s.send(b'x')\nexcept BrokenPipeError: pass\nprint(s.recv(999).decode())"
        );
        let output = Command::new("setpriv")
            .args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
                "/usr/bin/python3",
                "-c",
                &script,
            ])
            .output()
            .unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    assert!(attempt("2").contains("Permission denied"));
    // Somebody has opened the socket to all: the launcher looks itself.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(attempt("2").contains("user 2 may not start QEMU"), "{}", attempt("2"));
    assert!(attempt("1").contains("the request is refused"), "{}", attempt("1"));

    // The guest before may still count: the fifth is refused, or the fourth already.
    let held: Vec<OwnedFd> = (0..5).map(|_| launcher.connect()).collect();
    let mut fds: Vec<PollFd<'_>> = held.iter().map(|connection| PollFd::new(connection, PollFlags::IN)).collect();
    assert!(poll(&mut fds, Some(&Timespec { tv_sec: 3, tv_nsec: 0 })).unwrap() > 0, "five were accepted");
    let answered = fds.iter().position(|fd| fd.revents().contains(PollFlags::IN)).unwrap();
    assert_eq!(reply(&held[answered]), Some(Reply::Failed { cause: "4 QEMUs run already".to_owned() }));
    drop(held);
    wait("there is room again", Duration::from_secs(5), || {
        let connection = launcher.connect();
        rustix::net::send(&connection, b"x", rustix::net::SendFlags::empty()).ok()?;
        matches!(reply(&connection), Some(Reply::Failed { cause }) if cause.starts_with("the request")).then_some(())
    });
}

#[test]
#[ignore = "needs root"]
fn descriptors_that_are_not_what_they_should_be_are_refused() {
    if !inside("descriptors_that_are_not_what_they_should_be_are_refused") {
        return;
    }
    let launcher = Launcher::start();
    let refusal = |place: Descriptor, wrong: OwnedFd| {
        let (mut fds, _ends) = launcher.parts(&guest("x\n"));
        let index = Descriptor::ALL.iter().position(|descriptor| *descriptor == place).unwrap();
        fds[index] = wrong;
        let connection = launcher.connect();
        send_request(&connection, &fds);
        match reply(&connection) {
            Some(Reply::Failed { cause }) => cause,
            other => panic!("{place:?}: {other:?}"),
        }
    };
    let (_, _) = launcher.parts(b"");
    assert!(
        refusal(Descriptor::Tap, tun(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR)).contains("of a TUN device")
    );
    assert!(refusal(Descriptor::Tap, tun(libc::IFF_TAP | libc::IFF_NO_PI)).contains("virtio headers"));
    assert!(refusal(Descriptor::Tap, launcher.open("state", true)).contains("Tap is not a queue"));
    assert!(refusal(Descriptor::Link, UnixStream::pair().unwrap().0.into()).contains("SOCK_SEQPACKET"));
    assert!(refusal(Descriptor::Kernel, launcher.open("kernel", true)).contains("not opened read-only"));
    assert!(refusal(Descriptor::Initramfs, launcher.open("state", false)).contains("not readable by anybody"));
    assert!(refusal(Descriptor::State, launcher.open("state", false)).contains("for reading and writing"));
    assert!(refusal(Descriptor::State, launcher.open("kernel", true)).contains("more or less than it may"));
    let (fds, _ends) = launcher.parts(&guest("x\n"));
    for count in [1, 7] {
        let connection = launcher.connect();
        send_request(&connection, &fds[..count]);
        let Some(Reply::Failed { cause }) = reply(&connection) else { panic!("{count} accepted") };
        assert!(cause.contains(&format!("{count} descriptors, not 8")), "{cause}");
    }
}
