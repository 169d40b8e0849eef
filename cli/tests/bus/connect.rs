//! connect, disconnect, reconnect: every way they can end.

use std::time::Duration;

use proxyvpn_dbus::types::{HealthItem, LogRecord, Reason};
use proxyvpn_dbus::{Error, ReasonCode};

use crate::fake::{Daemon, Script, Step, TestBus, finish};

const GOOD: [Step; 6] = [
    Step::State("connecting", "check-privileges", "", ""),
    Step::Progress(10, "checking"),
    Step::State("connecting", "create-tun", "", ""),
    Step::Progress(60, "creating pvpn0"),
    Step::Pause(20),
    Step::State("connected", "", "", ""),
];

#[tokio::test]
async fn connect_follows_the_phases_to_success() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &GOOD).await;
    let ran = bus.run(&["connect", "office"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.out, "connected, profile office, through http://proxy.example:8080, device pvpn0\n");
    assert!(ran.err.contains("connecting: check-privileges\n"), "{ran:?}");
    assert!(ran.err.contains("connecting: create-tun 60% (creating pvpn0)\n"), "{ran:?}");
    assert!(!ran.err.contains(['\r', '\x1b']), "plain lines where there is no terminal: {ran:?}");
    assert_eq!(daemon.calls(), ["Connect 'office'"]);
}

#[tokio::test]
async fn every_flag_reaches_the_daemon_and_the_password_as_a_descriptor() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &GOOD).await;
    let file = bus.directory.join("password");
    std::fs::write(&file, "hunter2\n").unwrap();
    let ran = bus
        .run(&[
            "up",
            "--proxy-host",
            "fd00::1",
            "--proxy-port",
            "3128",
            "--username",
            "alice",
            "--password-file",
            file.to_str().unwrap(),
            "--proxy-ip",
            "192.0.2.1,192.0.2.2",
            "--tun-name",
            "t0",
            "--tun-cidr",
            "10.1.1.1/30",
            "--mtu",
            "1500",
            "--dns",
            "192.0.2.53",
            "--allow-dns",
            "192.0.2.54",
            "--no-killswitch",
            "--lan",
            "10.0.0.0/8",
            "--bypass-user",
            "squid",
            "--verbose",
        ])
        .await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        daemon.calls(),
        [
            "Connect '' bypass-users=[\"squid\"] dns=[\"192.0.2.53\", \"192.0.2.54\"] killswitch=false lan=[\"10.0.0.0/8\"] \
          mtu=uint32 1500 proxy-ip=[\"192.0.2.1\", \"192.0.2.2\"] proxy-url=\"http://[fd00::1]:3128\" tun-cidr=\"10.1.1.1/30\" \
          tun-name=\"t0\" username=\"alice\" verbose=true"
        ]
    );
    assert_eq!(daemon.script.lock().unwrap().received, ["hunter2"]);
    assert!(!ran.err.contains("warning"), "{ran:?}");
}

#[tokio::test]
async fn a_password_on_the_command_line_is_warned_about_and_in_a_url_refused() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &GOOD).await;
    let ran = bus.run(&["connect", "office", "--password", "hunter2"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("visible to all users (ps)") && ran.err.contains("--password-file"), "{ran:?}");
    assert_eq!(daemon.script.lock().unwrap().received, ["hunter2"]);
    let ran = bus.run(&["connect", "--proxy-url", "http://alice:hunter2@proxy:1"]).await;
    assert_eq!(ran.code, 2);
    assert!(!ran.err.contains("hunter2") && ran.err.contains("--password -"), "{ran:?}");
    assert_eq!(daemon.calls().len(), 1);
}

