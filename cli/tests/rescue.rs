//! P3, never stuck: `proxyctl rescue` with neither daemon nor bus; and polkit's agent for who is not root. In mount, network
//! and pid namespaces of their own:
//! `PROXYVPN_PRIVILEGED_TESTS=1 cargo test -p proxyctl --features privileged-tests --test rescue -- --ignored`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test may stop")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory of root's with proxyctl and, beside it, a daemon that says how it was called.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let yes = std::env::var("PROXYVPN_PRIVILEGED_TESTS").is_ok_and(|value| value == "1");
        assert!(yes, "set PROXYVPN_PRIVILEGED_TESTS=1: this test needs root and makes namespaces");
        let place = Self(std::env::temp_dir().join(format!("proxyctl-rescue-{name}-{}", std::process::id())));
        fs::create_dir(&place.0).unwrap();
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_proxyctl"), place.0.join("proxyctl")).unwrap();
        place.write("proxyvpnd", "#!/bin/sh\nprintf 'removed table %s \\033[2J\\n' \"$*\"\nenv | sort >&2\n");
        place
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.0.join(name), content).unwrap();
        fs::set_permissions(self.0.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs a shell line in namespaces with an empty /run; `$HERE` is this directory.
    fn run(&self, line: &str) -> (i32, String, String) {
        let setup = format!("mount -t tmpfs tmpfs /run || exit 99; mkdir /run/proxyvpn; {line}");
        let output: Output = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"])
            .args(["sh", "-c", &setup])
            .env("HERE", &self.0)
            .env("SECRET", "hunter2")
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
#[ignore = "needs root"]
fn rescue_runs_the_clean_up_without_bus_and_environment() {
    let place = Place::new("plain");
    let (code, out, err) = place.run("$HERE/proxyctl rescue");
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with("removed table --cleanup --end-holder \\x1b[2J\nrescue: done\n"), "{out}");
    assert!(!err.contains("hunter2") && err.contains("PATH=/usr/sbin:/usr/bin:/sbin:/bin"), "{err}");
    place.write("proxyvpnd", "#!/bin/sh\nexit 3\n");
    let (code, out, err) = place.run("$HERE/proxyctl rescue");
    assert!(code == 1 && err.contains("the clean-up failed") && !out.contains("done"), "{out}{err}");
}

#[test]
#[ignore = "needs root"]
fn rescue_stops_the_daemon_first_even_one_that_ignores_it() {
    let place = Place::new("stop");
    // A program whose /proc/PID/exe is called proxyvpnd.
    fs::create_dir(place.0.join("running")).unwrap();
    fs::copy(Path::new("/bin/bash"), place.0.join("running/proxyvpnd")).unwrap();
    let start = "echo $! > /run/proxyvpn/proxyvpnd.pid; sleep 0.3";
    let (code, out, err) =
        place.run(&format!("$HERE/running/proxyvpnd -c 'sleep 99; :' & {start}; $HERE/proxyctl rescue; kill -0 $! 2>/dev/null && echo alive; true"));
    assert!(code == 0 && out.contains("stopped proxyvpnd (process ") && !out.contains("alive"), "{out}{err}");
    let (code, out, err) = place.run(&format!(
        "$HERE/running/proxyvpnd -c 'trap \"\" TERM; while :; do sleep 1; done' & {start}; $HERE/proxyctl rescue"
    ));
    assert!(code == 0 && out.contains("killed proxyvpnd (process "), "{out}{err}");
    // Anti-test: the number of another program is left alone.
    let (code, out, err) = place.run(&format!("sleep 99 & {start}; $HERE/proxyctl rescue; kill -0 $! && echo alive"));
    assert!(code == 0 && out.contains("alive") && !out.contains("stopped"), "{out}{err}");
}

#[test]
#[ignore = "needs root"]
fn rescue_runs_nothing_that_others_can_write() {
    let place = Place::new("trust");
    let hidden = "for d in /usr/libexec /usr/lib/proxyvpn /usr/local; do [ ! -d $d ] || mount -t tmpfs tmpfs $d; done";
    for spoil in [
        "chmod 775 $HERE/proxyvpnd",
        "chmod 777 $HERE",
        "chmod 755 $HERE; chown 1 $HERE/proxyvpnd",
        "rm $HERE/proxyvpnd",
    ] {
        let (code, out, err) = place.run(&format!("{hidden}; {spoil}; $HERE/proxyctl rescue"));
        assert!(code == 1 && err.contains("is not found") && !out.contains("removed"), "{spoil}: {out}{err}");
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o755)).unwrap();
        place.write("proxyvpnd", "#!/bin/sh\necho removed\n");
    }
}

#[test]
#[ignore = "needs root"]
fn rescue_is_for_root() {
    let place = Place::new("user");
    let (code, _, err) = place.run("setpriv --reuid 65534 --regid 65534 --clear-groups $HERE/proxyctl rescue");
    assert!(code == 4 && err.contains("sudo proxyctl rescue"), "{err}");
}

#[test]
#[ignore = "needs root"]
fn polkits_agent_runs_for_this_process_and_ends_with_it() {
    let place = Place::new("agent");
    // The agent stands in for pkttyagent: it says how it was called, registers by closing the descriptor, and waits.
    place.write(
        "pkttyagent",
        "#!/bin/bash\nwhile [ $# -gt 0 ]; do case $1 in --notify-fd) n=$2; shift;; --process) p=$2; shift;; esac; shift; done\n\
         echo \"agent for $p, parent $PPID\" >&2\ntrap 'echo agent ended >&2; exit' TERM\neval \"exec $n>&-\"\n\
         while :; do sleep 0.05; done\n",
    );
    place.write(
        "bus.conf",
        "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\" \
         \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\"><busconfig><type>session</type>\
         <listen>unix:path=/run/bus</listen><auth>EXTERNAL</auth><policy context=\"default\"><allow user=\"*\"/>\
         <allow own=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy></busconfig>",
    );
    let bus = "chmod 755 /run; dbus-daemon --config-file=$HERE/bus.conf --fork --nopidfile; \
               export DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/bus PATH=$HERE:$PATH";
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let (_, out, err) = place.run(&format!("{bus}; script -qec '{user} proxyctl flows' /dev/null </dev/null"));
    let line = out.lines().find(|line| line.starts_with("agent for ")).unwrap_or_else(|| panic!("{out}{err}"));
    let numbers: Vec<&str> = line.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()).collect();
    assert!(numbers.len() == 2 && numbers[0] == numbers[1], "{line}");
    assert!(out.contains("agent ended") && out.contains("proxyvpnd is not installed"), "{out}{err}");
    // Neither for root nor away from a terminal.
    let (_, out, err) =
        place.run(&format!("{bus}; script -qec 'proxyctl flows' /dev/null </dev/null; {user} proxyctl flows"));
    assert!(!format!("{out}{err}").contains("agent for"), "{out}{err}");
}
