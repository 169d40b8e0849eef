//! What only the torvm backend has.

use proxyvpn_dbus::Error;
use proxyvpn_dbus::types::{Bootstrap, Circuit, LogRecord, Relay};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::fake::{Daemon, Script, Step, TestBus, finish};

const OBFS4: &str = "obfs4 192.0.2.1:443 cert=a";

#[tokio::test]
async fn connect_shows_tors_own_words_and_each_warning_once() {
    let bus = TestBus::start();
    let steps = [
        Step::State("connecting", "launch-vm", "", ""),
        Step::Progress(6, "Starting the virtual machine"),
        Step::State("connecting", "wait-bootstrap", "", ""),
        Step::Progress(14, "Waiting for Tor"),
        // Signals of two objects may overtake each other.
        Step::Pause(200),
        Step::Tor(10, "Connecting to a relay", "", ""),
        Step::Tor(10, "Connecting to a relay", "Clock skew\u{1b}[2J", "Set the clock."),
        Step::Tor(10, "Connecting to a relay", "Clock skew\u{1b}[2J", "Set the clock."),
        Step::Tor(100, "Done", "", ""),
        Step::Pause(200),
        Step::State("connected", "", "", ""),
    ];
    let _daemon = Daemon::stepping(&bus, &steps).await;
    let ran = bus.run(&["connect", "tor"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines: Vec<_> = ran.err.lines().skip_while(|line| !line.contains("Waiting for Tor")).collect();
    assert_eq!(
        lines,
        [
            "connecting: wait-bootstrap 14% (Waiting for Tor)",
            "Tor 10%: Connecting to a relay",
            "proxyctl: warning: Tor is held up: Clock skew\\x1b[2J (TIMEOUT). Set the clock.",
            "Tor 100%: Done",
        ],
        "{ran:?}"
    );
}

#[tokio::test]
async fn who_gives_a_time_means_it_whatever_progress_there_is() {
    let bus = TestBus::start();
    let mut steps = vec![Step::State("connecting", "wait-bootstrap", "", "")];
    for percent in 1..40 {
        steps.extend([Step::Tor(percent, "Loading", "", ""), Step::Pause(100)]);
    }
    let _daemon = Daemon::stepping(&bus, &steps).await;
    let ran = bus.run(&["connect", "tor", "--timeout", "1"]).await;
    assert!(ran.code == 5 && ran.err.contains("not connected after 1 s"), "{ran:?}");
}

#[tokio::test]
async fn status_says_how_far_tor_is_and_how_the_machine_runs() {
    let bus = TestBus::start();
    let [tag, summary, warning, reason, hint] =
        ["conn_or", "Connecting to a relay", "No route", "NOROUTE", "Is there a network?"].map(str::to_owned);
    let bootstrap = Bootstrap { percent: 10, tag, summary, warning, reason, hint };
    let script = Script { torvm: true, bootstrap, state: "connecting".to_owned(), ..Script::default() };
    let _daemon = Daemon::start(&bus, script).await;
    let text = bus.run(&["status"]).await.out;
    for line in [
        "Tor        10%: Connecting to a relay\n",
        "Tor warns  No route (NOROUTE)\n",
        "Hint       Is there a network?\n",
        "Transport  obfs4\n",
        "VM runs by tcg: there is no /dev/kvm\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let json: Value = serde_json::from_str(&bus.run(&["status", "--json"]).await.out).unwrap();
    assert_eq!(
        json["torvm"],
        json!({
            "bootstrap": {"percent": 10, "tag": "conn_or", "summary": "Connecting to a relay", "warning": "No route",
                          "reason": "NOROUTE", "hint": "Is there a network?"},
            "accelerator": "tcg", "accelerator-reason": "there is no /dev/kvm", "transport": "obfs4",
        })
    );
}

#[tokio::test]
async fn identity_and_circuits() {
    let bus = TestBus::start();
    let relay = |fingerprint: &str, nickname: &str, address: &str| Relay {
        fingerprint: fingerprint.repeat(40),
        nickname: nickname.to_owned(),
        address: address.to_owned(),
    };
    let relays = vec![relay("A", "guard\u{1b}", "192.0.2.1"), relay("B", "", ""), relay("C", "exit", "")];
    let circuits = vec![Circuit { id: "7".to_owned(), purpose: "GENERAL".to_owned(), relays }];
    let daemon = Daemon::start(&bus, Script { circuits, ..Script::default() }).await;
    let ran = bus.run(&["torvm", "new-identity"]).await;
    assert!(ran.code == 0 && ran.out.contains("other ways"), "{ran:?}");
    let ran = bus.run(&["torvm", "circuits"]).await;
    assert!(ran.out.contains("7   GENERAL  guard\\x1b (192.0.2.1) > BBBBBBBB > exit\n"), "{ran:?}");
    let json: Value = serde_json::from_str(&bus.run(&["torvm", "circuits", "--json"]).await.out).unwrap();
    assert_eq!((&json["version"], &json["circuits"][0]["relays"][2]["nickname"]), (&json!(1), &json!("exit")));
    daemon.script.lock().unwrap().error = Some(Error::NotConnected);
    assert_eq!(bus.run(&["torvm", "new-identity"]).await.code, 3);
    assert_eq!(daemon.calls(), ["NewIdentity", "Circuits", "Circuits", "NewIdentity"]);
}

#[tokio::test]
async fn bridges_are_set_and_listed() {
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    let run = async |args: &[&str]| bus.run(&[&["torvm", "bridges"], args].concat()).await;
    let ran = run(&["set", "tor", OBFS4, &format!("Bridge {OBFS4}")]).await;
    assert_eq!(ran.out, "tor has 2 bridges now, by obfs4; they count from its next connection on\n", "{ran:?}");
    let azure = "meek_lite 192.0.2.20:80 url=https://meek.azureedge.net/ front=ajax.aspnetcdn.com";
    let ran = run(&["set", "tor", azure]).await;
    assert!(ran.code == 0 && ran.err.contains("ajax.aspnetcdn.com is gone"), "{ran:?}");
    let snowflake = "snowflake 192.0.2.3:80 url=https://a.example/ ice=stun:b.example:3478";
    let ran = run(&["set", "tor", snowflake, "--transport", "snowflake"]).await;
    assert!(ran.code == 0 && ran.out.contains("by snowflake"), "{ran:?}");
    let ran = run(&["set", "tor", "--transport", "none"]).await;
    assert!(ran.code == 0 && ran.out.contains("has no bridges now"), "{ran:?}");
    let mut command = bus.command(&["torvm", "bridges", "set", "tor", "-"]);
    let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\n 192.0.2.1:443 \n192.0.2.2:443\n").await.unwrap();
    assert_eq!(finish(child).await.code, 0);
    for (args, says) in [
        (vec!["set", "tor"], "give bridges"),
        (vec!["set", "tor", "obfs4 x"], "is not a bridge"),
        (vec!["set", "tor", OBFS4, "--transport", "webtunnel"], "is no transport"),
    ] {
        let ran = run(&args).await;
        assert!(ran.code == 2 && ran.err.contains(says), "{args:?}: {ran:?}");
    }
    let obfs4 = format!("[\"{OBFS4}\", \"{OBFS4}\"]");
    assert_eq!(
        daemon.calls(),
        [
            format!("SetBridges 'tor' obfs4 {obfs4}"),
            format!("SetBridges 'tor' meek [\"{azure}\"]"),
            format!("SetBridges 'tor' snowflake [\"{snowflake}\"]"),
            "SetBridges 'tor' none []".to_owned(),
            "SetBridges 'tor' none [\"192.0.2.1:443\", \"192.0.2.2:443\"]".to_owned(),
        ]
    );
    assert!(run(&["list"]).await.err.contains("there are no bridges"));
    daemon.profile("office", "backend = \"proxy\"\n").await;
    daemon.profile("tor", &format!("backend = \"torvm\"\n[torvm]\nbridges = [\"{OBFS4}\"]\n")).await;
    let table = format!("PROFILE  BRIDGE\ntor      {OBFS4}\n");
    assert_eq!(run(&["list"]).await.out, table);
    assert_eq!(run(&["list", "tor"]).await.out, table);
    assert_eq!(run(&["list", "office"]).await.code, 1);
    let json: Value = serde_json::from_str(&run(&["list", "--json"]).await.out).unwrap();
    assert_eq!(json, json!({"version": 1, "profiles": [{"name": "tor", "transport": "obfs4", "bridges": [OBFS4]}]}));
}

#[tokio::test]
async fn tors_log_is_a_part_of_the_log() {
    let bus = TestBus::start();
    let record = |time: u64, target: &str| LogRecord {
        time,
        level: "info".to_owned(),
        target: target.to_owned(),
        message: format!("message {time}"),
    };
    let log = vec![record(1, "torvm"), record(2, "net"), record(3, "torvm"), record(4, "net")];
    let daemon = Daemon::start(&bus, Script { log, ..Script::default() }).await;
    let all = bus.run(&["torvm", "log"]).await.out;
    assert!(all.contains("message 1") && all.contains("message 3") && !all.contains("net"), "{all}");
    let newest = bus.run(&["torvm", "log", "-n", "1"]).await.out;
    assert!(newest.contains("message 3") && newest.lines().count() == 1, "{newest}");
    assert_eq!(daemon.calls(), ["GetLog 0", "GetLog 0"]);
}

#[tokio::test]
async fn the_forerunners_json_is_shown_as_a_profile_and_imported() {
    let bus = TestBus::start();
    let daemon = Daemon::start(&bus, Script::default()).await;
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/torvm.json");
    let text = include_str!("../data/torvm.toml").replace("tor.password", "torvm.password");
    let ran = bus.run(&["profile", "import", file]).await;
    assert_eq!((ran.code, ran.out), (0, format!("{text}imported torvm\n")));
    assert!(
        ran.err.contains("proxyctl: note: proxy.password is not taken") && !ran.err.contains("hunter2"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.script.lock().unwrap().received, [text]);
    let bad = bus.directory.join("bad.json");
    std::fs::write(&bad, "{\"tap_name\": \"a\", \"qemu\": \"/bin/sh\"}").unwrap();
    let ran = bus.run(&["profile", "import", bad.to_str().unwrap()]).await;
    assert!(ran.code == 1 && ran.err.contains("unknown field `qemu`"), "{ran:?}");
    assert_eq!(daemon.calls(), ["ImportProfile '' name=\"torvm\" replace=false"]);
}