#[tokio::test]
async fn every_error_name_has_its_exit_code() {
    type Named = fn(String) -> Error;
    let cases: [(Named, i32); 12] = [
        (Error::NotAuthorized, 4),
        (Error::NoSuchProfile, 1),
        (Error::InvalidProfile, 1),
        (Error::ProfileExists, 1),
        (Error::ProfileProtected, 1),
        (Error::InvalidOption, 2),
        (Error::Busy, 1),
        (Error::NotConnected, 3),
        (Error::NeverConnected, 1),
        (Error::NotSupported, 1),
        (Error::LimitExceeded, 1),
        (Error::Internal, 1),
    ];
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    for (error, code) in cases {
        let text = format!("the cause of {code}\x1b[2J\nproxyctl: ok");
        {
            let mut script = daemon.script.lock().unwrap();
            (script.error, script.error_text) = (Some(error), text);
        }
        let ran = bus.run(&["connect", "office"]).await;
        assert_eq!(ran.code, code, "{ran:?}");
        assert!(ran.err.starts_with(&format!("proxyctl: the cause of {code}\\x1b[2J\n  proxyctl: ok\n")), "{ran:?}");
        assert_eq!(ran.out, "");
    }
}

#[tokio::test]
async fn every_reason_ends_in_failure_or_block_with_its_text() {
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    for reason in ReasonCode::ALL {
        for (state, code) in [("disconnected", 1), ("blocked", 6)] {
            daemon.script.lock().unwrap().steps = vec![
                Step::State("connecting", "probe-upstream", "", ""),
                Step::State(state, "", reason.as_str(), "what went wrong"),
            ];
            let ran = bus.run(&["connect", "office"]).await;
            assert_eq!(ran.code, code, "{reason} {ran:?}");
            if *reason != ReasonCode::Requested {
                assert!(ran.err.contains("what went wrong"), "{reason} {ran:?}");
            }
            if code == 6 {
                assert!(ran.err.contains("proxyctl disconnect") && ran.err.contains("rescue"), "{ran:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_state_that_no_signal_told_is_seen() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &[Step::Silent("connected", "", "")]).await;
    assert_eq!(bus.run(&["connect", "office"]).await.code, 0);
    daemon.script.lock().unwrap().steps = vec![
        Step::Silent("connecting", "", ""),
        Step::Silent("disconnected", "upstream-silent", "the proxy says nothing"),
    ];
    let ran = bus.run(&["connect", "office"]).await;
    assert!(ran.code == 1 && ran.err.contains("the proxy says nothing"), "{ran:?}");
}

#[tokio::test]
async fn a_daemon_that_dies_is_not_waited_for() {
    let bus = TestBus::start();
    let _daemon = Daemon::stepping(&bus, &[Step::State("connecting", "", "", ""), Step::Pause(50), Step::Vanish]).await;
    let ran = bus.run(&["connect", "office"]).await;
    assert!(ran.code == 7 && ran.err.contains("the daemon stopped meanwhile") && ran.err.contains("rescue"), "{ran:?}");
    let _daemon = Daemon::start(&bus, Script { die: true, ..Script::default() }).await;
    let ran = bus.run(&["connect", "office"]).await;
    assert!(ran.code == 7 && ran.err.contains("the daemon stopped meanwhile"), "{ran:?}");
}

#[tokio::test]
async fn waiting_has_an_end() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &[Step::State("connecting", "probe-upstream", "", "")]).await;
    let ran = bus.run(&["connect", "office", "--timeout", "1"]).await;
    assert!(ran.code == 5 && ran.err.contains("not connected after 1 s"), "{ran:?}");
    let ran = bus.run(&["connect", "office", "--no-wait"]).await;
    assert!(ran.code == 0 && ran.out.starts_with("accepted"), "{ran:?}");
    daemon.script.lock().unwrap().hang = true;
    let ran = bus.run(&["connect", "office", "--timeout", "1"]).await;
    assert!(ran.code == 5 && ran.err.contains("did not answer within 1 s"), "{ran:?}");
}

#[tokio::test]
async fn ctrl_c_gives_the_attempt_up() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &[Step::State("connecting", "probe-upstream", "", "")]).await;
    for (verb, told) in [("connect", true), ("reconnect", false)] {
        daemon.script.lock().unwrap().calls.clear();
        let args = if told { vec![verb, "office"] } else { vec![verb] };
        let child = bus.command(&args).spawn().unwrap();
        while daemon.calls().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let ran = finish(child).await;
        assert_eq!(ran.code, 130, "{ran:?}");
        assert_eq!(daemon.calls().contains(&"Disconnect ''".to_owned()), told, "{ran:?}");
    }
}

