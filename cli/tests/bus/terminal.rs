//! What happens on a terminal: `script` of util-linux gives one.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

use crate::fake::{Daemon, Step, TestBus, finish};

/// Runs proxyctl on a terminal of its own, as a shell does with `line` behind its name.
fn on_terminal(bus: &TestBus, line: &str, input: Stdio) -> Child {
    Command::new("script")
        .args(["-qec", &format!("{} {line}", env!("CARGO_BIN_EXE_proxyctl")), "/dev/null"])
        .env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)
        .env("TERM", "xterm")
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn progress_is_one_line_that_is_taken_away() {
    let bus = TestBus::start();
    let _daemon = Daemon::stepping(
        &bus,
        &[
            Step::State("connecting", "create-tun", "", ""),
            Step::Progress(40, ""),
            Step::Pause(50),
            Step::State("connected", "", "", ""),
        ],
    )
    .await;
    let ran = finish(on_terminal(&bus, "connect office", Stdio::null())).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("\rconnecting: create-tun 40%  0 s\x1b[K"), "{ran:?}");
    assert!(ran.out.contains("\r\x1b[Kconnected, profile office"), "{ran:?}");
}

#[tokio::test]
async fn tor_has_a_bar_and_its_warning_a_line_of_its_own() {
    let bus = TestBus::start();
    let steps = [
        Step::State("connecting", "wait-bootstrap", "", ""),
        Step::Pause(200),
        Step::Tor(45, "Loading relay descriptors", "", ""),
        Step::Tor(45, "Loading relay descriptors", "No route", "Is there a network?"),
        Step::Pause(200),
        Step::State("connected", "", "", ""),
    ];
    let _daemon = Daemon::stepping(&bus, &steps).await;
    let ran = finish(on_terminal(&bus, "connect office", Stdio::null())).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("\rTor [#########-----------] 45%  Loading relay descriptors  0 s\x1b[K"), "{ran:?}");
    let warning = "\r\x1b[Kproxyctl: warning: Tor is held up: No route (TIMEOUT). Is there a network?\r\n\rTor [###";
    assert!(ran.out.contains(warning), "{ran:?}");
}

#[tokio::test]
async fn a_password_is_asked_for_without_echo() {
    let bus = TestBus::start();
    let daemon =
        Daemon::stepping(&bus, &[Step::State("connecting", "", "", ""), Step::State("connected", "", "", "")]).await;
    let mut child = on_terminal(&bus, "connect office --password -; stty -a", Stdio::piped());
    let mut stdin = child.stdin.take().unwrap();
    // Typed when it has been asked: the question throws away what came before.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    stdin.write_all(b"hunter2\n").await.unwrap();
    stdin.flush().await.unwrap();
    let ran = finish(child).await;
    drop(stdin);
    assert_eq!(daemon.script.lock().unwrap().received, ["hunter2"], "{ran:?}");
    assert!(ran.out.contains("Password for the proxy: ") && !ran.out.contains("hunter2"), "{ran:?}");
    assert!(ran.out.contains(" echo ") && !ran.out.contains(" -echo "), "the terminal echoes again: {ran:?}");
}
