//! The verbs that show something: text, JSON, exit codes, hostile content.

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Check, Flow, LogRecord, PlanStep, Progress, Reason};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::fake::{Daemon, Script, Step, TestBus, finish};

/// What a terminal must never get.
const HOSTILE: &str = "x\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}";

fn json_of(text: &str) -> Value {
    assert!(!text.trim_end().chars().any(char::is_control), "one safe line: {text:?}");
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn status_has_its_shape() {
    let bus = TestBus::start();
    let reason = Reason { code: "device-lost".to_owned(), text: "the device vanished".to_owned() };
    let progress = Progress { percent: 5, summary: "retrying".to_owned() };
    let script =
        Script { state: "blocked".to_owned(), reason, progress, blocking: true, since: 7, ..Script::default() };
    let daemon = Daemon::start(&bus, script).await;
    let ran = bus.run(&["status", "--json"]).await;
    assert_eq!(ran.code, 0);
    assert_eq!(
        json_of(&ran.out),
        json!({
            "version": 1, "daemon-version": "9.9.9", "state": "blocked", "phase": "",
            "reason": {"code": "device-lost", "text": "the device vanished"},
            "backend": "proxy", "profile": "office", "upstream": "http://proxy.example:8080", "since": 7,
            "progress": {"percent": 5, "summary": "retrying"}, "blocking": true, "lockdown": false, "firewall": "nftnl", "device": "pvpn0",
            "resolvers": ["192.0.2.53"], "health": [], "statistics": {"bytes-sent": 2048},
        })
    );
    let ran = bus.run(&["status"]).await;
    assert!(ran.code == 0 && ran.out.contains("blocked") && ran.out.contains("bytes-sent 2.0 KiB"), "{ran:?}");
    for (state, code) in
        [("connected", 0), ("connecting", 3), ("disconnecting", 3), ("disconnected", 3), ("blocked", 6)]
    {
        daemon.script.lock().unwrap().state = state.to_owned();
        assert_eq!(bus.run(&["status", "--check"]).await.code, code, "{state}");
    }
}

#[tokio::test]
async fn watch_gives_an_object_a_line_until_the_daemon_stops() {
    let bus = TestBus::start();
    let steps = [
        Step::State("connecting", "", "", ""),
        Step::Pause(200),
        Step::State("connected", "", "", ""),
        Step::Pause(200),
        Step::Vanish,
    ];
    let daemon = Daemon::stepping(&bus, &steps).await;
    let mut child = bus.command(&["status", "--watch", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut states = Vec::new();
    while let Some(line) = lines.next_line().await.unwrap() {
        if states.is_empty() {
            daemon.play();
        }
        states.push(json_of(&line)["state"].as_str().unwrap().to_owned());
    }
    assert_eq!(states, ["disconnected", "connecting", "connected"]);
    assert_eq!(finish(child).await.code, 7);
}

#[tokio::test]
async fn profiles_are_listed_shown_imported_and_removed() {
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    assert!(bus.run(&["profile", "list"]).await.err.contains("there is no profile yet"));
    daemon.profile("office", "backend = \"proxy\"\n# \u{1b}[2J\n").await;
    let ran = bus.run(&["profile", "list"]).await;
    assert!(ran.out.contains("office  proxy    no           imported  http://proxy.example:8080\n"), "{ran:?}");
    let listed = json_of(&bus.run(&["profile", "list", "--json"]).await.out);
    let office = json!({"name": "office", "backend": "proxy", "upstream": "http://proxy.example:8080", "autoconnect": false, "origin": "imported"});
    assert_eq!(listed, json!({"version": 1, "profiles": [office]}));
    assert_eq!(bus.run(&["profile", "show", "office"]).await.out, "backend = \"proxy\"\n# \\x1b[2J\n");
    let shown = json_of(&bus.run(&["profile", "show", "office", "--json"]).await.out);
    assert_eq!(shown["profile"]["text"], "backend = \"proxy\"\n# \u{1b}[2J\n");
    assert_eq!(bus.run(&["profile", "show", "none"]).await.code, 1);
    let file = bus.directory.join("lab.toml");
    std::fs::write(&file, "backend = \"proxy\"\n").unwrap();
    let ran = bus.run(&["profile", "import", file.to_str().unwrap()]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "imported lab\n"), "{ran:?}");
    assert_eq!(daemon.script.lock().unwrap().received, ["backend = \"proxy\"\n"]);
    assert_eq!(bus.run(&["profile", "import", "-"]).await.code, 2);
    assert_eq!(bus.run(&["profile", "import", "/nonexistent"]).await.code, 1);
    assert_eq!(bus.run(&["profile", "import", "/dev/zero", "--name", "x"]).await.code, 1);
    let ran = bus.run(&["profile", "remove", "a", "b"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "removed a\nremoved b\n"));
    assert_eq!(
        daemon.calls(),
        ["ImportProfile '' name=\"lab\" replace=false", "RemoveProfile 'a'", "RemoveProfile 'b'"]
    );
}

#[tokio::test]
async fn a_dry_run_shows_the_plan_and_connects_nothing() {
    let bus = TestBus::start();
    let step = PlanStep { layer: "rule".to_owned(), action: "add".to_owned(), text: format!("from all {HOSTILE}") };
    let daemon = Daemon::start(&bus, Script { plan: vec![step], ..Script::default() }).await;
    let plan = bus.run(&["plan", "office"]).await;
    assert_eq!(plan.out, "+ rule    from all x\\x1b]0;owned\\x07\\x9b2J\\u{202e}\n1 changes; nothing was changed\n");
    let dry = bus.run(&["connect", "office", "--dry-run", "--password", "hunter2"]).await;
    assert_eq!((dry.code, &dry.out), (0, &plan.out));
    let json = json_of(&bus.run(&["connect", "office", "--dry-run", "--json"]).await.out);
    assert_eq!(json["version"], 1);
    assert_eq!(json["steps"], json!([{"layer": "rule", "action": "add", "text": format!("from all {HOSTILE}")}]));
    assert_eq!(daemon.calls(), ["Plan 'office'"; 3]);
    assert!(daemon.script.lock().unwrap().received.is_empty());
}

fn record(time: u64, message: &str) -> LogRecord {
    LogRecord { time, level: "info".to_owned(), target: "net".to_owned(), message: message.to_owned() }
}

#[tokio::test]
async fn logs_are_shown_and_followed() {
    let bus = TestBus::start();
    let log = vec![record(1_000_000, HOSTILE)];
    let later_log = vec![record(1_000_000, HOSTILE), record(2_000_000, "new")];
    let daemon = Daemon::start(&bus, Script { log, later_log, ..Script::default() }).await;
    let first = "1970-01-01T00:00:01.000Z info  net: x\\x1b]0;owned\\x07\\x9b2J\\u{202e}\n";
    assert_eq!(bus.run(&["logs"]).await.out, first);
    let json = json_of(&bus.run(&["logs", "-n", "5", "--json"]).await.out);
    assert_eq!(
        json,
        json!({"version": 1, "records": [{"time": 1_000_000, "level": "info", "target": "net", "message": HOSTILE}]})
    );
    assert_eq!(daemon.calls(), ["GetLog 0", "GetLog 5"]);
    let mut child = bus.command(&["logs", "-f", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut messages = Vec::new();
    for _ in 0..2 {
        let line = lines.next_line().await.unwrap().unwrap();
        messages.push(json_of(&line)["message"].as_str().unwrap().to_owned());
    }
    assert_eq!(messages, [HOSTILE, "new"]);
    daemon.script.lock().unwrap().steps = vec![Step::Vanish];
    daemon.play();
    assert_eq!(finish(child).await.code, 7);
}

#[tokio::test]
async fn a_reader_that_has_enough_is_no_error() {
    let bus = TestBus::start();
    let log = (0..5000).map(|time| record(time, &"long ".repeat(40))).collect();
    let _daemon = Daemon::start(&bus, Script { log, ..Script::default() }).await;
    let mut child = bus.command(&["logs"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next_line().await.unwrap().unwrap().contains("long"));
    drop(lines);
    let ran = finish(child).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ran = finish(bus.command(&["logs"]).stdout(full).spawn().unwrap()).await;
    assert!(ran.code == 1 && ran.err.contains("cannot write the output"), "{ran:?}");
}

#[tokio::test]
async fn flows_have_a_table() {
    let bus = TestBus::start();
    let flow = Flow {
        id: 3,
        source: "10.255.255.1:40000".to_owned(),
        destination: format!("192.0.2.7:443{HOSTILE}"),
        state: "established".to_owned(),
        sent: 1536,
        received: 10,
        age: 61_000,
    };
    let _daemon = Daemon::start(&bus, Script { flows: vec![flow], ..Script::default() }).await;
    let ran = bus.run(&["flows"]).await;
    assert!(ran.out.contains("3   1 min  1.5 KiB  10 B") && !ran.out.contains('\x1b'), "{ran:?}");
    let json = json_of(&bus.run(&["flows", "--json"]).await.out);
    assert_eq!((&json["version"], &json["flows"][0]["sent"]), (&json!(1), &json!(1536)));
}

#[tokio::test]
async fn doctor_numbers_its_checks_and_fails_with_them() {
    let bus = TestBus::start();
    let check = |outcome: &str| Check {
        code: "nft".to_owned(),
        outcome: outcome.to_owned(),
        text: format!("nftables {HOSTILE}"),
        remedy: "load nf_tables".to_owned(),
    };
    let daemon = Daemon::start(&bus, Script { checks: vec![check("ok")], ..Script::default() }).await;
    let ran = bus.run(&["doctor", "office"]).await;
    assert!(ran.code == 1 && ran.out.contains("  4. failed  polkit is not there"), "{ran:?}");
    assert!(ran.out.contains("remedy: install the package polkitd"), "{ran:?}");
    daemon.own("org.freedesktop.PolicyKit1").await;
    let tun = std::path::Path::new("/dev/net/tun").exists();
    for (outcome, code) in [("ok", 0), ("warning", 0), ("skipped", 0), ("failed", 1), ("unheard-of", 1)] {
        daemon.script.lock().unwrap().checks = vec![check(outcome)];
        let ran = bus.run(&["doctor", "office"]).await;
        assert_eq!(ran.code, if tun { code } else { 1 }, "{ran:?}");
        assert!(ran.out.contains(&format!("  6. {outcome:<8}nftables x\\x1b")), "{ran:?}");
    }
    let json = json_of(&bus.run(&["doctor", "office", "--json"]).await.out);
    assert_eq!(json["version"], 1);
    let codes: Vec<_> =
        json["checks"].as_array().unwrap().iter().map(|check| check["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["system-bus", "service-installed", "daemon", "polkit", "tun-node", "nft"]);
    daemon.script.lock().unwrap().error = Some(Error::NotAuthorized);
    let ran = bus.run(&["doctor"]).await;
    assert!(ran.code == 1 && ran.out.contains("remedy: sudo proxyctl"), "{ran:?}");
}

#[tokio::test]
async fn doctor_works_without_daemon_and_bus() {
    let mut bus = TestBus::start();
    let ran = bus.run(&["doctor"]).await;
    assert!(ran.code == 1 && ran.out.contains("  2. failed  the bus knows no service org.proxyvpn1"), "{ran:?}");
    bus.address = "unix:path=/nonexistent".to_owned();
    let ran = bus.run(&["doctor"]).await;
    assert!(ran.code == 1 && ran.out.contains("  1. failed  cannot reach the system bus"), "{ran:?}");
    assert!(ran.out.contains("/dev/net/tun"), "{ran:?}");
}

#[tokio::test]
async fn completions_name_the_verbs() {
    let bus = TestBus::start();
    for shell in ["bash", "zsh", "fish"] {
        let ran = bus.run(&["completions", shell]).await;
        assert!(ran.code == 0 && ran.out.contains("reconnect") && ran.out.contains("no-killswitch"), "{shell}");
    }
}

#[tokio::test]
async fn the_help_tells_the_exit_codes() {
    let bus = TestBus::start();
    let ran = bus.run(&["--help"]).await;
    assert!(ran.code == 0 && ran.out.contains("    6  blocked") && ran.out.contains("  130  interrupted"), "{ran:?}");
    assert_eq!(bus.run(&[]).await.code, 2);
    assert_eq!(bus.run(&["connect", "--fly"]).await.code, 2);
}