#[tokio::test]
async fn disconnect_ends_disconnected() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(
        &bus,
        &[Step::State("disconnecting", "", "", ""), Step::Pause(50), Step::State("disconnected", "", "requested", "")],
    )
    .await;
    daemon.script.lock().unwrap().state = "connected".to_owned();
    let ran = bus.run(&["down"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "disconnected\n"), "{ran:?}");
    {
        let mut script = daemon.script.lock().unwrap();
        script.blocking = true;
        let text = "a rule stayed".to_owned();
        script.health = vec![HealthItem { code: "undo".to_owned(), severity: "error".to_owned(), text }];
    }
    let ran = bus.run(&["disconnect"]).await;
    assert!(ran.code == 6 && ran.err.contains("rescue") && ran.err.contains("error: a rule stayed"), "{ran:?}");
    daemon.script.lock().unwrap().error = Some(Error::NotConnected);
    let ran = bus.run(&["disconnect"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "already disconnected\n"), "{ran:?}");
    assert_eq!(bus.run(&["reconnect"]).await.code, 3);
}

#[tokio::test]
async fn reconnect_leaves_the_old_connection_out_of_it() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(
        &bus,
        &[
            Step::State("connecting", "", "", ""),
            Step::Pause(300),
            Step::State("blocked", "", "upstream-unreachable", "no way"),
        ],
    )
    .await;
    daemon.script.lock().unwrap().state = "connected".to_owned();
    let ran = bus.run(&["reconnect"]).await;
    assert!(ran.code == 6 && ran.err.contains("no way"), "{ran:?}");
}

#[tokio::test]
async fn without_a_name_the_only_profile_is_taken() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &GOOD).await;
    let ran = bus.run(&["connect"]).await;
    assert!(ran.code == 2 && ran.err.contains("there is no profile yet"), "{ran:?}");
    daemon.profile("home-1", "").await;
    assert_eq!(bus.run(&["connect", "--verbose"]).await.code, 0);
    assert_eq!(daemon.calls(), ["Connect 'home-1' verbose=true"]);
    daemon.profile("office", "").await;
    let ran = bus.run(&["connect"]).await;
    assert!(ran.code == 2 && ran.err.contains("home-1\n  office"), "{ran:?}");
    let ran = bus.run(&["connect", "--mtu", "1500"]).await;
    assert!(ran.code == 2 && ran.err.contains("--proxy-url"), "{ran:?}");
    assert_eq!(daemon.calls().len(), 1);
}

#[tokio::test]
async fn an_ssh_session_is_not_cut_unasked() {
    let bus = TestBus::start();
    let daemon = Daemon::stepping(&bus, &GOOD).await;
    daemon.profile("safe", "[protect]\nkillswitch = true\n").await;
    daemon.profile("cuts", "[protect]\ninbound-replies = false\n").await;
    let over_ssh = |args: &'static [&'static str]| {
        let mut command = bus.command(args);
        command.env("SSH_CONNECTION", "192.0.2.9 50000 192.0.2.10 22");
        finish(command.spawn().unwrap())
    };
    let ran = over_ssh(&["connect", "cuts"]).await;
    assert!(ran.code == 1 && ran.err.contains("192.0.2.9") && ran.err.contains("--accept-risk=lose-ssh"), "{ran:?}");
    assert!(daemon.calls().is_empty());
    assert_eq!(over_ssh(&["connect", "cuts", "--accept-risk=lose-ssh"]).await.code, 0);
    assert_eq!(over_ssh(&["connect", "safe"]).await.code, 0);
    assert_eq!(over_ssh(&["connect", "--proxy-url", "http://h:1"]).await.code, 0);
    assert_eq!(daemon.calls().len(), 3);
}

#[tokio::test]
async fn the_log_is_kept_where_it_was_told_or_why_not() {
    let bus = TestBus::start();
    let record = |time, message: &str| LogRecord {
        time,
        level: "info".to_owned(),
        target: "net".to_owned(),
        message: message.to_owned(),
    };
    let log = vec![record(1, "before"), record(u64::MAX / 2, "of this attempt")];
    let daemon = Daemon::start(&bus, Script { log, steps: GOOD.to_vec(), ..Script::default() }).await;
    let directory = bus.directory.join("state");
    let ran = bus.run(&["connect", "office", "--keep-logs", "--state-dir", directory.to_str().unwrap()]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let file = std::fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept.contains("of this attempt") && !kept.contains("before"), "{kept}");
    assert!(ran.err.contains(file.to_str().unwrap()), "{ran:?}");
    daemon.script.lock().unwrap().log_error = true;
    let ran = bus.run(&["connect", "office", "--keep-logs"]).await;
    assert!(ran.code == 0 && ran.err.contains("the log is not kept: you may not read the log"), "{ran:?}");
    assert!(!bus.directory.join("proxyvpn").exists());
}

#[tokio::test]
async fn a_failure_of_before_is_not_taken_for_this_one() {
    let bus = TestBus::start();
    let steps = [Step::Pause(600), Step::State("connecting", "", "", ""), Step::State("connected", "", "", "")];
    let reason = Reason { code: "upstream-silent".to_owned(), text: "an old story".to_owned() };
    let script = Script { steps: steps.to_vec(), state: "blocked".to_owned(), reason, ..Script::default() };
    let _daemon = Daemon::start(&bus, script).await;
    let ran = bus.run(&["connect", "office"]).await;
    assert!(ran.code == 0 && !ran.err.contains("old story"), "{ran:?}");
}

#[tokio::test]
async fn lockdown_is_turned_on_shown_and_turned_off() {
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    for (args, words) in [
        (vec!["lockdown"], "is off"),
        (vec!["lockdown", "on"], "until you connect"),
        (vec!["lockdown", "status"], "is on"),
        (vec!["lockdown", "--json"], "\"lockdown\":true"),
        (vec!["lockdown", "off"], "is off"),
    ] {
        let ran = bus.run(&args).await;
        assert!(ran.code == 0 && ran.out.replace(": ", ":").contains(words), "{args:?}: {ran:?}");
    }
    assert_eq!(daemon.calls(), ["SetLockdown true", "SetLockdown false"]);
    {
        let mut script = daemon.script.lock().unwrap();
        script.error = Some(Error::NeverConnected);
        script.error_text = "no profile has connected yet".to_owned();
    }
    let ran = bus.run(&["lockdown", "on"]).await;
    assert!(ran.code == 1 && ran.err.contains("no profile has connected yet") && ran.err.contains("import"), "{ran:?}");
}

#[tokio::test]
async fn what_lockdown_keeps_closed_is_said() {
    let bus = TestBus::start();
    let steps = [Step::State("disconnecting", "", "", ""), Step::State("disconnected", "", "requested", "")];
    let script = Script {
        steps: steps.to_vec(),
        state: "connected".to_owned(),
        lockdown: true,
        blocking: true,
        ..Script::default()
    };
    let daemon = Daemon::start(&bus, script).await;
    let ran = bus.run(&["disconnect"]).await;
    assert!(ran.code == 0 && ran.out.contains("lockdown is on, so nothing leaves"), "{ran:?}");
    let failed = |state| {
        [Step::State("connecting", "", "", ""), Step::Pause(50), Step::State(state, "", "upstream-silent", "x")]
    };
    for (state, words) in
        [("disconnected", "Lockdown is on"), ("blocked", "proxyctl lockdown off and proxyctl disconnect")]
    {
        daemon.script.lock().unwrap().steps = failed(state).to_vec();
        let ran = bus.run(&["connect", "office"]).await;
        assert!(ran.code != 0 && ran.err.contains(words) && !ran.err.contains("as it was"), "{ran:?}");
    }
}
